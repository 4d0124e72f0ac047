"""Layouts that cannot be: `longscan train` and `longscan plan` say why, and what would do, before anything starts."""

import pytest

from longscan.launcher import cli
from longscan.launcher.elastic import supervisor
from longscan.launcher.validate import validate

STAGE = ("stages=[{seq_len: 512, tokens: 1M}]", "batch={tokens: 4096, micro_rows: 1}")
NEAREST = "the nearest layout that works is parallel.data={}, parallel.context={}, parallel.tensor={}"

REFUSED = {
    "more tensor ranks than gate blocks": (
        ["parallel.tensor=8"],
        8,
        ["parallel.tensor=8 does not divide model.rg_lru.gate_blocks=4", NEAREST.format(2, 1, 4)],
    ),
    "gate blocks that tensor ranks do not divide": (
        ["parallel.tensor=3"],
        3,
        ["parallel.tensor=3 does not divide model.rg_lru.gate_blocks=4", NEAREST.format(3, 1, 1)],
    ),
    "rows that context ranks do not divide": (
        ["parallel.context=3"],
        6,
        ["parallel.context=3 does not divide the row length 512", NEAREST.format(3, 2, 1)],
    ),
    "pieces that sequence parallel ranks do not divide": (
        ["parallel={context: 256, tensor: 4, sequence_parallel: true}"],
        1024,
        ["parallel.tensor=4 does not divide the 2 tokens of a piece (row length 512 / parallel.context 256)"],
    ),
    "a pipeline with gradients sharded": (
        ["parallel={pipeline: 2, zero: 2}"],
        2,
        ["parallel.zero is 2 with parallel.pipeline 2", "set parallel.zero=1 or parallel.pipeline=1"],
    ),
    "a pipeline with parameters sharded": (
        ["parallel={pipeline: 2, zero: 3}"],
        2,
        ["parallel.zero is 3 with parallel.pipeline 2", "set parallel.zero=1 or parallel.pipeline=1"],
    ),
    "more stages than layers": (
        ["parallel.pipeline=4"],
        4,
        ["parallel.pipeline=4 x parallel.interleave=1 leaves a chunk without any of 3 layers", "parallel.pipeline=2"],
    ),
    "runs of layers that are not the model's": (
        ["parallel={pipeline: 2, stage_layers: [1, 1]}"],
        2,
        ["parallel.stage_layers is [1, 1], 2 of 3 layers"],
    ),
}


@pytest.fixture
def command(monkeypatch, capsys, corpus, tmp_path):
    """Runs a command that must not start anything; gives its exit code and what it said."""

    def nothing(*_, **__):
        raise AssertionError("a run was started")

    def run(name, overrides, workers):
        options = ["griffin-tiny", *STAGE, *overrides, f"data.corpora=[{corpus}]"]
        if name == "train":
            options += ["run.launcher=ray", f"run.workers={workers}", "run.device=cpu", "--run", str(tmp_path / "run")]
        else:
            options += ["--gpus", str(workers)]
        with pytest.raises(SystemExit) as exit:
            cli.main([name, *options])
        return exit.value.code, " ".join(capsys.readouterr().err.split())

    monkeypatch.setattr(supervisor, "train", nothing)
    return run


@pytest.mark.parametrize("name", ["train", "plan"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_be_is_refused_with_its_values_and_a_remedy(command, tmp_path, name, case):
    overrides, workers, said = REFUSED[case]
    code, error = command(name, overrides, workers)
    assert code == 2
    for text in said:
        assert text in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train", "replicas of 4 (context x tensor x pipeline = 2 x 2 x 1); take a multiple of 4"),
        ("plan", "data 1 x context 2 x tensor 2 x pipeline 1 = 4 ranks, but 6 are to be started"),
    ],
)
def test_workers_that_make_no_replica_are_refused(command, name, said):
    code, error = command(name, ["parallel.context=2", "parallel.tensor=2"], 6)
    assert code == 2
    assert said in error


def test_compiled_blocks_with_sharded_parameters_are_refused(command):
    code, error = command("train", ["run.compile=true", "parallel.zero=3"], 2)
    assert code == 2
    assert "run.compile is true and parallel.zero is 3" in error
    assert "set run.compile=false or parallel.zero=2" in error


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.zero=2", "parallel.zero is 2, whose gradients"),
        ("parallel.pipeline=2", "parallel.pipeline is 2, whose micro-batches"),
        ("run.activation_checkpoint=offload", "run.activation_checkpoint is offload, which the host"),
        ("run.compile=true", "run.compile is true, which compiles"),
        ("run.implementation=reference", "run.implementation is reference, which asks"),
        ("run.seed=1", "run.device is cpu, which has no graphs"),
    ],
)
def test_what_no_cuda_graph_can_hold_is_refused(command, override, said):
    code, error = command("train", ["run.cuda_graphs=true", "parallel.zero=0", override], 2)
    assert code == 2
    assert f"run.cuda_graphs is true and {said}" in error
    assert f"; set run.cuda_graphs=false or {said.split(' is ')[0]}=" in error


def test_a_gpu_takes_cuda_graphs(tiny):
    config = tiny()
    config.run.cuda_graphs, config.run.device, config.parallel.zero = True, "auto", 0
    validate(config)


def test_copy_engines_are_refused_on_cpus(command):
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.copy_engines=true", "run.workers=2"]
    code, error = command("train", layout, 2)
    assert code == 2
    assert "parallel.copy_engines is true and run.device is cpu, which has none" in error
