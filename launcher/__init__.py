"""The top: the command line, the configuration, the trainer, the supervisor, the cluster tools and the evaluations.

It is not a library: nothing below imports it. Invariant: importing this package imports neither torch nor ray nor
deepspeed, so that `longscan --help` answers at once; each command imports what it needs.
"""

__all__: list[str] = []
