"""The host's time without a GPU: kernels are reached and launch nothing."""

import subprocess
import sys

from longscan.benchmarks.record import ROOT


def test_a_profile_shows_the_launch():
    command = [sys.executable, "-m", "benchmarks.host_time", "--profile", "rotary"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kernels/rotary/kernel.py" in done.stderr and "runtime/jit.py" in done.stderr


def test_names_are_checked():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host_time", "rotery"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "rotery: expected some of attention, " in done.stderr
