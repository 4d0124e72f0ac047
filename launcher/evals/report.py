"""The results of an extrapolation: a table for the terminal, one JSON document, and a plot."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...errors import ConfigError
from ..run_folder import write_new

INK, MODEL, LATE, BASELINE = "#333333", "#1f5fa8", "#7fa8d6", "#8a8a8a"


@dataclass(frozen=True)
class Bucket:
    """The score of the tokens at positions `begin` to `end` (exclusive) of their rows."""

    begin: int
    end: int
    bits_per_byte: float


@dataclass(frozen=True)
class LengthScore:
    """The score at one row length; `last_quarter` counts only the last quarter of each row."""

    length: int
    rows: int
    bits_per_byte: float
    last_quarter: float
    buckets: list[Bucket]
    seconds: float


@dataclass(frozen=True)
class Extrapolation:
    """Scores of one checkpoint at several row lengths, and of baselines, all on the same text."""

    run: str
    step: int
    parameters: int
    corpus: str
    device: str
    trained_lengths: list[int]
    text: str
    tokens: int
    text_bytes: float
    lengths: list[LengthScore]
    baselines: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Every field, nested."""
        return asdict(self)

    def show(self, console: Console) -> None:
        """Prints a row a length, then the baselines."""
        console.print(self.title, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("tokens in a row")
        for name in ("bits/byte", "last quarter", "rows"):
            table.add_column(name, justify="right")
        for score in self.lengths:
            name = f"{score.length:,}{'  (trained)' if score.length in self.trained_lengths else ''}"
            table.add_row(name, f"{score.bits_per_byte:.3f}", f"{score.last_quarter:.3f}", f"{score.rows:,}")
        table.add_section()
        for name, bits in self.baselines.items():
            table.add_row(name, f"{bits:.3f}", "", "", style="dim")
        console.print(table)
        if self.text == "joined":
            console.print("Few held-out documents are so long: documents were joined end to end.", style="yellow")

    @property
    def title(self) -> str:
        """What was scored, in one line."""
        return f"{self.text_bytes:,.0f} bytes of held-out text, {Path(self.run).name} at step {self.step:,}"


def results_folder(folder: Path) -> Path:
    """`folder`, made if it is not there; ConfigError where results cannot be written, said before any is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(
            f"cannot write results into {folder}: {error.strerror}; name another folder with --output."
        ) from error


def save(result: Extrapolation, folder: Path) -> list[Path]:
    """Writes extrapolation.json and .png, or -2, -3, ... where those exist; returns both paths."""
    number, stem = 1, "extrapolation"
    while (folder / f"{stem}.json").exists() or (folder / f"{stem}.png").exists():
        number += 1
        stem = f"extrapolation-{number}"
    image = folder / f"{stem}.png"
    plot(result, image)
    return [write_new(folder / f"{stem}.json", json.dumps(result.to_json(), indent=2) + "\n"), image]


def plot(result: Extrapolation, file: Path) -> None:
    """Draws bits per byte over row length, with the baselines as lines and the trained lengths marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.set_xscale("log", base=2)
    lengths = [score.length for score in result.lengths]
    whole = [score.bits_per_byte for score in result.lengths]
    late = [score.last_quarter for score in result.lengths]
    axis.plot(lengths, late, color=LATE, linewidth=1.5, marker="o", markersize=3.5)
    axis.plot(lengths, whole, color=MODEL, linewidth=2.2, marker="o", markersize=5)
    values = [*whole, *late, *result.baselines.values()]
    span = max(values) - min(values) or 1.0
    axis.set_ylim(min(values) - 0.08 * span, max(values) + 0.08 * span)
    labels = [(whole[-1], "model, whole row", MODEL), (late[-1], "model, last quarter", LATE)]
    for name, bits in result.baselines.items():
        axis.axhline(bits, color=BASELINE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        labels.append((bits, name, BASELINE))
    _label_right(axis, labels, span)
    for length in result.trained_lengths:
        axis.axvline(length, color=INK, linewidth=0.8, linestyle=":", zorder=0)
        axis.annotate(
            f"trained at {length:,}",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=INK,
        )
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{length:,}" for length in lengths])
    axis.set_xlabel("tokens in a row")
    axis.set_ylabel("bits per byte (lower is better)")
    axis.set_title(result.title, loc="left", fontsize=10, color=INK)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(file, metadata={"Software": "longscan"})


def _label_right(axis: Any, labels: list[tuple[float, str, str]], span: float) -> None:
    """Writes each label right of the axis at its height, moved up where the one below would touch it."""
    lowest = -float("inf")
    for bits, name, colour in sorted(labels):
        height = max(bits, lowest + 0.052 * span)
        lowest = height
        axis.annotate(
            f"{name}  {bits:.2f}",
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )
