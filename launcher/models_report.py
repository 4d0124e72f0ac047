"""What `longscan models` prints: every model preset with its size, its cost a token and what generation keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from ..models.config import (
    ModelConfig,
    carry_bytes,
    config_from_mapping,
    flops_per_token,
    load_preset,
    num_params,
    preset_names,
    published,
)
from .schema import count_of

SHORT, LONG = 2**11, 2**15
# Where nothing is published: the byte tokenizer's 257 tokens, rounded up as a run does.
BYTE_VOCABULARY = 320
FAMILIES = {
    frozenset({"rg_lru", "local_attention"}): "griffin",
    frozenset({"rg_lru"}): "hawk",
    frozenset({"short_conv", "taylor_attention", "local_attention"}): "based",
    frozenset({"linearized_attention"}): "linearized",
    frozenset({"attention"}): "transformer",
}
COLUMNS = (
    "preset",
    "family",
    "layers",
    "vocab",
    "params",
    "no table",
    "published",
    "differs",
    "FLOPs 2K",
    "FLOPs 32K",
    "bytes 32K",
)


@dataclass(frozen=True)
class PresetRow:
    """One preset.

    Attributes:
        preset, family, width, layers: what it is.
        vocab_size: the published vocabulary, else the byte tokenizer's; a run has its own tokenizer's.
        parameters: with that vocabulary.
        parameters_without_embedding: less the embedding and an untied head.
        published: the published count as printed, None where there is none.
        difference: of what that count counts (`models.config.Published`) from it, relative.
        flops_per_token_2k, flops_per_token_32k: of training, in rows of one document.
        carry_bytes_32k: what generation keeps of a row after 32K tokens, in bf16 and fp32 states.
    """

    preset: str
    family: str
    width: int
    layers: int
    vocab_size: int
    parameters: int
    parameters_without_embedding: int
    published: str | None
    difference: float | None
    flops_per_token_2k: float
    flops_per_token_32k: float
    carry_bytes_32k: int

    @staticmethod
    def of(name: str) -> PresetRow:
        """The row of the preset `name`."""
        figures = published(name)
        blocks = config_from_mapping(load_preset(name) | {"vocab_size": 0})
        config = replace(blocks, vocab_size=figures.vocab_size if figures else BYTE_VOCABULARY)
        return PresetRow(
            preset=name,
            family=family(config),
            width=config.width,
            layers=config.layers,
            vocab_size=config.vocab_size,
            parameters=num_params(config),
            parameters_without_embedding=num_params(blocks),
            published=figures and figures.parameters,
            difference=figures and figures.counted(config) / count_of(figures.parameters, "published") - 1,
            flops_per_token_2k=flops_per_token(config, SHORT),
            flops_per_token_32k=flops_per_token(config, LONG),
            carry_bytes_32k=carry_bytes(config, LONG),
        )

    def cells(self) -> Sequence[str]:
        """The row as the table shows it."""
        return (
            self.preset,
            self.family,
            f"{self.layers} x {self.width}",
            str(self.vocab_size),
            in_units(self.parameters, "KMB"),
            in_units(self.parameters_without_embedding, "KMB"),
            self.published or "",
            "" if self.difference is None else f"{round(self.difference, 3) + 0.0:+.1%}",
            in_units(self.flops_per_token_2k),
            in_units(self.flops_per_token_32k),
            in_units(self.carry_bytes_32k),
        )


@dataclass(frozen=True)
class ModelsReport:
    """All presets, those of a family together, the smallest first."""

    rows: list[PresetRow]

    @staticmethod
    def of_all() -> ModelsReport:
        """The presets that come with longscan."""
        rows = [PresetRow.of(name) for name in preset_names()]
        order = list(FAMILIES.values())
        return ModelsReport(sorted(rows, key=lambda row: (order.index(row.family), row.parameters_without_embedding)))

    def to_json(self) -> list[dict[str, Any]]:
        """One object a preset."""
        return [asdict(row) for row in self.rows]

    def show(self, console: Console) -> None:
        """Prints the presets as a table."""
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("preset", "family") else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row.cells())
        console.print(table)


def family(config: ModelConfig) -> str:
    """The family whose mixers the model has."""
    return FAMILIES[frozenset(config.mixers)]


def in_units(number: float, units: str = "KMGT") -> str:
    """Three digits and the unit, of factors 1000: 1.35M."""
    power = 0
    while number >= 999.5 and power < len(units):
        number, power = number / 1000, power + 1
    return f"{number:#.3g}".rstrip(".") + units[power - 1] if power else f"{number:.0f}"
