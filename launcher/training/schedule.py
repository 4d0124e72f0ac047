"""Which rows and which learning rate each step has: pure functions of the configuration, computed once.

A step takes consecutive rows of one stage. The batch is constant in tokens, so its rows shrink as sequences grow, and
it may ramp up over the first steps. Replicas are not mentioned here: how many share a step never changes its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ..config import Config, ScheduleConfig


@dataclass(frozen=True)
class Step:
    """Step number `number` (from 1) trains rows `first_row` to `first_row + rows` (exclusive) of `stage`."""

    number: int
    stage: int
    seq_len: int
    first_row: int
    rows: int
    micro_rows: int
    lr: float

    @property
    def tokens(self) -> int:
        """Positions trained in this step."""
        return self.rows * self.seq_len

    def micro_batches(self, replica: int, replicas: int) -> list[list[int | None]]:
        """The rows of each micro-batch of one replica.

        Micro-batches are dealt out in turn; replicas that get one fewer receive a dummy (rows None), which trains
        nothing, so that all make the same number of calls whatever their count.
        """
        rows = range(self.first_row, self.first_row + self.rows)
        parts = [list(rows[i : i + self.micro_rows]) for i in range(0, len(rows), self.micro_rows)]
        each = math.ceil(len(parts) / replicas)
        mine: list[list[int | None]] = [list(part) for part in parts[replica::replicas]]
        return [*mine, *([None] for _ in range(each - len(mine)))]


@dataclass(frozen=True)
class StageSteps:
    """The steps of one stage: `ramp` holds the rows of those that fall into the batch ramp, the rest take `rows`."""

    first_step: int
    steps: int
    seq_len: int
    ramp: tuple[int, ...]
    rows: int
    micro_rows: int
    lr_scale: float

    def rows_of(self, index: int) -> int:
        """Rows of the stage's step `index` (from 0)."""
        return self.ramp[index] if index < len(self.ramp) else self.rows

    def rows_before(self, index: int) -> int:
        """Rows of the stage's steps before `index`."""
        within = min(index, len(self.ramp))
        return self._ramped[within] + (index - within) * self.rows

    @cached_property
    def _ramped(self) -> list[int]:
        return list(accumulate(self.ramp, initial=0))


class TrainingSchedule:
    """All steps of a run."""

    def __init__(self, config: Config):
        self.schedule = config.schedule
        self.peak_lr = config.optimizer.lr
        self.stages: list[StageSteps] = []
        step = 0
        for stage in config.stages:
            full = max(1, config.batch.tokens // stage.seq_len)
            ramp, seen = [], 0
            while step + len(ramp) < config.batch.ramp_steps and seen < stage.tokens:
                ramp.append(max(1, _ramped(config, step + len(ramp)) // stage.seq_len))
                seen += ramp[-1] * stage.seq_len
            rest = math.ceil(max(0, stage.tokens - seen) / (full * stage.seq_len))
            steps = len(ramp) + rest
            micro_rows = stage.micro_rows or config.batch.micro_rows
            self.stages.append(StageSteps(step, steps, stage.seq_len, tuple(ramp), full, micro_rows, stage.lr_scale))
            step += steps
        self.total_steps = step

    def stage_rows(self) -> list[int]:
        """How many rows each stage trains."""
        return [stage.rows_before(stage.steps) for stage in self.stages]

    def step(self, number: int) -> Step:
        """Step `number`, 1 <= number <= total_steps."""
        assert 1 <= number <= self.total_steps, f"step {number} of {self.total_steps}"
        index = max(i for i, stage in enumerate(self.stages) if stage.steps and stage.first_step < number)
        stage = self.stages[index]
        within = number - 1 - stage.first_step
        lr = self.peak_lr * stage.lr_scale * lr_factor(self.schedule, number, self.total_steps)
        return Step(
            number, index, stage.seq_len, stage.rows_before(within), stage.rows_of(within), stage.micro_rows, lr
        )

    def steps(self, after: int, last: int | None = None) -> Iterator[Step]:
        """The steps that follow step `after` (0: from the first) up to `last` (None: the last of all)."""
        return (self.step(number) for number in range(after + 1, (last or self.total_steps) + 1))


def _ramped(config: Config, step: int) -> int:
    batch = config.batch
    return batch.ramp_from + (batch.tokens - batch.ramp_from) * step // batch.ramp_steps


def lr_factor(schedule: ScheduleConfig, number: int, total: int) -> float:
    """The learning rate of step `number` of `total` as a share of the peak: warm-up, then the schedule's kind.

    `wsd` (warm-up, stable, decay) holds the peak until the last `decay_share` of the steps and falls linearly there.
    """
    if number <= schedule.warmup_steps:
        return number / schedule.warmup_steps
    done = (number - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    final = schedule.final_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "linear":
        return 1 - (1 - final) * done
    if schedule.kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    assert schedule.kind == "wsd", schedule.kind
    begin = 1 - schedule.decay_share * total / max(1, total - schedule.warmup_steps)
    return 1.0 if done <= begin else 1 - (1 - final) * (done - begin) / (1 - begin)
