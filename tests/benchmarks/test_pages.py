"""The pages and plots of the kernels, from made-up results; and what the hand-written page shows."""

import re

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from longscan.benchmarks import report
from longscan.benchmarks.figures import timings
from longscan.benchmarks.pictures import INK, save
from longscan.benchmarks.plot_kernels import draw


def times(work: str, impl: str, forward: float, both: float) -> list[dict]:
    line = {"work": work, "impl": impl, "floor": 1.0}
    peak = {"work": work, "impl": impl, "metric": "fwd+bwd peak above inputs", "value": 64.0, "unit": "MiB"}
    return [{**line, "metric": "fwd", "value": forward}, {**line, "metric": "fwd+bwd", "value": both}, peak]


def lines() -> list[dict]:
    found = [{"work": "device copy 1 GiB", "impl": "torch 2", "metric": "rate", "value": 3000.0, "unit": "GB/s"}]
    for tokens, scale in ((2048, 1), (32768, 16), (131072, 64)):
        work = f"linear_scan (1, {tokens}, 2560) bf16"
        found += times(work, "longscan", 1.05 * scale, 1.2 * scale)
        if tokens < 131072:
            found += times(work, "accelerated-scan 0.3.1 (B, D, T)", 1.1 * scale, 1.3 * scale)
    return found + times("linear_cross_entropy 16384 x 2560 x 32000 bf16", "longscan", 1.0, 1.05)


COUNTERS = [("launches", 1, "launches"), ("time", 267, "us"), ("share of the work", 32, "%"), ("tensor pipe", 1, "%"),
            ("L2", 84.5, "%"), ("dram", 75, "%"), ("occupancy", 47, "%"), ("registers", 64, "a thread"),
            ("waits: wait", 1.9, "warps an issue"), ("waits: barrier", 7, "warps an issue")]  # fmt: skip


def test_the_page_tells_what_was_promised_and_every_time(results):
    results(
        *lines(),
        {"work": "w", "impl": "longscan", "metric": "fwd+bwd", "value": 1.0, "bench": "prepare"},
        {"work": "rg_lru: _forward", "impl": "longscan", "metric": "memcheck errors", "value": 0, "unit": "errors",
         "floor": 0, "bench": "sanitize"},
        *({"work": "rg_lru: _forward", "impl": "longscan", "metric": metric, "value": value, "unit": unit,
           "bench": "profile"} for metric, value, unit in COUNTERS),
    )  # fmt: skip
    page = report.kernels_page()
    assert "| linear_cross_entropy 16384 x 2560 x 32000 bf16 | x floor | 1 |  | 1.05 | 1.1 | reached |" in page
    assert "| linear_scan (1, 32768, 2560) bf16 | x floor | 16.8 | 1.1 | 19.2 | 1.25 | **not yet** |" in page
    assert "|  | accelerated-scan 0.3.1 (B, D, T) | 1.1 | 1.10 | 1.3 | 1.30 | 64 | c | 2026-01-01 |" in page
    assert "| rg_lru (1, 32768, 2560) | x floor |  | 1.2 |  | 1.35 | not measured |" in page
    assert "| rg_lru: _forward | 0 |" in page
    assert "memcheck errors, errors, at most 0" in page
    assert "| rg_lru | _forward | 1 | 267 | 32 | 1 | 84.5 | 75 | 47 | 64 | barrier 7.0, wait 1.9 |" in page
    assert "| rg_lru | `FORWARD` | `(Tile(" in page
    assert "prepare" not in page
    assert "prepare" in report.page()
    assert "linear_scan" not in report.page()


def test_a_picture_keeps_the_colours_of_a_few_points(tmp_path):
    figure = Figure(figsize=(9, 9), dpi=110)
    axis = figure.add_subplot()
    few = ("#009e73", "#e69f00", "#cc79a7", "#d55e00")
    for row in range(60):
        axis.plot([row % 7, 9], [row, row], "o", color="#0072b2")
        axis.text(3, row, f"attention window {row}", color=INK, fontsize=8)
    for row, colour in enumerate(few):
        axis.plot(8, row, "o", color=colour)
    save(figure, tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in few:
        away = abs(pixels - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(-1)
        assert (away <= 3).sum() > 20, colour


def test_plots_are_of_what_is_there(results, tmp_path):
    results(*lines())
    files = draw(timings(), tmp_path / "figures")
    assert [file.name for file in files] == ["linear_scan.png", "overview.png"]
    assert all(1000 < file.stat().st_size < 200_000 for file in files)
    first = files[0].read_bytes()
    draw(timings(), tmp_path / "figures")
    assert files[0].read_bytes() == first


def test_the_page_of_the_kernels_shows_pictures_that_exist():
    page = (report.DOCS / "kernels.md").read_text()
    shown = re.findall(r"\]\((figures/\S+)\)", page)
    assert "figures/overview.png" in shown
    assert all((report.DOCS / name).exists() for name in shown)
