"""Writes `docs/small-models.md` and its plot from the figures and curves of `small_models`.

python -m benchmarks.small_models_page
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from longscan.models import config_from_mapping, load_preset, num_params

from . import record as recording
from .figures import Figure, newest
from .pictures import INK, bare, save
from .recall import KINDS, NEAR

BENCH = "small_models"
PARAMETERS = "parameters without the embedding"
TOKENS = "tokens trained"
HELDOUT = "held-out bits per byte"
RATE = "tokens per second, median step"
MEMORY = "peak memory"
SECONDS = "train, evaluate, write"
AT_LENGTH = re.compile(r"bits per byte in rows of (\d+)")
CURVE: tuple[str, ...] = ("preset", "step", "tokens", "loss", "bits_per_byte")
# Seconds that each run may take.
BUDGET = 540.0
TRANSFORMER = "llama"
PRESETS = (
    "llama-small",
    "rope-small",
    "alibi-small",
    "sinusoidal-small",
    "griffin-small",
    "hawk-small",
    "based-small",
    "linearized-small",
)
# Okabe and Ito's colours, which the colour-blind tell apart; dashes for the transformer's twins.
COLOURS = ("#333333", "#888888", "#56b4e9", "#b87900", "#0072b2", "#009e73", "#d55e00", "#cc79a7")
STYLES = ("-", (0, (5, 1.5)), (0, (5, 1.5)), (0, (5, 1.5)), "-", "-", "-", "-")
# What is shown of the bits at a length, as a multiple of the lowest.
HIGHEST = 1.5
DOCS = recording.ROOT / "docs"
PAGE, PLOT = "small-models.md", "figures/small_models.png"
HEAD = """# The small models, trained

Made by `python -m benchmarks.small_models_page` from `benchmarks/results/`. These commands measure it again, the first
on one GPU after the other or on as many as there are:

    python -m benchmarks.small_models --text SITE_PACKAGES
    python -m benchmarks.small_models --text SITE_PACKAGES llama hawk optimizer.lr=4e-3

The list: the eight `-small` presets, trained by `launcher/presets/small.yaml` on {tokens} tokens of Python source, in
rows of 2,048 tokens of a byte-level BPE of 16,384. The time: at most 9 minutes for each to train, to be scored and to
write its results; 8 minutes for preparation and all eight on four GPUs. All have the same rows in the same order,
batch, learning rate, schedule and seed, none of them tuned for a family.

**Held out** is the bits per byte after the last step on files that no model trained on, packed into rows of 2,048
tokens as in training. **Rows of N** scores the same long held-out files at every N, each row from its beginning.
"""

RECALL = f"""
## What is copied, and what is not

Held-out tokens that followed the same token before, earlier in the same document and row, are **repeated**: a copy from
the context gives them. **Near** is up to {NEAR} tokens back. The rest are **new**. The mean loss on each kind is in
nats a token; behind it stands the kind's share of the gap to {TRANSFORMER}, which is the difference of the losses
summed over all tokens, or of the lead where a preset is ahead.
"""


def curves_file() -> Path:
    """Where the curves are kept."""
    return recording.RESULTS / f"{BENCH}-curves.csv"


def read_curves(file: Path) -> list[dict[str, str]]:
    """The points of all curves kept, in order."""
    if not file.exists():
        return []
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def page() -> str:
    """The page: a row a preset, those not run marked."""
    figures = latest()
    reached = by_preset(figures)
    lengths = sorted({length for values in reached.values() for length in lengths_of(values)})
    tokens = max((round(values[TOKENS] / 1e6) for values in reached.values()), default=52)
    parts = [HEAD.format(tokens=f"{tokens}M")]
    if reached:
        last, commits = figures[-1], dict.fromkeys(figure["commit"] for figure in figures if figure["commit"])
        commit = f", commit {', '.join(commits)}" if commits else ""
        parts += [f"{last['device']}{commit}, {last['date'][:10]}.\n", f"![Curves]({PLOT})\n"]
    names = ("preset", "parameters", "held out", "against llama", *(f"rows of {length:,}" for length in lengths))
    parts.append(row(*names, "tokens/s", "GiB", "s"))
    parts.append("|---|" + "---:|" * (len(names) + 2))
    others = [preset for preset in reached if preset not in PRESETS]
    parts += [preset_row(preset, reached, lengths) for preset in (*PRESETS, *others)]
    split = [preset for preset in (*PRESETS, *others) if share_of(KINDS[0]) in reached.get(preset, {})]
    parts += recall_table(split, reached) if split else []
    return "\n".join(parts) + "\n"


def recall_table(presets: Sequence[str], reached: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yields the text and lines of the losses by kind of token."""
    yield RECALL
    yield row("preset", *KINDS)
    yield "|---|" + "---:|" * len(KINDS)
    yield row("share of all tokens", *(f"{reached[presets[0]][share_of(kind)]:.1%}" for kind in KINDS))
    for preset in presets:
        shares = gap_shares(reached[preset], transformer_of(preset, reached))
        yield row(preset, *(f"{reached[preset][nats_of(kind)]:.3f}{shares.get(kind, '')}" for kind in KINDS))


def gap_shares(values: dict[str, float], transformer: dict[str, float]) -> dict[str, str]:
    """How to show each kind's share of the gap to the transformer; none for itself and where it was not measured."""
    if values is transformer or nats_of(KINDS[0]) not in transformer:
        return {}
    gaps = [values[share_of(kind)] * (values[nats_of(kind)] - transformer[nats_of(kind)]) for kind in KINDS]
    return {kind: f" ({gap / sum(gaps):z.0%})" for kind, gap in zip(KINDS, gaps, strict=True) if sum(gaps)}


def share_of(kind: str) -> str:
    """The metric of the share of held-out tokens that are of a kind."""
    return f"share of tokens that are {kind}"


def nats_of(kind: str) -> str:
    """The metric of the mean loss on held-out tokens of a kind."""
    return f"nats a token that is {kind}"


def latest() -> list[Figure]:
    """The newest figure of each kind on the device measured last, by date."""
    figures = sorted(newest(BENCH), key=lambda figure: figure["date"])
    return [figure for figure in figures if figure["device"] == figures[-1]["device"]]


def by_preset(figures: Sequence[Figure]) -> dict[str, dict[str, float]]:
    """The newest figures, metric to value, of each preset."""
    found: dict[str, dict[str, float]] = {}
    for figure in figures:
        found.setdefault(figure["work"], {})[figure["metric"]] = figure["value"]
    return found


def lengths_of(values: dict[str, float]) -> dict[int, float]:
    """The bits per byte by row length."""
    return {int(match[1]): value for metric, value in values.items() if (match := AT_LENGTH.fullmatch(metric))}


def preset_row(preset: str, reached: dict[str, dict[str, float]], lengths: Sequence[int]) -> str:
    """What a preset reached, or that it was not run."""
    if preset not in reached:
        parameters = num_params(config_from_mapping(load_preset(preset)))
        return row(preset, f"{parameters / 1e6:.1f}M", "not run", *[""] * (len(lengths) + 4))
    values, transformer = reached[preset], transformer_of(preset, reached).get(HELDOUT)
    parameters = f"{values[PARAMETERS] / 1e6:.1f}M"
    against = "" if transformer is None else f"{values[HELDOUT] / transformer - 1:+.1%}"
    scored = (f"{bits:.3f}" if (bits := lengths_of(values).get(length)) else "" for length in lengths)
    cost = (f"{values[RATE]:,.0f}", f"{values[MEMORY]:.1f}", f"{values[SECONDS]:.0f}")
    return row(preset, parameters, f"{values[HELDOUT]:.4f}", against, *scored, *cost)


def transformer_of(preset: str, reached: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the transformer of the preset's size reached: changed as the preset was, else unchanged, else nothing."""
    base, _, changes = preset.partition(" ")
    twin = f"{TRANSFORMER}-{base.rpartition('-')[2]}"
    return reached.get(f"{twin} {changes}".strip()) or reached.get(twin, {})


def row(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def draw(file: Path) -> None:
    """Draws the curves on the left, and on the right the bits per byte against the length of a row."""
    reached, curves = by_preset(latest()), read_curves(curves_file())
    picture = Picture(figsize=(9.6, 4.2), dpi=110, layout="constrained")
    left, right = picture.subplots(1, 2)
    for preset, style in zip(PRESETS, styles(), strict=True):
        points = [line for line in curves if line["preset"] == preset]
        left.plot(*([float(line[key]) for line in points] for key in ("tokens", "bits_per_byte")), **style)
        scored = sorted(lengths_of(reached.get(preset, {})).items())
        if scored:
            right.plot(*zip(*scored, strict=True), marker="o", markersize=4, label=preset, **style)
    dress(left, "tokens trained", "bits per byte, training", lambda value, _: f"{value / 1e6:g}M")
    right.set_xscale("log", base=2)
    dress(right, "tokens in a row", "bits per byte, held out", lambda value, _: f"{value:,.0f}")
    left.set_yscale("log")
    left.yaxis.set_major_locator(MaxNLocator(8))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    # Positions that do not extrapolate would flatten the rest; the table has their figures.
    lowest = min((bits for values in reached.values() for bits in lengths_of(values).values()), default=1.0)
    right.set_ylim(top=min(right.get_ylim()[1], HIGHEST * lowest))
    if right.lines:
        picture.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False, labelcolor=INK)
    save(picture, file)


def styles() -> Iterator[dict[str, Any]]:
    """How to draw each preset in turn."""
    for colour, dash in zip(COLOURS, STYLES, strict=True):
        yield {"color": colour, "linestyle": dash, "linewidth": 1.6}


def dress(axis: Any, across: str, up: str, shown: Any) -> None:
    """Names the axes and thins what is not a curve."""
    axis.set_xlabel(across, fontsize=9, color=INK)
    axis.set_ylabel(up, fontsize=9, color=INK)
    axis.xaxis.set_major_formatter(FuncFormatter(shown))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(which="both", labelsize=8, colors=INK)
    bare(axis)


def write() -> None:
    """Writes the page, and the plot where there is something to draw."""
    (DOCS / PAGE).write_text(page())
    if latest():
        draw(DOCS / PLOT)


if __name__ == "__main__":
    write()
