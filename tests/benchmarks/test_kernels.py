"""`longscan bench kernels`: its table, its JSON, and what it says where it cannot run."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from longscan.benchmarks import kernels
from longscan.benchmarks.first_call import small
from longscan.benchmarks.kernels import GROUPS, Measured, Row
from longscan.launcher import cli


@pytest.fixture
def longscan(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        captured = capsys.readouterr()
        return exit.value.code, captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


ROWS = [
    Row("scan [1]", "slow 1.0", 2.0, 8.0, 1.0, 2.0, 300.0),
    Row("scan [1]", "longscan", 1.0, 3.0, 1.0, 2.0, 1234.5, 4.0, 5.0),
    Row("scan [1]", "large 2.0", error="does not fit in 79 GiB"),
    Row("step", "longscan", 0.5, None, 0.25, None, 1.0),
]


def test_ours_come_first(monkeypatch):
    assert [row.impl for row in Measured(ROWS).sorted()] == ["longscan", "slow 1.0", "large 2.0", "longscan"]


def test_the_table_tells_times_ratios_and_what_did_not_fit():
    console = Console(file=io.StringIO(), width=120, highlight=False)
    Measured(ROWS).show(console)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[1:] == [
        "scan [1]",
        "longscan 1 1.00 3 1.50 1,234",
        "slow 1.0 2 2.00 8 4.00 300",
        "large 2.0: does not fit in 79 GiB",
        "step",
        "longscan 0.5 2.00 1",
    ]


def test_json_has_an_object_a_row():
    objects = json.loads(json.dumps(Measured(ROWS).to_json(), allow_nan=False))
    assert objects[0]["work"] == "scan [1]"
    assert objects[0]["both"] == 3.0
    assert objects[2]["error"] == "does not fit in 79 GiB"


def test_a_line_of_progress_tells_what_compiling_took():
    told = "scan [1] | longscan: fwd 1 ms = 1.00 x floor, fwd+bwd 3 ms = 1.50 x floor; 5.0 s (4.0 s to compile)"
    assert ROWS[1].line() == told


def test_only_ours_can_fail_the_bench():
    assert Measured(ROWS).failed == []
    assert Measured([Row("w", "longscan", error="no")]).failed == ["w"]


def test_a_group_that_breaks_leaves_a_row(monkeypatch):
    def works():
        yield kernels.Work("w", [], torch.ones, 1, 1)
        raise torch.OutOfMemoryError("inputs")

    monkeypatch.setitem(sys.modules, f"{kernels.__package__}.kernels_broken", SimpleNamespace(works=works))
    monkeypatch.setattr(kernels, "_memory_gib", lambda: 79.2)
    rows = []
    assert [work.name for work in kernels._works(["broken"], False, rows)] == ["w"]
    assert [row.error for row in rows] == ["does not fit in 79 GiB"]


def test_without_a_gpu_it_fails_with_a_sentence(longscan, no_gpu):
    code, out, err = longscan("bench", "kernels")
    assert (code, out) == (1, "")
    assert err.startswith("error: PyTorch sees no GPU")


def test_an_unknown_op_is_bad_usage(longscan, no_gpu):
    code, out, err = longscan("bench", "kernels", "scams")
    assert (code, out) == (2, "")
    assert "no benchmark 'scams'" in err
    assert ", ".join(GROUPS) in err


def test_an_installed_longscan_has_no_benches_and_says_so(longscan, monkeypatch):
    monkeypatch.delattr("longscan.benchmarks", raising=False)
    monkeypatch.setitem(sys.modules, "longscan.benchmarks", None)
    code, out, err = longscan("bench", "kernels")
    assert (code, out) == (1, "")
    assert "clone" in err
    assert "Traceback" not in err


def test_the_command_prints_what_was_measured(longscan, monkeypatch):
    monkeypatch.setattr(kernels, "run", lambda groups, quick: Measured(ROWS) if quick and list(groups) else None)
    code, out, _ = longscan("bench", "kernels", "scans", "--quick", "--json")
    assert code == 0
    assert len(json.loads(out)) == len(ROWS)


def test_the_first_call_is_of_every_mixer():
    assert small("griffin-1.3b").mixers == ["rg_lru", "rg_lru", "local_attention"]
