"""Ranks that die or hang while others wait for them in a collective are named in time; signals to all save."""

import os
import signal
import subprocess
import sys
import time

import pytest

from longscan.launcher.run_folder import RunFolder

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

TIMEOUT = 20
LAYOUTS = {
    "replicas": ["run.workers=2", "parallel.zero=0"],
    "sharded": ["run.workers=2", "parallel.zero=1"],
    "pieces": ["run.workers=2", "parallel.context=2"],
}


@pytest.fixture
def running(corpus, tmp_path):
    """Starts a run; gives its process and the process number of each rank once they have trained a few steps."""
    processes = []

    def start(layout):
        folder = tmp_path / "run"
        options = [f"data.corpora=[{corpus}]", "stages.0.tokens=10M", "run.device=cpu", "run.launcher=ray", *layout]
        command = [sys.executable, "-m", "longscan.launcher.cli", "train", "griffin-tiny", "--run", str(folder)]
        command += [*options, f"run.timeout_seconds={TIMEOUT}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        deadline = time.monotonic() + 150
        while not (folder / "ledger.jsonl").exists() or (folder / "ledger.jsonl").read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.05)
        (formed,) = [event for event in RunFolder.open(folder).events.read() if event["event"] == "formed"]
        return process, [worker["pid"] for worker in formed["workers"]]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ending(process):
    """(exit code, what was shown, seconds until the end)."""
    begin = time.monotonic()
    _, shown = process.communicate(timeout=120)
    return process.returncode, " ".join(shown.split()), time.monotonic() - begin


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_dies_inside_a_collective_is_named(running, layout):
    process, pids = running(LAYOUTS[layout])
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(2)  # Now rank 1 waits for rank 0.
    os.kill(pids[1], signal.SIGKILL)
    os.kill(pids[0], signal.SIGCONT)
    code, shown, seconds = ending(process)
    assert code == 1
    assert f"rank 1 (pid {pids[1]}" in shown and "the same command resumes" in shown
    assert "Traceback" not in shown
    assert seconds < TIMEOUT + 30


@pytest.mark.parametrize(("layout", "rank"), [("replicas", 0), ("sharded", 1), ("pieces", 1)])
def test_a_rank_that_hangs_is_named_and_leaves_nothing_behind(running, layout, rank):
    process, pids = running(LAYOUTS[layout])
    os.kill(pids[rank], signal.SIGSTOP)
    code, shown, seconds = ending(process)
    assert code == 1
    assert f"rank {rank} (pid {pids[rank]}" in shown and f"run.timeout_seconds={TIMEOUT}" in shown
    assert "the same command resumes" in shown and "Traceback" not in shown
    assert seconds < TIMEOUT + 45
    for pid in pids:
        assert gone(pid), f"process {pid} is still there"


def gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_sigterm_to_the_whole_process_group_saves(running, tmp_path):
    process, _ = running(LAYOUTS["sharded"])
    os.killpg(process.pid, signal.SIGTERM)
    code, shown, _ = ending(process)
    assert code == 0, shown
    assert "saved step-" in shown and list((tmp_path / "run" / "checkpoints").glob("step-*"))
