import dataclasses

import pytest

from longscan.errors import ConfigError
from longscan.parallel import ParallelDims


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
        ({"context": 2}, "parallel.context is 2.*set parallel.context=1"),
        ({"tensor": 4}, "parallel.tensor is 4"),
        ({"pipeline": 2}, "parallel.pipeline is 2"),
        ({"zero": 2}, "parallel.zero is 2.*0 or 1"),
        ({"sequence_parallel": True}, "sequence_parallel needs parallel.tensor > 1"),
        ({"data": 4}, "data 4 x .* = 4 ranks, but 3 are to be started; set parallel.data=3"),
    ],
)
def test_bad_sizes_are_refused_with_their_values(options, message):
    with pytest.raises(ConfigError, match=message):
        ParallelDims(**options).validate(3)
