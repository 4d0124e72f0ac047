import math

import pytest

from longscan.errors import UserError
from longscan.launcher.config import BatchConfig, Config, OptimizerConfig, ScheduleConfig, StageConfig
from longscan.launcher.training.guard import STEPS_BEFORE_JUDGING, LossGuard
from longscan.launcher.training.schedule import Step, TrainingSchedule, lr_factor


def config(**batch) -> Config:
    return Config(
        stages=[StageConfig(seq_len=8, tokens=1000), StageConfig(seq_len=32, tokens=640, lr_scale=0.5, micro_rows=1)],
        batch=BatchConfig(**{"tokens": 64, "micro_rows": 3, **batch}),
        optimizer=OptimizerConfig(lr=0.1),
        schedule=ScheduleConfig(warmup_steps=4, kind="cosine", final_ratio=0.1),
    )


@pytest.mark.parametrize("batch", [{}, {"ramp_from": 16, "ramp_steps": 5}, {"ramp_from": 16, "ramp_steps": 20}])
def test_steps_tile_each_stage(batch):
    schedule = TrainingSchedule(config(**batch))
    steps = list(schedule.steps(after=0))
    assert [step.number for step in steps] == list(range(1, schedule.total_steps + 1))
    for stage, rows in enumerate(schedule.stage_rows()):
        mine = [step for step in steps if step.stage == stage]
        assert [s.first_row for s in mine] == [sum(p.rows for p in mine[:i]) for i in range(len(mine))]
        assert sum(s.rows for s in mine) == rows
        tokens = [1000, 640][stage]
        assert tokens <= sum(s.tokens for s in mine) < tokens + 64


def test_the_ramp_grows_and_ends():
    steps = list(TrainingSchedule(config(ramp_from=16, ramp_steps=5)).steps(after=0))
    assert [step.rows for step in steps[:7]] == [2, 3, 4, 5, 6, 8, 8]


def test_resuming_gives_the_same_steps():
    schedule = TrainingSchedule(config(ramp_from=16, ramp_steps=5))
    assert list(schedule.steps(after=11)) == list(schedule.steps(after=0))[11:]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 8])
def test_rows_are_dealt_once_to_any_number_of_replicas(replicas):
    step = Step(number=1, stage=0, seq_len=8, first_row=40, rows=11, micro_rows=3, lr=0.1)
    shares = [step.micro_batches(replica, replicas) for replica in range(replicas)]
    dealt = [row for share in shares for part in share for row in part if row is not None]
    assert sorted(dealt) == list(range(40, 51))
    assert {len(share) for share in shares} == {math.ceil(4 / replicas)}


def test_learning_rates():
    schedule = ScheduleConfig(warmup_steps=10, kind="cosine", final_ratio=0.1)
    assert lr_factor(schedule, 1, 110) == pytest.approx(0.1)
    assert lr_factor(schedule, 10, 110) == pytest.approx(1.0)
    assert lr_factor(schedule, 60, 110) == pytest.approx(0.55)
    assert lr_factor(schedule, 110, 110) == pytest.approx(0.1)
    linear = ScheduleConfig(warmup_steps=0, kind="linear", final_ratio=0.0)
    assert lr_factor(linear, 25, 100) == pytest.approx(0.75)
    wsd = ScheduleConfig(warmup_steps=10, kind="wsd", final_ratio=0.0, decay_share=0.2)
    assert lr_factor(wsd, 80, 100) == pytest.approx(1.0)
    assert lr_factor(wsd, 90, 100) == pytest.approx(0.5)
    assert lr_factor(wsd, 100, 100) == pytest.approx(0.0)


def test_stage_factor_scales_the_rate():
    schedule = TrainingSchedule(config())
    step = schedule.step(schedule.total_steps)
    assert step.stage == 1 and step.lr == pytest.approx(0.1 * 0.5 * 0.1)


STEP = Step(number=25, stage=0, seq_len=8, first_row=40, rows=11, micro_rows=3, lr=0.1)


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [(math.nan, None, "loss is nan"), (9.0, None, "3 times the running mean"), (2.0, math.inf, "gradient norm is inf")],
)
def test_the_guard_names_step_rows_and_checkpoint(loss, norm, said):
    guard = LossGuard(3.0)
    for _ in range(STEPS_BEFORE_JUDGING):
        guard.accept(2.0)
    with pytest.raises(UserError) as raised:
        guard.check(STEP, (40, 50), loss, norm, "step-20")
    for part in (said, "step 25", "Rows 40 to 50 of stage 0", "step-20", "0:40-50"):
        assert part in str(raised.value)


def test_the_guard_judges_late_and_remembers():
    guard, other = LossGuard(3.0), LossGuard(3.0)
    guard.accept(1.0)
    guard.check(STEP, (40, 50), 100.0, None, None)
    other.restore(guard.state())
    assert other.state() == guard.state()
