"""What `longscan config` prints: a resolved configuration with what is missing in it, or the list of every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from ..errors import UserError
from ..models.config import num_params
from .config import Config, config_keys, resolve, to_yaml
from .validate import check_run, validate


@dataclass(frozen=True)
class ConfigReport:
    """A resolved configuration; `problem` says why it cannot be trained yet, None where it can."""

    config: Config
    problem: str | None

    @staticmethod
    def of(source: str, overrides: Sequence[str]) -> ConfigReport:
        """The report on `source` with `overrides`; the vocabulary is filled in where the corpora can be opened."""
        config = resolve(source, overrides)
        try:
            validate(config)
            return ConfigReport(check_run(config)[0], None)
        except UserError as error:
            return ConfigReport(config, str(error))

    def to_json(self) -> dict[str, Any]:
        """The configuration's keys and values, nothing else."""
        return dataclasses.asdict(self.config)

    def show(self, console: Console) -> None:
        """Prints the YAML; size and problem go to standard error, so that the output can be saved as a file."""
        if console.is_terminal:
            console.print(Syntax(to_yaml(self.config), "yaml", background_color="default", word_wrap=True))
        else:
            console.file.write(to_yaml(self.config))
        aside = Console(stderr=True, highlight=False, soft_wrap=True)
        if self.problem:
            aside.print(f"not ready to train: {self.problem}", style="yellow", markup=False)
        else:
            aside.print(f"ready to train: {num_params(self.config.model):,} parameters", style="dim", markup=False)


class KeysReport:
    """Every key a configuration may hold."""

    def to_json(self) -> list[dict[str, Any]]:
        """One object a key."""
        return [dataclasses.asdict(key) for key in config_keys()]

    def show(self, console: Console) -> None:
        """Prints the keys as a table; `[]` stands for an index."""
        table = Table(box=None, pad_edge=False)
        for name in ("key", "type", "default", "meaning"):
            table.add_column(name, overflow="fold", no_wrap=name in ("key", "type"))
        for key in config_keys():
            default = "" if key.default == "" else str(key.default)
            table.add_row(*(_plain(text) for text in (key.name, key.type, default, key.meaning)))
        console.print(table)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
