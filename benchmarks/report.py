"""Writes the pages and plots that show the figures in `results/`: `python -m benchmarks.report`. Never edited by hand.

`docs/kernels-measured.md` and `docs/figures/` are of the kernels on a GPU, `docs/measured.md` is of all else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from .figures import Figure, Timing, newest, op_of, timings
from .record import ROOT
from .targets import TARGETS

DOCS = ROOT / "docs"
# Benches with a page of their own.
ELSEWHERE = ("kernels", "first_call", "sanitize", "profile", "small_models")
HEAD = """# What was measured

Made by `python -m benchmarks.report` from `benchmarks/results/`; `python -m benchmarks.<bench>` measures a bench again.
The newest figure of each kind stands. Machines are shared: read ratios and medians, not single times.
The kernels have [a page of their own](kernels-measured.md), and so have [the small models](small-models.md).
"""
KERNELS_HEAD = """# The kernels, measured

Made by `python -m benchmarks.report` from `benchmarks/results/`. [How the kernels work](kernels.md) has the plots.
`longscan bench kernels` measures the times again, on a machine with a CUDA GPU.

- The **floor** is the larger of bytes over the rate of a device copy and FLOPs over the rate of a large bf16 matrix
  product, both measured in the same run; each input is read once and each output written once.
- Times are medians of what the GPU spends, from a cold L2 cache. Forward and backward together are one figure.
- **Peak** is the memory above the inputs, outputs and gradients included.
- The newest figure of each kind stands. A time below the floor leaves work out that the floor counts: under ALiBi, keys
  too far away to weigh anything in fp32.
"""


def page() -> str:
    """The page of all benches but the kernels': a section a bench and device, a row a figure."""
    parts, section = [HEAD], None
    for figure in newest():
        if figure["bench"] in ELSEWHERE:
            continue
        if (figure["bench"], figure["device"]) != section:
            section = (figure["bench"], figure["device"])
            parts.append(f"\n## {figure['bench']}, {figure['device']}\n\n{_versions(figure)}\n")
            parts += _heading("work", "implementation", "metric", "value", "promised", "commit", "date")
        promised = "" if figure["floor"] is None else f"{figure['floor']:g}"
        value = f"{figure['value']:g} {figure['unit']}"
        parts.append(
            _row(
                figure["work"],
                figure["impl"],
                figure["metric"],
                value,
                promised,
                figure["commit"],
                figure["date"][:10],
            )
        )
    return "\n".join(parts) + "\n"


def kernels_page() -> str:
    """The page of the kernels: what was promised, every time, the tiles, and what the tools found."""
    parts, measured = [KERNELS_HEAD], timings()
    for device in dict.fromkeys(timing.device for timing in measured):
        here = [timing for timing in measured if timing.device == device]
        figures = [figure for figure in newest("kernels") if figure["device"] == device]
        parts.append(f"\n## {device}\n\n{_versions(figures[-1])}\n")
        parts += [_rate(figure) for figure in figures if figure["metric"] == "rate"]
        if "H100" in device:
            parts += ["\n### To reach, and reached\n", *_targets(here)]
        for op in dict.fromkeys(op_of(timing.work) for timing in here):
            parts += [f"\n### {op}\n", *_times([timing for timing in here if op_of(timing.work) == op])]
    parts += [TILES, *_tiles()]
    for bench, title, table in (
        ("first_call", "First call", _pivot),
        ("sanitize", "compute-sanitizer", _pivot),
        ("profile", "Counters", _counters),
    ):
        figures = newest(bench)
        if figures:
            parts += [f"\n## {title}\n", *table(figures)]
    return "\n".join(parts) + "\n"


TILES = """
## Tiles

No kernel tunes itself at run time: a first call compiles each kernel once for a dtype and a head dim, and Triton keeps
it on disk (`TRITON_CACHE_DIR`, `~/.triton` by default). These are the sizes in the code, the fastest of those that
`python -m benchmarks.kernels_<op> --tune` times on an H100.
"""


def _targets(measured: Sequence[Timing]) -> Iterator[str]:
    yield from _heading("work", "in", "fwd", "to reach", "fwd+bwd", "to reach", "")
    for target in TARGETS:
        found = target.reached(measured)
        unit = target.unit if target.unit in ("ms", "x floor") else f"x {target.unit}, same run"
        if found is None:
            name = target.work.replace("\\", "").strip("^")
            yield _row(name, unit, "", _number(target.forward), "", _number(target.both), "not measured")
            continue
        work = found.work + target.impl.removeprefix("longscan")
        bounds = _number(target.forward), _number(target.both)
        verdict = "reached" if found.met else "**not yet**"
        yield _row(work, unit, _number(found.forward), bounds[0], _number(found.both), bounds[1], verdict)


def _times(measured: Sequence[Timing]) -> Iterator[str]:
    yield from _heading(
        "work", "implementation", "fwd ms", "x floor", "fwd+bwd ms", "x floor", "peak MiB", "commit", "date"
    )
    work = None
    for timing in measured:
        name = "" if timing.work == work else timing.work
        work = timing.work
        impl = timing.impl if timing.memory_gib is None else f"{timing.impl}: beyond {timing.memory_gib:.0f} GiB"
        yield _row(
            name,
            f"**{impl}**" if timing.ours else impl,
            _number(timing.forward),
            _ratio(timing.forward_ratio),
            _number(timing.both),
            _ratio(timing.both_ratio),
            "" if timing.peak is None else f"{timing.peak:,.0f}",
            timing.commit,
            timing.date[:10],
        )


def _tiles() -> Iterator[str]:
    """The constants of the files of kernels that say how work is cut, as the source has them."""
    yield from _heading("op", "constant", "value")
    files = sorted(file for name in ("chain", "cuts", "hopper", "kernel") for file in ROOT.glob(f"kernels/*/{name}.py"))
    for file in (*files, ROOT / "kernels" / "partials.py"):
        op = file.stem if file.parent.name == "kernels" else file.parent.name
        for node in ast.parse(file.read_text()).body:
            for name, value in _constants(node):
                yield _row(op, f"`{name}`", f"`{value}`")


def _constants(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """(name, source) of an assignment of a tile, a whole number, or a table of them."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        target, value = node.target, node.value
    elif isinstance(node, ast.Assign):
        target, value = node.targets[0], node.value
    else:
        return
    pairs = [(target, value)]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=True))
    for name, part in pairs:
        if isinstance(part, ast.Dict):
            entries = zip(part.keys, part.values, strict=True)
            yield from (
                (f"{ast.unparse(name)}[{ast.unparse(key)}]", ast.unparse(entry)) for key, entry in entries if key
            )
        elif "Tile(" in ast.unparse(part) or (isinstance(part, ast.Constant) and isinstance(part.value, int)):
            yield ast.unparse(name), ast.unparse(part)


def _pivot(figures: Sequence[Figure]) -> Iterator[str]:
    """A row a work, a column a metric."""
    metrics = list(dict.fromkeys(figure["metric"] for figure in figures))
    units = {figure["metric"]: figure["unit"] for figure in figures}
    floors = {figure["metric"]: figure["floor"] for figure in figures if figure["floor"] is not None}
    yield _origin(figures)
    promised = (f", at most {floors[m]:g}" if m in floors else "" for m in metrics)
    yield from _heading("work", *(f"{m}, {units[m]}{most}" for m, most in zip(metrics, promised, strict=True)))
    for work in dict.fromkeys(figure["work"] for figure in figures):
        values = {figure["metric"]: figure["value"] for figure in figures if figure["work"] == work}
        yield _row(work, *(_number(values.get(metric)) for metric in metrics))


def _origin(figures: Sequence[Figure]) -> str:
    """The devices and commits of a table's figures, in the order of their rows, and the versions of the last."""
    devices, commits = ([*dict.fromkeys(figure[name] for figure in figures)] for name in ("device", "commit"))
    named = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{' and '.join(devices)}; {_versions(figures[-1])}; {named}\n"


def _counters(figures: Sequence[Figure]) -> Iterator[str]:
    """A row a kernel under the work it belongs to; what its warps wait for in one column, the commonest first."""
    yield _origin(figures)
    units = {figure["metric"]: figure["unit"] for figure in figures}
    names = ("launches", "time", "share of the work", "tensor pipe", "L2", "dram", "occupancy", "registers")
    shown = [name for name in names if name in units]
    heads = (f"{name}, {units[name]}" for name in shown[1:])
    yield from _heading("work", "kernel", shown[0], *heads, "waits, warps an issue")
    last = None
    for name in dict.fromkeys(figure["work"] for figure in figures):
        work, kernel = name.rsplit(": ", 1)
        values = {figure["metric"]: figure["value"] for figure in figures if figure["work"] == name}
        waits = sorted(((v, m.removeprefix("waits: ")) for m, v in values.items() if m.startswith("waits: ")))[::-1]
        told = ", ".join(f"{reason} {value:.1f}" for value, reason in waits[:3])
        yield _row("" if work == last else work, kernel, *(_number(values.get(metric)) for metric in shown), told)
        last = work


def _heading(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _rate(figure: Figure) -> str:
    return f"- {figure['work']}: {figure['value']:,.0f} {figure['unit']}"


def _versions(figure: Figure) -> str:
    return ", ".join(f"{name} {version}" for name, version in figure["versions"].items())


def main() -> None:
    """Writes the pages and the plots."""
    from . import small_models_page
    from .plot_kernels import draw

    measured = timings()
    (DOCS / "measured.md").write_text(page())
    (DOCS / "kernels-measured.md").write_text(kernels_page())
    small_models_page.write()
    files = [DOCS / "measured.md", DOCS / "kernels-measured.md", DOCS / small_models_page.PAGE]
    if measured:
        device = measured[-1].device
        files += draw([timing for timing in measured if timing.device == device], DOCS / "figures")
    shown = (DOCS / "kernels.md").read_text()
    for file in files:
        unseen = file.suffix == ".png" and f"(figures/{file.name})" not in shown
        print(f"wrote {file.relative_to(ROOT)}" + ("; docs/kernels.md does not show it yet" if unseen else ""))


if __name__ == "__main__":
    main()
