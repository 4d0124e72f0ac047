import dataclasses
import os

import pytest
import torch
from distributed import run_distributed
from matrix import OPTIONS, RATE, batch_of, config_of, train

from longscan.data.batch import IGNORED_LABEL
from longscan.errors import ConfigError
from longscan.models import LanguageModel, Part
from longscan.parallel import Engine, ParallelDims, make_model, process_group
from longscan.parallel.checkpoint import Checkpointer, load, load_weights

PRELOAD = ["longscan.parallel.tensor", "longscan.parallel.pipeline", "deepspeed"]
ENV = {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("sizes", "layers", "expected"),
    [
        ({"pipeline": 1}, 5, [5]),
        ({"pipeline": 2}, 5, [3, 2]),
        ({"pipeline": 4}, 6, [1, 2, 2, 1]),
        ({"pipeline": 4}, 7, [2, 2, 2, 1]),
        ({"pipeline": 2, "interleave": 2}, 5, [1, 2, 1, 1]),
        ({"pipeline": 3, "stage_layers": (1, 4, 2)}, 7, [1, 4, 2]),
    ],
)
def test_layers_are_dealt_in_order_and_the_loss_weighs(sizes, layers, expected):
    chunks = ParallelDims(zero=0, **sizes).chunks(layers)
    assert [len(chunk) for chunk in chunks] == expected
    assert [layer for chunk in chunks for layer in chunk] == list(range(layers))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pipeline": 2, "zero": 2}, "parallel.zero is 2 with parallel.pipeline 2.*set parallel.zero=1"),
        ({"interleave": 2}, "interleave is 2 with parallel.pipeline 1.*set parallel.interleave=1"),
        ({"interleave": 0}, "interleave is 0"),
        ({"pipeline": 2, "stage_layers": (5,)}, r"stage_layers is \[5\]; it must be 2 numbers above 0"),
        ({"pipeline": 2, "stage_layers": (5, 0)}, r"stage_layers is \[5, 0\]; it must be 2 numbers above 0"),
        ({"pipeline": 2, "stage_layers": (2, 2)}, r"is \[2, 2\], 4 of 5 layers; .*pipeline=2$"),
        ({"pipeline": 6}, "pipeline=6 x .*interleave=1 leaves a chunk without any of 5 layers; .*pipeline=5$"),
        (
            {"pipeline": 3, "interleave": 2},
            "interleave=2 leaves a chunk .* parallel.pipeline=2, parallel.interleave=2$",
        ),
    ],
)
def test_impossible_stages_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelDims(**{"zero": 0} | sizes).validate(model=config_of("griffin"), seq_lens=[24])


@pytest.mark.parametrize("family", ["griffin", "hawk"])
def test_parts_together_are_the_model_under_the_same_names(family):
    config = config_of(family)
    whole = dict(LanguageModel(config).named_parameters())
    chunks = ParallelDims(pipeline=2, zero=0).chunks(config.layers)
    parts = [
        LanguageModel(config, part=Part(frozenset(chunk), chunk is chunks[0], chunk is chunks[-1])) for chunk in chunks
    ]
    first, last = ({name: p.shape for name, p in part.named_parameters()} for part in parts)
    assert first | last == {name: p.shape for name, p in whole.items()}
    assert first.keys() & last.keys() == ({"embedding.weight"} if config.tie_embeddings else set())
    assert parts[0].logical_shapes() == {name: tuple(p.shape) for name, p in whole.items()}


def test_the_interleaved_schedule_takes_every_number_of_micro_batches():
    from longscan.parallel.pipeline import _group_size

    for pipeline in range(2, 9):
        for count in range(pipeline, 40):
            size = _group_size(count, pipeline)
            rest = count % size
            assert pipeline <= size <= count
            assert rest == 0 or rest >= pipeline, "Megatron refuses it"


# Sizes of axes, and the micro-batches of each step: more, as many and fewer than ranks; three leave a rest.
STEPS = {
    "1f1b": ({"pipeline": 3}, (7, 3, 1)),
    "interleaved": ({"pipeline": 2, "interleave": 2}, (5, 3, 1)),
    "zero 1": ({"pipeline": 3, "zero": 1}, (7, 3, 1)),
}


def micro_batches(step, count):
    """The last of several is a dummy."""
    batches = [batch_of([[7, 10, 7], [24]], 100 * step + index) for index in range(count)]
    if count > 1:
        batches[-1] = dataclasses.replace(batches[-1], labels=torch.full_like(batches[-1].labels, IGNORED_LABEL))
    return batches


def train_some(dims, counts, dtype):
    """What an engine says of steps, of an evaluation, of a discarded step and of one with a loss that is not finite."""
    model = make_model(config_of("griffin"), dims)
    model.init_weights(3)
    engine = Engine(model.to(dtype), dims, OPTIONS)
    found = []
    for step, count in enumerate(counts):
        batches = micro_batches(step, count)
        found.append(float(engine.evaluate(batches)))
        engine.forward_backward(batches[:1], 10)
        engine.discard()
        found.append(float(engine.forward_backward(batches, 40)))
        found.append(engine.update(RATE))
    kept = {f.name: f.data.clone() for f in engine.fragments()}
    with torch.no_grad():
        poison(model)
    engine.forward_backward(micro_batches(9, 2), 40)
    norm = engine.update(RATE)
    same = all(torch.equal(kept[f.name], f.data) for f in engine.fragments())
    refused = [norm < float("inf"), engine.skipped, engine.steps, same]
    engine.close()
    return found, refused


def poison(model):
    """Makes the last layer's gradients infinite, on the rank that holds it, and leaves no trace in the weights."""
    block = model.blocks[model.config.layers - 1]
    if block is not None:
        forward = block.forward
        block.forward = lambda x, seq: forward(x, seq) * float("inf")


def train_everywhere(folder):
    rank, found = int(os.environ["RANK"]), {}
    for name, (sizes, counts) in STEPS.items():
        dims = ParallelDims(**{"zero": 0} | sizes)
        if rank < dims.world_size:
            with process_group(rank=rank, world_size=dims.world_size, store=f"{folder}/{name}", timeout_seconds=60):
                found[name] = train_some(dims, counts, torch.float32 if dims.zero else torch.float64)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return run_distributed(train_everywhere, 3, folder, join=False, preload=PRELOAD, env=ENV)


@pytest.mark.parametrize("name", STEPS)
def test_any_number_of_micro_batches_dummies_evaluation_and_dropped_steps(ranks, name):
    sizes, counts = STEPS[name]
    expected, refused = train_some(ParallelDims(zero=0), counts, torch.float64)
    bound = 2e-5 if sizes.get("zero") else 1e-9
    for found in ranks[: sizes["pipeline"]]:
        torch.testing.assert_close(torch.tensor(found[name][0]), torch.tensor(expected), rtol=bound, atol=0)
        assert found[name][1] == refused == [False, 1, len(counts), True]


BF16 = {
    "1f1b": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "interleave": 2},
    "zero 1": {"pipeline": 2, "zero": 1},
    "interleaved zero 1": {"pipeline": 2, "interleave": 2, "zero": 1},
}


def train_in_bf16(folder):
    """Each layout's losses, gradient norms and this rank's weights at the end."""
    rank, found = int(os.environ["RANK"]), {}
    for name, sizes in BF16.items():
        with process_group(rank=rank, world_size=2, store=f"{folder}/{name}", timeout_seconds=60):
            trained = train("griffin", True, ParallelDims(**{"zero": 0} | sizes), precision="bf16")
        found[name] = {key: value.tolist() for key, value in trained.items() if key.split("/")[1] in ("loss", "norm")}
    return found


def test_bf16_with_fp32_masters_stays_as_close_to_fp64_as_one_process_does(tmp_path):
    exact = train("griffin", True, ParallelDims(zero=0))
    alone = train("griffin", True, ParallelDims(zero=0), precision="bf16")
    for found in run_distributed(train_in_bf16, 2, tmp_path, join=False, preload=PRELOAD, env=ENV):
        for name, numbers in found.items():
            for kind in ("loss", "norm"):
                keys = [key for key in numbers if key.endswith(kind)]
                errors, usual = (
                    torch.tensor([abs(float(run[key]) / float(exact[key]) - 1) for key in keys])
                    for run in (numbers, alone)
                )
                assert errors.max() <= 2 * usual.max(), (name, kind, errors, usual)


def save_and_load(folder):
    """Every layout of two stages saves after a step, loads what every other one saved, and takes another step."""
    rank, found = int(os.environ["RANK"]), {}
    with process_group(rank=rank, world_size=2, store=f"{folder}/store", timeout_seconds=60):
        for name, other in SAVED.items():
            dims = ParallelDims(pipeline=2, **other)
            engine = make_engine(dims)
            engine.forward_backward(micro_batches(0, 2), 40)
            engine.update(RATE)
            checkpointer = Checkpointer(f"{folder}/{name}", engine)
            checkpointer.save(1, {})
            checkpointer.wait()
            for source in [path for path in SAVED if os.path.exists(f"{folder}/{path}")]:
                checkpointer.load(f"{folder}/{source}/step-1")
                found[f"{source} to {name}"] = next_step(engine)
            checkpointer.close()
            engine.close()
    return found


SAVED = {"zero 1": {"zero": 1}, "interleaved": {"interleave": 2, "zero": 0}, "uneven": {"stage_layers": (1, 4)}}


def make_engine(dims):
    model = make_model(config_of("griffin"), dims)
    model.init_weights(3)
    return Engine(model, dims, OPTIONS)


def next_step(engine):
    return [float(engine.forward_backward(micro_batches(1, 2), 40)), engine.update(RATE)]


def test_a_checkpoint_of_any_stages_loads_into_any_others(tmp_path):
    ranks = run_distributed(save_and_load, 2, tmp_path, join=False, preload=PRELOAD, env=ENV)
    with process_group():
        engine = make_engine(ParallelDims(zero=0))
        load(tmp_path / "zero 1" / "step-1", engine)
        weights = {fragment.name: fragment.data.clone() for fragment in engine.fragments()}
        expected = next_step(engine)
        for name in SAVED:
            load(tmp_path / name / "step-1", engine)
            for fragment in engine.fragments():
                torch.testing.assert_close(fragment.data, weights[fragment.name], rtol=0, atol=2e-5)
            part = make_model(config_of("griffin"), ParallelDims(zero=0))
            load_weights(tmp_path / name / "step-1", part)
        engine.close()
    assert len(ranks[0]) == 6
    for found in ranks:
        for numbers in found.values():
            torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=2e-5, atol=0)
