"""What a step of the demo costs beside its forward pass, backward pass and optimiser.

    python -m benchmarks.trainer_overhead [CORPUS]

Runs the demo's configuration inline for some steps and takes the time of `Engine.forward_backward` and `Engine.update`
from the time of the whole step, medians over the steps after the first five. Promised: at most 5%.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longscan.launcher.config import resolve
from longscan.launcher.elastic.supervisor import train
from longscan.launcher.run_folder import RunFolder
from longscan.launcher.validate import check_run
from longscan.parallel import Engine

from .record import record

STEPS, WARM_UP = 30, 5


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method, adding the duration of each call to `seconds`."""

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def main(corpus: str) -> None:
    """Measures over the corpus at `corpus` and records the figures."""
    passes: list[float] = []
    updates: list[float] = []
    Engine.forward_backward = timed(Engine.forward_backward, passes)  # type: ignore[method-assign]
    Engine.update = timed(Engine.update, updates)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        overrides = [f"data.corpora=[{corpus}]", f"run.folder={folder}", "run.launcher=inline", "run.workers=1"]
        config, _ = check_run(resolve("griffin-demo", [*overrides, "validation.every=0"]))
        train(config, stop_at=STEPS)
        steps = [line["step_seconds"] for line in RunFolder.open(folder).metrics.read()]
    work = f"griffin-demo, {config.batch.tokens} tokens a step, inline"
    shares = [(step - forward - update) / step for step, forward, update in zip(steps, passes, updates, strict=True)][
        WARM_UP:
    ]
    record("trainer_overhead", work, "longscan", "step", statistics.median(steps[WARM_UP:]), "s")
    record("trainer_overhead", work, "longscan", "overhead", statistics.median(shares), "share of the step", floor=0.05)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".demo/corpus")
