"""Writes `docs/measured.md` from the figures in `results/`: `python -m benchmarks.report`. Never edited by hand."""

from __future__ import annotations

import json

from .record import RESULTS, ROOT

PAGE = ROOT / "docs" / "measured.md"
HEAD = """# What was measured

Made by `python -m benchmarks.report` from `benchmarks/results/`; `python -m benchmarks.<bench>` measures a bench again.
The newest figure of each kind stands. Machines are shared: read ratios and medians, not single times.
"""


def newest() -> dict[tuple[str, str, str, str, str], dict]:
    """The last figure recorded of each bench, device, work, implementation and metric, in the order recorded."""
    figures: dict[tuple[str, str, str, str, str], dict] = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            figure = json.loads(line)
            key = (figure["bench"], figure["device"], figure["work"], figure["impl"], figure["metric"])
            figures[key] = figure
    return figures


def page() -> str:
    """The page: a section a bench and device, a row a figure."""
    parts, section = [HEAD], None
    for (bench, device, *_), figure in newest().items():
        if (bench, device) != section:
            section = (bench, device)
            versions = ", ".join(f"{name} {version}" for name, version in figure["versions"].items())
            parts.append(f"\n## {bench}, {device}\n\n{versions}\n")
            parts.append("| work | implementation | metric | value | promised | commit | date |")
            parts.append("|---|---|---|---|---|---|---|")
        promised = "" if figure["floor"] is None else f"{figure['floor']:g}"
        value = f"{figure['value']:g} {figure['unit']}"
        cells = (
            figure["work"],
            figure["impl"],
            figure["metric"],
            value,
            promised,
            figure["commit"],
            figure["date"][:10],
        )
        parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
