"""Real Ray workers: the same run as inline, the wish to stop, a worker that dies. Each start costs seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longscan.errors import ConfigError, UserError
from longscan.launcher.elastic.supervisor import _failure, train
from longscan.launcher.run_folder import RunFolder

pytestmark = pytest.mark.timeout(240)

RAY = ("run.launcher=ray", "run.workers=2")


def rows(folder) -> list[list[int]]:
    return [record["rows"] for record in RunFolder.open(folder).ledger.standing()]


def losses(folder) -> list[float]:
    return [record["loss"] for record in RunFolder.open(folder).metrics.standing()]


def start(config_overrides: list[str], folder: Path) -> subprocess.Popen:
    """The command line in a process of its own, as a user or a scheduler runs it."""
    command = [
        sys.executable,
        "-m",
        "longscan.launcher.cli",
        "train",
        "griffin-tiny",
        "run.device=cpu",
        *config_overrides,
    ]
    return subprocess.Popen([*command, "--run", str(folder)], stderr=subprocess.PIPE, text=True)


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ledger = folder / "ledger.jsonl"
        if ledger.exists() and ledger.read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come in {seconds} s")


def test_two_workers_stop_and_resume_as_one_run(tiny):
    config, alone = tiny(*RAY), tiny(run="alone")
    assert train(config, stop_at=10).status == "stopped"
    assert train(config).status == "finished"
    train(alone)
    folder = config.run.folder
    assert rows(folder) == rows(alone.run.folder)
    assert losses(folder) == pytest.approx(losses(alone.run.folder), rel=1e-5)
    formed = [event for event in RunFolder.open(folder).events.read() if event["event"] == "formed"]
    assert [len({worker["pid"] for worker in event["workers"]}) for event in formed] == [2, 2]
    assert {worker["address"] for event in formed for worker in event["workers"]} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(tiny):
    """Stages of layers, then pieces of rows, then stages again: one loss curve, the one of a single worker."""
    layouts = ("parallel.pipeline=2", "run.activation_checkpoint=selective"), ("parallel.context=2",)
    for stop, layout in enumerate([*layouts, ("parallel.pipeline=2", "parallel.stage_layers=[2,1]")], start=1):
        config = tiny(*RAY, *layout, "validation.every=2")
        train(config, stop_at=2 * stop)
    alone = tiny(run="alone")
    train(alone, stop_at=6)
    assert losses(config.run.folder) == pytest.approx(losses(alone.run.folder), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_one_signal_saves_and_leaves_with_0(corpus, tmp_path, number):
    launcher = RAY if number == signal.SIGTERM else ()
    overrides = [f"data.corpora=[{corpus}]", "stages.0.tokens=10M", *launcher]
    process = start(overrides, tmp_path / "run")
    wait_for_step(tmp_path / "run", 12)
    process.send_signal(number)
    _, shown = process.communicate(timeout=90)
    assert process.returncode == 0, shown
    last = rows(tmp_path / "run")[-1]
    steps = [int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(steps) * 16 == last[1], "the step in progress was trained, saved and is the last of the ledger"
    assert "stopped" in shown


def test_two_signals_leave_at_once(corpus, tmp_path):
    process = start([f"data.corpora=[{corpus}]", "stages.0.tokens=10M", *RAY], tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_a_dead_worker_is_named_and_the_run_resumes(corpus, tmp_path):
    overrides = [f"data.corpora=[{corpus}]", *RAY]
    process = start([*overrides, "stages.0.tokens=10M"], tmp_path / "run")
    wait_for_step(tmp_path / "run", 12)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    victim = next(worker for worker in events[0]["workers"] if worker["rank"] == 1)
    os.kill(victim["pid"], signal.SIGKILL)
    _, shown = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"rank 1 (pid {victim['pid']}" in shown and "the same command resumes" in shown
    assert "Traceback" not in shown
    again = start([*overrides, "stages.0.tokens=20480"], tmp_path / "run")
    _, shown = again.communicate(timeout=120)
    assert again.returncode == 0, shown
    assert "resumed from step-" in shown
    ledger = rows(tmp_path / "run")
    assert [r[0] for r in ledger] == [0] + [r[1] for r in ledger[:-1]]


def test_more_workers_than_the_cluster_holds_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"2 workers need a GPU each and this machine has 0; set run\.device=cpu"):
        train(tiny(*RAY, "run.device=cuda"))


def test_a_cluster_that_is_not_there(tiny, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot reach the Ray cluster at RAY_ADDRESS=127\.0\.0\.1:1"):
        train(tiny(*RAY))


def test_the_first_cause_is_shown():
    places = [{"pid": 10 + rank, "host": "h"} for rank in range(3)]
    peers = {0: RuntimeError("connection closed by peer"), 2: RuntimeError("The actor died unexpectedly")}
    assert "rank 2 (pid 12 on h)" in str(_failure(peers, places))
    hangs = _failure({0: RuntimeError("timed out")}, places, silent={1}, timeout=20.0)
    assert "rank 1 (pid 11 on h) failed: it does not answer, and rank 0 waited run.timeout_seconds=20" in str(hangs)
    assert str(_failure({**peers, 1: UserError("stopped at step 3")}, places)) == "stopped at step 3"
