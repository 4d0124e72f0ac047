"""The plots of `docs/kernels.md`, made from the recorded figures: `python -m benchmarks.report` calls `draw`.

One picture an op shows time against T for each series of works that was measured at two lengths or more: ours, peers
and floor. `overview.png` shows each work of the usual shapes as a multiple of the floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .figures import Timing, is_sweep, op_of, peer, series
from .pictures import INK, bare, save

FLOOR = "#7a7a7a"
# Okabe and Ito's colours, which the colour-blind tell apart; by the first word of a name.
COLOURS = {
    "longscan": "#0072b2",
    "fla": "#d55e00",
    "fla-core": "#d55e00",
    "FlexAttention": "#009e73",
    "SDPA": "#cc79a7",
    "accelerated-scan": "#e69f00",
    "Liger": "#56b4e9",
}
OTHER = "#555555"
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# The least distance of two labels, as a share of an axis.
LABEL_GAP = 0.072
PASSES = (("forward", "forward"), ("both", "forward + backward"))


def draw(timings: Sequence[Timing], folder: Path) -> list[Path]:
    """Writes the pictures into `folder` and returns their paths."""
    files = []
    for op in dict.fromkeys(op_of(timing.work) for timing in timings):
        grown = _grown([timing for timing in timings if op_of(timing.work) == op])
        if grown:
            files.append(folder / f"{op}.png")
            save(_growth(grown), files[-1])
    usual = [timing for timing in timings if not is_sweep(timing.work) and timing.both_ratio]
    if usual:
        files.append(folder / "overview.png")
        save(_overview(usual), files[-1])
    return files


def _grown(timings: Sequence[Timing]) -> dict[str, list[tuple[int, Timing]]]:
    """By series, (tokens, timing) of those that were measured at two lengths or more."""
    found: dict[str, list[tuple[int, Timing]]] = {}
    for timing in timings:
        place = series(timing.work)
        if place is not None:
            found.setdefault(place.name, []).append((place.tokens, timing))
    return {name: points for name, points in found.items() if len({tokens for tokens, _ in points}) > 1}


def _growth(grown: dict[str, list[tuple[int, Timing]]]) -> Figure:
    """A row a series, forward on the left and forward with backward on the right."""
    figure = Figure(figsize=(9.6, 3.1 * len(grown)), dpi=110, layout=ConstrainedLayoutEngine(wspace=0.03, hspace=0.06))
    axes = figure.subplots(len(grown), 2, squeeze=False, sharex="row")
    for row, (name, points) in zip(axes, grown.items(), strict=True):
        for axis, (field, title) in zip(row, PASSES, strict=True):
            _panel(axis, points, field)
            first = name.replace("T T", "T") if axis is row[0] else ""
            axis.set_title(f"{first}\n{title}", loc="left", fontsize=9, color=INK)
        row[0].set_ylabel("ms", fontsize=9, color=INK)
    for axis in axes[-1]:
        axis.set_xlabel("tokens in a row, T", fontsize=9, color=INK)
    return figure


def _panel(axis: Any, points: Sequence[tuple[int, Timing]], field: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    labels = []
    for name, style in _styles([timing for _, timing in points]).items():
        line = sorted((t, getattr(m, field)) for t, m in points if peer(m.impl) == name and getattr(m, field))
        if line:
            axis.plot(*zip(*line, strict=True), **style)
            short_of = line[-1][0] < max(tokens for tokens, _ in points)
            at = f" at {_short(line[-1][0])}" if short_of else ""
            labels.append((line[-1][1], f"{name}  {_figure(line[-1][1])}{at}", style["color"]))
    floor = sorted((t, getattr(m, f"{field}_floor")) for t, m in points if m.ours and getattr(m, f"{field}_floor"))
    if floor:
        axis.plot(*zip(*floor, strict=True), color=FLOOR, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
        labels.append((floor[-1][1], f"floor  {_figure(floor[-1][1])}", FLOOR))
    _dress(axis, sorted({tokens for tokens, _ in points}))
    _label_right(axis, labels)


def _styles(timings: Sequence[Timing]) -> dict[str, dict[str, Any]]:
    """How to draw each implementation: a colour a project, a dash and a marker each where it has several."""
    styles: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for timing in timings:
        name = peer(timing.impl)
        if name in styles:
            continue
        colour = COLOURS.get(name.split()[0].rstrip(","), OTHER)
        nth = seen[colour] = seen.get(colour, -1) + 1
        styles[name] = {
            "color": colour,
            "linestyle": STYLES[nth % len(STYLES)],
            "marker": MARKERS[nth % len(MARKERS)],
            "linewidth": 2.2 if timing.ours else 1.4,
            "markersize": 5 if timing.ours else 4,
            "zorder": 3 if timing.ours else 2,
        }
    return styles


def _dress(axis: Any, lengths: Sequence[int]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8, colors=INK)
    bare(axis)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _label_right(axis: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes each label right of the axis at its height, moved apart where two would touch, never above the axis."""
    low, high = (math.log(bound) for bound in axis.get_ylim())
    labels, heights = sorted(labels), []
    for value, _, _ in labels:
        height = (math.log(value) - low) / (high - low)
        heights.append(max(height, heights[-1] + LABEL_GAP) if heights else height)
    ceiling = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - LABEL_GAP
    for (_, text, colour), height in zip(labels, heights, strict=True):
        axis.annotate(
            text,
            (1.015, height),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
        )


def _figure(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.2g}"


def _overview(timings: Sequence[Timing]) -> Figure:
    """A line a work, op by op: how many times the floor each implementation takes, forward and backward."""
    ops = list(dict.fromkeys(op_of(timing.work) for timing in timings))
    works = sorted(dict.fromkeys(timing.work for timing in timings), key=lambda work: ops.index(op_of(work)))
    figure = Figure(figsize=(9.6, 1.1 + 0.31 * len(works)), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    axis.set_xscale("log")
    for name, style in _styles(timings).items():
        points = [(t.both_ratio or 0, works.index(t.work)) for t in timings if peer(t.impl) == name]
        axis.plot(*zip(*points, strict=True), label=name, **style | {"linestyle": "none", "markersize": 7})
    axis.axvline(1, color=FLOOR, linewidth=1.2, linestyle=(0, (2, 2)), zorder=0)
    axis.set_yticks(range(len(works)), works, fontsize=8, color=INK)
    axis.set_ylim(len(works) - 0.4, -0.6)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}x" if f"{value:g}"[0] in "25" else ""))
    axis.tick_params(axis="x", which="both", labelsize=8, colors=INK)
    bare(axis)
    axis.set_xlabel("time of forward + backward as a multiple of the floor (dashed)", color=INK, fontsize=9)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False, labelcolor=INK, columnspacing=3)
    return figure
