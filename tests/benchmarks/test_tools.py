"""Reading the logs of compute-sanitizer and the tables of ncu."""

import pytest

from longscan.benchmarks import profile_kernels, sanitize
from longscan.benchmarks.profile_kernels import Launch, launches_in, note, our_kernels, together
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
    assert set(sanitize.NAMES) == set(KERNELS)


def test_one_failed_case_fails_the_op():
    failed = sanitize.Finding("rg_lru", set(), sanitize.Counter(), "rg_lru-0-float32 was not done")
    assert not sanitize.note(sanitize.Finding("rg_lru", {"_forward"}, sanitize.Counter()) | failed, "memcheck")


@pytest.mark.parametrize("case", sanitize.CASES)
@pytest.mark.parametrize("name", sanitize.NAMES)
def test_the_cases_of_an_op_run(name, case):
    launched = sanitize.run_op(name, *case)
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


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"])
def test_ncu_without_a_table_says_why(text):
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM" if text else "empty"):
        launches_in(text)


def test_launches_of_a_kernel_are_weighted_by_time():
    whole = together(launches_in(TABLE)[:2])
    assert whole.time == 400.0
    assert whole.values["dram"] == pytest.approx(50.0)


def test_launches_are_given_to_their_works(monkeypatch):
    put = []
    monkeypatch.setattr(profile_kernels, "record", lambda *figure: put.append(figure))
    note(launches_in(TABLE), [("a", "_forward"), ("b", "_forward"), ("b", "_backward")])
    times = {figure[1]: figure[4] for figure in put if figure[3] == "time"}
    assert times == {"a: _forward": 300.0, "b: _forward": 100.0, "b: _backward": 1250.0}
    with pytest.raises(ValueError, match="3 launches and the program made 1"):
        note(launches_in(TABLE), [("a", "_forward")])


def test_our_kernels_are_found():
    assert {"_forward", "_backward", "_sum_rates"} <= set(our_kernels())
