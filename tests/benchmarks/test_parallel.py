"""The benchmark of several GPUs: every work on tiny shapes over gloo, the search for the longest row, the processes."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from longscan.benchmarks import curves, longest, parallel, ranks, record, report, stacks, steps
from longscan.benchmarks.longest import longer
from longscan.benchmarks.ranks import OUT_OF_MEMORY, Place, run_ranks
from longscan.kernels import precompile
from longscan.parallel import ParallelDims, graphs
from longscan.parallel.plan import load_named, work_name
from longscan.parallel.plan.recorded import GRAPHED

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from distributed import run_distributed  # noqa: E402

PRELOAD, ENV = ["longscan.parallel.tensor", "deepspeed", "longscan.benchmarks.parallel"], {"DS_ACCELERATOR": "cpu"}
TWO = "context=2"


class Repeating:
    """Stands in for CUDA graphs: it does the work again."""

    def __init__(self, device=None):
        self.ran = self.recorded = self.replayed = 0

    def run(self, work):
        self.ran += 1
        return work()

    def record(self, work):
        assert self.ran > self.recorded, "work must have run on the stream that it is recorded on"
        self.recorded += 1

        def replay():
            self.replayed += 1
            return work()

        return replay

    def forget(self):
        pass


def run_works(folder):
    """Every work as one of two ranks, on the CPU with what stands in for CUDA graphs."""
    ranks.WARM, ranks.REPEAT = 0, 1
    parallel.has_graphs = lambda place: True
    parallel.CudaRecorder = graphs.CudaRecorder = Repeating
    rank = os.environ["RANK"]
    for work in parallel.NAMES:
        place = Path(folder, work)
        place.mkdir(exist_ok=True)
        sys.argv = ["parallel", work, "--tiny", f"--results={folder}", f"--place={rank}:2:{place}", "--budget=0.5"]
        sys.argv += ["--modes=full"]
        parallel.main()


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """(work, metric) -> value of all works, and the folder of the results."""
    folder = tmp_path_factory.mktemp("results")
    run_distributed(run_works, 2, folder, join=False, timeout=280, preload=PRELOAD, env=ENV)
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return {(line["work"], line["metric"]): line["value"] for line in lines if line["impl"] == "longscan"}, folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_work_records_its_figures(figures):
    found, folder = figures
    stack = "griffin-tiny blocks 0 to 2, 1 x 64 tokens"
    one, many, gain = (found[stack, m] for m in ("fwd+bwd, one GPU", f"fwd+bwd, {TWO}", f"speed-up, {TWO}"))
    assert gain == pytest.approx(one / many, rel=1e-4)
    assert ("based-tiny blocks 0 to 2, 1 x 128 tokens, recompute selective", f"speed-up, {TWO}") in found
    assert (stack, f"exchanges not hidden, {TWO}") in found
    stack = "griffin-tiny blocks 0 to 2, 2 x 64 tokens"
    assert {metric for work, metric in found if work == stack} == {
        *("fwd+bwd, one GPU", "fwd+bwd, tensor=2", "speed-up, tensor=2"),
        *("fwd+bwd, CUDA graph, one GPU", "fwd+bwd, CUDA graph, tensor=2", "speed-up, CUDA graph, tensor=2"),
    }
    for name in ("data=2 zero=1", "context=2 zero=1", "tensor=2 zero=0", "CUDA graph, tensor=2 zero=0"):
        assert sum(metric == f"speed-up, {name}" for _, metric in found) == 1
    rows = [value for (_, metric), value in found.items() if metric == "tokens, 2 GPUs"]
    assert rows
    assert rows[-1] >= 4 * 2 * longest.TINY.granule
    (curves,) = json.loads((folder / "curves-cpu.json").read_text()).values()
    assert {name: len(runs) for name, runs in curves.items()} == {
        "one GPU": 2,
        TWO: 1,
        "tensor=2": 1,
        "pipeline=2": 1,
        "data=2 zero=1": 1,
    }
    assert all(len(losses) == 3 for runs in curves.values() for losses in runs)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_block_receives_does_not_grow_with_the_row(figures):
    found, _ = figures
    for kind, way in (("states", "forward"), ("states", "backward"), ("halos", "forward"), ("halos", "backward")):
        short, long = (
            found[f"griffin-tiny block 0 (rg_lru), 1 x {tokens} tokens", f"{kind} received {way}, {TWO}"]
            for tokens in (64, 128)
        )
        # 48 channels: at least one fp32 number of each.
        assert 4 * 48 <= short == long
    assert (
        "based-tiny block 1 (taylor_attention), 1 x 64 tokens",
        f"states received backward, {TWO}",
    ) in found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_simulator_knows_the_recorded_steps(figures):
    found, _ = figures
    loads = [load_named(work) for work, metric in found if metric == "tokens per second"]
    assert all(loads)
    layouts = {(load.dims.data, load.dims.context, load.dims.tensor, load.dims.zero) for load in loads}
    assert layouts == {(1, 1, 1, 0), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 0)}
    assert [load.dims.sequence_parallel for load in loads if load.dims.tensor == 2] == [True]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whole_steps_with_cuda_graphs_are_recorded_beside_the_eager_ones(figures):
    lines = [json.loads(line) for line in (figures[1] / "steps-cpu.jsonl").read_text().splitlines()]
    graphed = [line for line in lines if line["impl"] == GRAPHED]
    assert [load_named(line["work"]).dims.tensor for line in graphed] == [1, 2]
    assert {line["metric"] for line in graphed} == {"tokens per second"}
    assert {line["work"] for line in graphed} < {line["work"] for line in lines if line["impl"] == "longscan"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_shows_them(figures, monkeypatch):
    from longscan.benchmarks import figures as recorded

    monkeypatch.setattr(recorded, "RESULTS", figures[1])
    assert f"| griffin-tiny blocks 0 to 2, 1 x 64 tokens | longscan | speed-up, {TWO} |" in report.page()


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """What was recorded so far, by metric."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ranks, "WARM", 0)

    def read():
        lines = [json.loads(line) for line in (tmp_path / "parallel-cpu.jsonl").read_text().splitlines()]
        return {line["metric"]: line for line in lines}

    return read


@pytest.mark.parametrize("graphs", [False, True])
def test_a_stack_is_promised_to_gain_by_its_last_way_to_run(graphs, tmp_path, recorded):
    # One rank of two, whose other half is left out.
    place, shape = Place(0, 2, tmp_path), stacks.Shape("griffin-tiny", range(2), 1, 16)
    recorder = Repeating() if graphs else None
    with place.alone():
        parallel.compare_stacks(place, shape, parallel.ALONE, "tensor", 1.7, recorder)
    found = recorded()
    promises = {metric: line["floor"] for metric, line in found.items() if metric.startswith("speed-up")}
    if recorder is None:
        assert promises == {"speed-up, tensor=2": 1.7}
        assert len(found) == 3
        return
    assert promises == {"speed-up, tensor=2": None, "speed-up, CUDA graph, tensor=2": 1.7}
    one, many = (found[f"fwd+bwd, CUDA graph, {side}"]["value"] for side in ("one GPU", "tensor=2"))
    assert found["speed-up, CUDA graph, tensor=2"]["value"] == pytest.approx(one / many, rel=1e-4)
    assert (recorder.ran, recorder.recorded) == (2, 2)
    assert recorder.replayed == 2 * parallel.TURNS * ranks.REPEAT


def test_a_step_of_a_stack_can_be_repeated(tmp_path):
    with Place(0, 1, tmp_path).alone():
        stack = stacks.Stack(stacks.Shape("griffin-tiny", range(2), 1, 16), parallel.ALONE, torch.device("cpu"))
        assert torch.equal(stack.step(), stack.step())
    assert all(leaf.grad is None for leaf in (stack.x, *stack.loss.parameters()))


def test_a_cpu_has_no_graphs(tmp_path, recorded):
    assert not parallel.has_graphs(Place(0, 2, tmp_path))


def test_families_are_trained_alone_and_leave_the_curves_of_others(tmp_path, recorded):
    assert list(curves.scale_of(False).families) == list(curves.FULL.families)
    assert curves.scale_of(False, ["linearized-small"]).families == {"linearized-small": 2}
    place = Place(0, 2, tmp_path)
    for family, loss in (("a", 1.0), ("b", 2.0), ("a", 3.0000001)):
        curves.save(place, family, {"one GPU": [[loss, loss]]})
    saved = json.loads((tmp_path / "curves-cpu.json").read_text())
    assert saved == {"a": {"one GPU": [[3.0, 3.0]]}, "b": {"one GPU": [[2.0, 2.0]]}}


@pytest.mark.parametrize(("tiny", "family", "known"), [(["--tiny"], "griffin-tiny", True), ([], "griffin-tiny", False)])
def test_families_reach_the_ranks(monkeypatch, tmp_path, capsys, tiny, family, known):
    seen = []
    monkeypatch.setattr(parallel, "run_ranks", lambda module, arguments, *_: seen.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["parallel", "curves", "--families", family, *tiny, f"--results={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        parallel.main()
    if known:
        monkeypatch.setattr(sys, "argv", ["parallel", *seen[0], "--place=0:2:folder"])
        assert parallel.parse().families == [family]
        assert ended.value.code == 0
    else:
        assert not seen
        assert "unknown families griffin-tiny; known: griffin-small" in capsys.readouterr().err


def test_a_work_with_sequence_parallel_is_found_by_its_name():
    load = steps.load_of("griffin-tiny", ParallelDims(tensor=2, sequence_parallel=True, zero=0), 64, 2, 3, "selective")
    found = load_named(work_name("griffin-tiny", load), steps.VOCABULARY)
    assert found == load
    assert found.dims.sequence_parallel == 1


def test_rows_grow_to_what_memory_seems_to_reach():
    def peak(tokens):
        return 20.0 + tokens / 10

    # Rows of 600 fit; a leap is at most to the double.
    assert longer([(20, peak(20)), (40, peak(40))], 80.0, 10) == 80
    assert longer([(80, peak(80)), (320, peak(320))], 80.0, 10) == 570
    assert longer([(160, peak(160)), (570, peak(570))], 80.0, 10) == 580
    # Where rows cost nothing yet, one granule.
    assert longer([(20, 5.0), (40, 5.0)], 80.0, 10) == 50


@pytest.mark.parametrize(
    ("ends", "ended", "starts"),
    [
        ([(0, None)], True, [0]),
        ([(1, None)], False, [0]),
        ([(OUT_OF_MEMORY, [580, 570, 10])], True, [0]),
        ([(OUT_OF_MEMORY, [570, 160, 10]), (OUT_OF_MEMORY, [190, 180, 10])], True, [0, 170]),
    ],
)
def test_a_search_goes_on_where_a_leap_was_too_far(monkeypatch, ends, ended, starts):
    seen, left = [], list(ends)

    def run(module, arguments, folder, gpus, patience):
        seen.append(int(next(a for a in arguments if a.startswith("--start")).partition("=")[2]))
        code, failed = left.pop(0)
        if failed:
            (folder / longest.FAILED).write_text(json.dumps(failed))
        return code

    monkeypatch.setattr(longest, "run_ranks", run)
    options = argparse.Namespace(start=0, cap_gib=1.0, budget=1.0, patience=1.0, modes=["full"], counts=[1])
    assert longest.search("module", [], ["0", "1"], options) is ended
    assert seen == starts


def test_a_rank_that_runs_out_of_memory_says_of_what(monkeypatch, tmp_path, recorded, capsys):
    sizes = {"max_memory_allocated": 3 * 2**29, "max_memory_reserved": 2**31, "memory_reserved": 2**30}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(longest.Climb, "cap", lambda run, gib: (gib - 1) * 2**30)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def step(run, tokens):
        if tokens > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has 4 GiB.")
        return 1.0, float(tokens)

    monkeypatch.setattr(longest.Climb, "step", step)
    options = argparse.Namespace(start=0, cap_gib=4.0, budget=9.0, modes=["full"])
    with pytest.raises(SystemExit) as ended:
        longest.climb(Place(0, 1, tmp_path), longest.TINY, options)
    assert ended.value.code == OUT_OF_MEMORY
    assert json.loads((tmp_path / longest.FAILED).read_text()) == [128, 64, 16]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("rank"))
    planned = f"{longest.memory(steps.load_of('griffin-tiny', parallel.ALONE, 128, 1, 1, 'full')).total / 2**30:.2f}"
    assert line == (
        f"rank 0, row of 128 tokens: limit 3.00 GiB, planned {planned} GiB, allocated at the peak 1.50 GiB, "
        "reserved at the peak 2.00 GiB; CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 4 GiB."
    )


@pytest.mark.parametrize(("held", "alone"), [(0.6, True), (7.25, False)])
def test_a_search_needs_its_gpu_for_itself(monkeypatch, held, alone):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((80 - held) * 2**30), 80 * 2**30))
    longest.check_alone(torch.device("cpu"))
    if alone:
        longest.check_alone(torch.device("cuda", 1))
        return
    with pytest.raises(SystemExit, match=r"7\.2 GiB of cuda:1 are taken before the search begins"):
        longest.check_alone(torch.device("cuda", 1))


def test_kernels_are_compiled_before_the_work_where_there_are_any(monkeypatch):
    came = []
    monkeypatch.setattr(precompile, "rehearse", lambda work: [work()])
    monkeypatch.setattr(precompile, "prepare", came.append)
    ranks.compile_kernels(lambda: came.append("run"), torch.device("cpu"))
    assert not came
    ranks.compile_kernels(lambda: "kernel", torch.device("cuda"))
    assert came == [["kernel"]]


@pytest.fixture
def rehearsals(monkeypatch):
    """How many rehearsals were asked for; they are done."""
    done = []

    def compile_kernels(work, device):
        work()
        done.append(work)

    for module in (steps, stacks):
        monkeypatch.setattr(module, "compile_kernels", compile_kernels)
    return done


def test_a_rehearsed_curve_is_the_curve_without(rehearsals, monkeypatch, tmp_path):
    place, load = Place(0, 1, tmp_path), curves.load_of(curves.TINY, "griffin-tiny", parallel.ALONE)
    with place.alone():
        rehearsed = curves.curve(place, curves.TINY, load, 1)
        assert len(rehearsals) == 1
        monkeypatch.setattr(steps, "compile_kernels", lambda *_: None)
        assert curves.curve(place, curves.TINY, load, 1) == rehearsed


def test_steps_and_stacks_are_rehearsed(rehearsals, tmp_path, recorded):
    place = Place(0, 1, tmp_path)
    with place.alone():
        steps.train(steps.load_of("griffin-tiny", parallel.ALONE, 32, 1, 2, "none"), place.device)
        stack = stacks.Stack(stacks.Shape("griffin-tiny", range(2), 1, 16), parallel.ALONE, place.device)
    assert len(rehearsals) == 2
    assert all(leaf.grad is None for leaf in (stack.x, *stack.loss.parameters()))


def test_a_work_that_fails_does_not_take_the_others_with_it(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(
        parallel, "run_ranks", lambda module, arguments, *_: seen.append(arguments[0]) or seen == ["cp"]
    )
    monkeypatch.setattr(sys, "argv", ["parallel", "cp", "tp", "zero", "--tiny", f"--results={tmp_path}"])
    with pytest.raises(SystemExit, match="failed: cp"):
        parallel.main()
    assert seen == ["cp", "tp", "zero"]
    assert "tp: done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "patience", "code"),
    [("sys.exit(3 if rank == '1' else 0)", 60.0, 3), ("rank == '1' and sys.exit(3); time.sleep(60)", 60.0, 3),
     ("time.sleep(60)", 0.5, -1), ("pass", 60.0, 0)],
)  # fmt: skip
def test_a_rank_that_fails_ends_all(monkeypatch, tmp_path, body, patience, code):
    (tmp_path / "ranked.py").write_text(f"import sys, time\nrank = sys.argv[-1].split(':')[0]\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_ranks("ranked", [], tmp_path, [], patience) == code


def test_shapes_are_named_for_people():
    assert stacks.Shape("griffin-1.3b", range(6), 1, 32768).name == "griffin-1.3b blocks 0 to 5, 1 x 32768 tokens"
    assert parallel.kinds_of("based-1.4b") == [0, 1, 2]
