"""What longscan raises for its user: one clear sentence with the value and the remedy, and the exit code it ends in.

Everything else that is raised is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can mend; the command prints the message alone and exits with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """A bad option, key, value or layout, found before any process starts."""

    exit_code = 2
