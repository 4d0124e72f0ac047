"""Stops a run whose loss is no longer a number or has exploded, before the bad step reaches the weights."""

from __future__ import annotations

import math

from ...errors import UserError
from .schedule import Step

# The running loss forgets at this rate a step; it judges nothing before it has seen this many steps.
SMOOTHING = 0.05
STEPS_BEFORE_JUDGING = 20


class LossGuard:
    """Compares each step's loss with a running mean of the steps before.

    Args:
        max_ratio: a loss above this multiple of the running mean stops the run; 0 leaves only the check for numbers.
    """

    def __init__(self, max_ratio: float):
        self.max_ratio = max_ratio
        self.mean = 0.0
        self.seen = 0

    def check(
        self, step: Step, rows: tuple[int, int], loss: float, grad_norm: float | None, last_checkpoint: str | None
    ) -> None:
        """Raises UserError where the step must not be trusted: call before (loss) and after (norm) the update.

        Args:
            step: the step.
            rows: its first and last row as the data plan numbers them, the way data.skipped_rows does.
            loss: per token.
            grad_norm: None before the update.
            last_checkpoint: its name, None where there is none.
        """
        trouble = None
        if not math.isfinite(loss):
            trouble = f"the loss is {loss}"
        elif grad_norm is not None and not math.isfinite(grad_norm):
            trouble = f"the gradient norm is {grad_norm} (the update was left out)"
        elif self.max_ratio and self.seen >= STEPS_BEFORE_JUDGING and loss > self.max_ratio * self.mean:
            trouble = f"the loss {loss:.3f} is over {self.max_ratio:g} times the running mean {self.mean:.3f}"
        if trouble:
            first, last = rows
            good = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
            raise UserError(
                f"stopped at step {step.number}: {trouble}. Rows {first} to {last} of stage {step.stage} were "
                f"in it; {good}. Lower optimizer.lr, or leave the rows out with "
                f"data.skipped_rows=[{step.stage}:{first}-{last}], and start again."
            )

    def accept(self, loss: float) -> None:
        """Counts the loss of a step that was kept."""
        self.mean = loss if not self.seen else self.mean + SMOOTHING * (loss - self.mean)
        self.seen += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, so that a resumed run judges as the uninterrupted one would."""
        return {"mean": self.mean, "seen": self.seen}

    def restore(self, state: dict[str, float]) -> None:
        """Takes over a checkpoint's `state`."""
        self.mean, self.seen = float(state["mean"]), int(state["seen"])
