import dataclasses

import pytest

from longscan.errors import ConfigError
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import ParallelDims


def model(name="griffin-tiny", **changes):
    return config_from_mapping(load_preset(name) | {"vocab_size": 257} | changes)


def test_sizes_multiply():
    dims = ParallelDims(data=3)
    assert (dims.world_size, dims.replica_size) == (3, 1)
    dims.validate(3)
    assert ParallelDims(2, 3, 4, 5).world_size == 120


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelDims().data = 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 0}, "parallel.data is 0"),
        ({"context": -1}, "parallel.context is -1"),
        ({"zero": 4}, "parallel.zero is 4; choose a stage of 0, 1, 2, 3"),
        ({"zero": 0, "offload_optimizer": True}, "offload_optimizer needs parallel.zero >= 1, which is 0"),
        ({"sequence_parallel": True}, "sequence_parallel needs parallel.tensor > 1"),
        ({"data": 4}, "data 4 x .* = 4 ranks, but 3 are to be started; set parallel.data=3"),
        ({"context": 2}, "data 1 x context 2 x .* = 2 ranks, but 3 are to be started"),
    ],
)
def test_bad_sizes_are_refused_with_their_values(options, message):
    with pytest.raises(ConfigError, match=message):
        ParallelDims(**options).validate(3)


@pytest.mark.parametrize(
    ("preset", "changes", "options", "message", "nearest"),
    [
        (
            "hawk-tiny",
            {},
            {"tensor": 8},
            "tensor=8 does not divide model.rg_lru.gate_blocks=4",
            "parallel.context=1, parallel.tensor=4",
        ),
        (
            "griffin-tiny",
            {},
            {"tensor": 3},
            "tensor=3 does not divide model.rg_lru.gate_blocks=4",
            "parallel.context=1, parallel.tensor=2",
        ),
        (
            "griffin-tiny",
            {"mlp": {"hidden": 90}},
            {"tensor": 4},
            "does not divide model.mlp.hidden=90",
            "parallel.context=1, parallel.tensor=2",
        ),
        (
            "alibi-tiny",
            {"mlp": {"hidden": 96}},
            {"tensor": 3},
            "does not divide model.attention.heads=4",
            "parallel.context=1, parallel.tensor=2",
        ),
        (
            "based-tiny",
            {"mlp": {"hidden": 96}},
            {"tensor": 6},
            "does not divide model.short_conv.width=64",
            "parallel.context=1, parallel.tensor=4",
        ),
        (
            "griffin-tiny",
            {"vocab_size": 5},
            {"tensor": 4},
            "no row of a vocabulary of 5",
            "parallel.context=1, parallel.tensor=2",
        ),
        (
            "griffin-tiny",
            {},
            {"context": 5},
            "context=5 does not divide the row length 24",
            "parallel.context=4, parallel.tensor=1",
        ),
        (
            "griffin-tiny",
            {},
            {"context": 3, "tensor": 4, "sequence_parallel": True},
            "tensor=4 does not divide the 10 tokens of a piece .row length 30 / parallel.context 3",
            "parallel.context=3, parallel.tensor=2",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_layout_that_does(preset, changes, options, message, nearest):
    seq_lens = [24] if "row length 30" not in message else [30]
    with pytest.raises(ConfigError, match=message) as refused:
        ParallelDims(zero=0, **options).validate(model=model(preset, **changes), seq_lens=seq_lens)
    assert str(refused.value).endswith(f"the nearest layout that works is parallel.data=1, {nearest}")


def test_the_nearest_layout_fills_the_ranks_that_are_to_be_started():
    with pytest.raises(ConfigError, match="works is parallel.data=2, parallel.context=2, parallel.tensor=2$"):
        ParallelDims(context=2, tensor=3, data=1, zero=0).validate(8, model(), [24])


def test_the_nearest_layout_keeps_every_rule():
    for context in range(1, 9):
        for tensor in range(1, 9):
            dims = ParallelDims(context=context, tensor=tensor, zero=0)
            try:
                dims.validate(model=model(), seq_lens=[48, 36])
            except ConfigError as error:
                sizes = dict(part.split("=") for part in str(error).split("works is ")[1].split(", "))
                found = {name.removeprefix("parallel."): int(size) for name, size in sizes.items()}
                ParallelDims(**found, zero=0).validate(model=model(), seq_lens=[48, 36])


def test_fewer_key_heads_than_ranks_are_shared():
    ParallelDims(tensor=4, zero=0).validate(4, model(), [24])
    grouped = model("alibi-tiny", attention={"heads": 4, "kv_heads": 2, "head_dim": 8}, mlp={"hidden": 96})
    ParallelDims(tensor=4, zero=0).validate(4, grouped, [24])
    six = model("alibi-tiny", attention={"heads": 6, "kv_heads": 2, "head_dim": 8}, mlp={"hidden": 96})
    with pytest.raises(ConfigError, match="tensor=3 does not divide model.attention.kv_heads=2"):
        ParallelDims(tensor=3, zero=0).validate(3, six, [24])
