"""Reading the logs of compute-sanitizer and the tables of ncu."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from longscan.benchmarks import profile_kernels, sanitize
from longscan.benchmarks.gpu_timing import Work
from longscan.benchmarks.profile_kernels import FORBIDDEN, Launch, launches_in, note, plan, profile, run_work, together
from longscan.benchmarks.sanitize import errors_in
from longscan.kernels.dispatch import KERNELS

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at _forward+0x1230 in /a/kernels/linear_scan/kernel.py:240
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f8a40000000 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch in /a/launcher.so
=========
========= Invalid __global__ read of size 2 bytes
=========     at 0x150 in _forward
=========     by thread (3,0,0) in block (0,0,0)
=========
========= Program hit CUDA_ERROR_ILLEGAL_ADDRESS (error 700) due to "an illegal memory access" on CUDA API call
========= ERROR SUMMARY: 203 errors
========= ERROR SUMMARY: 100 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _states+0x130 in /a/kernel.py:8
=========     and Read access at _states+0x150 in /a/kernel.py:9 [34 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_errors_are_counted_by_kernel():
    assert errors_in(MEMCHECK) == {"_forward": 2, "": 201}
    assert errors_in(RACECHECK) == {"_states": 1}
    assert errors_in("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == {}


def test_a_log_without_a_summary_is_not_clean():
    with pytest.raises(ValueError, match="no summary"):
        errors_in("========= COMPUTE-SANITIZER\n========= Error: device not supported\n")


@pytest.mark.parametrize(("errors", "clean"), [({}, True), ({"_forward": 2}, False), ({"": 1}, False)])
def test_findings_are_recorded_by_kernel(errors, clean, monkeypatch):
    put = []
    monkeypatch.setattr(sanitize, "record", lambda bench, work, impl, metric, value, *_: put.append((work, value)))
    finding = sanitize.Finding("rg_lru", {"_forward"}, sanitize.Counter(errors))
    finding |= sanitize.Finding("rg_lru", {"_backward"}, sanitize.Counter())
    assert sanitize.note(finding, "memcheck") is clean
    assert put == [
        ("rg_lru: _backward", 0),
        ("rg_lru: _forward", errors.get("_forward", 0)),
        ("rg_lru: all other kernels and calls", errors.get("", 0)),
    ]


def test_a_run_without_kernels_is_not_clean(monkeypatch):
    monkeypatch.setattr(sanitize, "record", lambda *_: pytest.fail("nothing was found"))
    assert not sanitize.note(sanitize.Finding("rg_lru", set(), sanitize.Counter()), "memcheck")


def test_every_op_with_a_kernel_has_cases():
    assert set(sanitize.OPS) == set(KERNELS)


def test_one_failed_case_fails_the_op():
    failed = sanitize.Finding("rg_lru", set(), sanitize.Counter(), "rg_lru-0-0-float32 was not done")
    assert not sanitize.note(sanitize.Finding("rg_lru", {"_forward"}, sanitize.Counter()) | failed, "memcheck")


@pytest.mark.parametrize("errors", [{}, {"_kernel_0": 3}])
def test_an_op_is_recorded_when_its_last_case_ends(errors, monkeypatch):
    put = []
    monkeypatch.setattr(sanitize, "record", lambda bench, work, impl, metric, value, *_: put.append((work, value)))
    cases = range(len(sanitize.cases_of("rotary")))

    def found():
        for case in cases:
            assert put == []
            counted = sanitize.Counter({} if case else errors)
            yield sanitize.Finding("rotary", {f"_kernel_{case}"}, counted)
        assert put == [
            *((f"rotary: _kernel_{case}", 0 if case else sum(errors.values())) for case in cases),
            ("rotary: all other kernels and calls", 0),
        ]
        put.clear()
        yield from (sanitize.Finding("rg_lru", {"_forward"}, sanitize.Counter()) for _ in sanitize.cases_of("rg_lru"))

    assert sanitize.note_each(found(), "memcheck") is not bool(errors)
    assert len(put) == 2


def test_what_an_earlier_run_left_is_no_finding(tmp_path, monkeypatch):
    case = sanitize.Case("rotary", 0, 1, 0)
    (tmp_path / f"{case}.json").write_text('["_rotate"]')
    (tmp_path / f"racecheck-{case}.log").write_text("========= RACECHECK SUMMARY: 0 hazards displayed\n")
    died = SimpleNamespace(returncode=1, stdout="", stderr="ImportError: no torch")
    monkeypatch.setattr(sanitize.subprocess, "run", lambda *_, **__: died)
    finding = sanitize.sanitize(case, "racecheck", tmp_path)
    assert finding.failure == f"{case}: exit 1: ImportError: no torch"


@pytest.mark.parametrize("case", [case for name in sanitize.OPS for case in sanitize.cases_of(name)], ids=str)
def test_the_cases_of_an_op_run(case):
    launched = sanitize.run_case(case)
    assert sanitize.DEVICE == "cpu" or launched


NAMES = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread",'
    '"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",'
    '"sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",'
    '"sm__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active",'
    '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"'
)
UNITS = '"","","","","","","","","","","","%","ns","register/thread","%","%","%","%","inst","inst","inst","inst"'


def row(index: int, kernel: str, time: str, dram: str) -> str:
    values = (dram, time, "96", "0", "41.5", "80.25", "24.9", "0.5", "3.75", "3.7", "1")
    head = (str(index), "77", "python3.12", "127.0.0.1", kernel, "1", "7", "(128, 1, 1)", "(132, 1, 1)", "0", "9.0")
    return ",".join(f'"{value}"' for value in (*head, *values))


TABLE = "\n".join(
    [
        "==PROF== Connected to process 77 (/usr/bin/python3.12)",
        '==PROF== Profiling "_forward" - 0: 0%....50%....100% - 20 passes',
        NAMES,
        UNITS,
        row(0, "_forward", "300,000", "60"),
        row(1, "_forward", "100,000", "20"),
        row(2, "_backward(float *, int)", "1,250,000", "n/a"),
        "==PROF== Disconnected from process 77",
    ]
)


def test_ncu_table():
    first, _, third = launches_in(TABLE)
    assert first == Launch(
        "_forward",
        300.0,
        {
            "dram": 60.0,
            "multiprocessors": 80.25,
            "tensor pipe": 41.5,
            "occupancy": 24.9,
            "registers": 96.0,
            "waits: long_scoreboard": 3.75,
            "waits: barrier": 0.5,
        },
    )
    assert (third.kernel, third.time, "dram" in third.values) == ("_backward", 1250.0, False)


@pytest.mark.parametrize("text", ["", f"==ERROR== {FORBIDDEN} - No permission\n==ERROR== Failed to profile", NAMES])
def test_ncu_without_a_table_says_why(text):
    with pytest.raises(ValueError, match=f"{FORBIDDEN}.*Failed" if FORBIDDEN in text else "empty"):
        launches_in(text)


def test_launches_of_a_kernel_are_weighted_by_time():
    whole = together(launches_in(TABLE)[:2])
    assert whole.time == 400.0
    assert whole.values["dram"] == pytest.approx(50.0)


@pytest.fixture
def figures(monkeypatch):
    """(work and kernel, metric) -> value of what is recorded."""
    put = {}

    def record(bench, work, impl, metric, value, *_, **__):
        put[work, metric] = value

    monkeypatch.setattr(profile_kernels, "record", record)
    return put


def test_a_work_is_recorded_by_kernel(figures):
    note("a", [*launches_in(TABLE), Launch("fill", 1.0, {})])
    assert {work: value for (work, metric), value in figures.items() if metric == "time"} == {
        "a: _forward": 400.0,
        "a: _backward": 1250.0,
    }
    assert figures["a: _forward", "launches"] == 2
    assert figures["a: _forward", "share of the work"] == pytest.approx(100 * 400 / 1651)


@pytest.fixture
def works(monkeypatch):
    """Stands for the works of the group "made"; gives the order in which they, and the profiler's marks, came."""
    came = []

    def make(name, impl="longscan"):
        def call(x):
            came.append(name)
            return 2 * x

        return Work(name, [torch.ones(3, requires_grad=True)], call, 1, 1, impl=impl)

    module = ModuleType("made")
    module.works = lambda: (
        make(*w)
        for w in [("op T 32768 B 1",), ("op T 32768 B 1", "peer"), ("op T 64 B 1",), ("long", "longscan, slice")]
    )
    monkeypatch.setitem(sys.modules, "longscan.benchmarks.kernels_made", module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: came.append("settled"))
    for mark in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, mark, lambda mark=mark: came.append(mark))
    return came


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [([], ["op T 32768 B 1", "long, slice"]), (["T 32768"], ["op T 32768 B 1"]), (["slice"], ["long, slice"])],
)
def test_works_are_chosen_by_a_part_of_their_names(works, tmp_path, texts, chosen):
    plan(["made"], texts, tmp_path / "works.json")
    assert json.loads((tmp_path / "works.json").read_text()) == [["made", name] for name in chosen]
    assert len(works) == 2 * len(chosen)


def test_a_text_in_no_name_is_refused_with_the_names(works, tmp_path):
    with pytest.raises(SystemExit, match="no work has 'T 64' in its name; known:\nop T 32768 B 1\nlong, slice$"):
        plan(["made"], ["slice", "T 64"], tmp_path / "works.json")
    assert not (tmp_path / "works.json").exists()


def test_a_work_is_profiled_the_second_time(works):
    run_work("made", "long, slice")
    # The shape of its gradient costs a call of its own.
    assert works == ["long", "long", "settled", "start", "long", "settled", "stop"]


@pytest.fixture
def ncu(monkeypatch):
    """Stands in for ncu and the processes it watches: what they write and how they end, by the work's name."""
    ends = {}

    def run(command, cwd):
        if "--plan" in command:
            Path(command[command.index("--plan") + 1]).write_text(json.dumps([["made", name] for name in ends]))
            return SimpleNamespace(returncode=0)
        assert command[0] == "ncu"
        name, table = (command[command.index(option) + 1] for option in ("--child", "--log-file"))
        code, text = ends[name]
        if text:
            Path(table).write_text(text)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(profile_kernels.subprocess, "run", run)
    return ends


def test_a_work_that_fails_does_not_take_the_others_with_it(ncu, figures, tmp_path, capsys):
    ncu |= {"a / 1": (0, TABLE), "b": (1, TABLE), "c": (0, ""), "d": (0, TABLE)}
    (tmp_path / "c.csv").write_text(TABLE)  # of an earlier call
    assert profile(["made"], [], tmp_path) == ["b", "c"]
    assert {work for work, _ in figures} == {
        f"{name}: {kernel}" for name in ("a / 1", "d") for kernel in ("_forward", "_backward")
    }
    assert (tmp_path / "a-1.csv").read_text() == TABLE
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", in")[0] for line in said[1:]][::3] == ["a / 1: 3 launches", "d: 3 launches"]
    assert said[2].startswith("b: FAILED, ncu ended with 1")


def test_what_ncu_may_not_do_once_is_not_tried_again(ncu, figures, tmp_path):
    ncu |= {"a": (1, f"==ERROR== {FORBIDDEN} - No permission"), "b": (0, TABLE)}
    assert profile(["made"], [], tmp_path) == ["a"]
    assert not figures
