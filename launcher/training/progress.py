"""What a person watching a run sees: one live line on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

SECONDS_BETWEEN_LOG_LINES = 10.0


class Progress:
    """Shows reports of rank 0 on standard error. Use as a context manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = Live(Text(""), console=self.console, refresh_per_second=8, transient=False)
        self.is_live = self.console.is_terminal
        self.last_line = 0.0
        self.begun: tuple[float, int] | None = None

    def __enter__(self) -> Progress:
        if self.is_live:
            self.live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_live:
            self.live.__exit__(None, None, None)

    def show(self, report: dict[str, Any]) -> None:
        """Draws one report: a step moves the live line, everything else is a line of its own."""
        kind = report["kind"]
        if kind == "step":
            self._step(report)
        elif kind == "note":
            self.console.print(report["text"], style="dim", markup=False)
        elif kind == "warning":
            self.console.print(f"warning: {report['text']}", style="yellow", markup=False)
        else:
            raise AssertionError(f"unknown report {kind!r}")

    def _step(self, report: dict[str, Any]) -> None:
        line = step_line(report, self._remaining(report))
        if self.is_live:
            self.live.update(Text(line))
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LOG_LINES or report["step"] == report["total_steps"]:
            self.last_line = time.monotonic()
            self.console.print(line, markup=False)

    def _remaining(self, report: dict[str, Any]) -> float | None:
        """Seconds to the end at the pace since the first step shown (which is left out: it compiles and warms up)."""
        now, step = time.monotonic(), report["step"]
        if self.begun is None:
            self.begun = (now, step)
        seconds, steps = now - self.begun[0], step - self.begun[1]
        return (report["total_steps"] - step) * seconds / steps if steps else None


def step_line(report: dict[str, Any], remaining: float | None) -> str:
    """The progress line of a step report."""
    if report.get("bits_per_byte") is not None:
        loss = f"{report['bits_per_byte']:.3f} bits/byte"
    else:
        loss = f"loss {report['loss']:.4f}"
    parts = [f"step {report['step']}/{report['total_steps']}", loss, f"{report['tokens_per_second']:,.0f} tokens/s"]
    if report.get("mfu") is not None:
        parts.append(f"mfu {report['mfu']:.1%}")
    parts += [f"lr {report['lr']:.2e}", f"grad {report['grad_norm']:.2f}"]
    parts.append(f"eta {_clock(remaining)}" if remaining is not None else "eta -")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
