"""Micro-batches as graphs: the eager engine's bits, by a recorder that repeats the work (real: `test_gpu.py`)."""

import os
import weakref

import pytest
import torch
from distributed import run_distributed
from matrix import LAYOUTS, OPTIONS, RATE, WHOLE, batch_of, model_of
from test_linearize import config as config_of_twin

from longscan.errors import ConfigError
from longscan.models.config import with_positions
from longscan.models.linearize import AttentionTransfer, frozen_parameters
from longscan.parallel import Engine, ParallelDims, process_group
from longscan.parallel import graphs as module
from longscan.parallel.context import piece_of

ALONE = ParallelDims(zero=0)
# Steps of micro-batches: other documents and, in the end, other numbers of rows.
PACKED = [
    [[[12, 12], [3, 19, 2]], [[8, 8, 8], [24]]],
    [[[6] * 4, [1, 10, 13]], [[24], [24]], [[7, 10, 7], [17, 1, 1, 5]]],
    [[[24], [24]], [[1] * 24, [2] * 12], [[24], [24]]],
    [[[5, 19]], [[24]], [[20, 4]], [[24], [23, 1]]],
]
# Of one row and of two, packed and whole; one row that is whole comes but once, two that are packed are recorded again
# after the first of each other key.
KEYS, RECORDED = 4, 5


class Repeating:
    """A recorder whose graphs are the work itself: it reads the memory it was recorded with, as a graph does."""

    def __init__(self, device):
        self.runs = self.records = self.replays = self.forgotten = 0
        self.graphs = weakref.WeakSet()

    def run(self, work):
        assert not self.graphs, "a micro-batch beside graphs that keep the memory of another"
        self.runs += 1
        return work()

    def record(self, work):
        self.records += 1

        def replay():
            self.replays += 1
            return work()

        self.graphs.add(replay)
        return replay

    def forget(self):
        assert not self.graphs, "a pool left to graphs"
        self.forgotten += 1


@pytest.fixture(autouse=True)
def repeating(monkeypatch):
    monkeypatch.setattr(module, "CudaRecorder", Repeating)


def steps_of(lengths):
    return [[batch_of(rows, 10 * step + index) for index, rows in enumerate(one)] for step, one in enumerate(lengths)]


def learn(engine, batches):
    """A step's loss and gradients, and the weights after it."""
    loss = engine.forward_backward(batches, sum(batch.valid_tokens for batch in batches))
    gradients = [grad.clone() for grad in engine._optimizer._grads]
    engine.update(RATE)
    return [loss, *gradients, *(master.clone() for master in engine._optimizer.masters)]


def pair(make, dims=ALONE, precision="fp32", device="cpu"):
    """The engine without graphs and the one with."""
    return [Engine(make(), dims, OPTIONS, precision, device, graphs) for graphs in (False, True)]


def assert_same(engines, steps):
    seen = set()
    for batches in steps:
        eager, graphed = (learn(engine, batches) for engine in engines)
        assert all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True))
        assert torch.equal(*(engine.evaluate(batches) for engine in engines))
        seen.add(sum(batch.valid_tokens for batch in batches))
    assert len(seen) == len(steps), "the test must see other divisors"


@pytest.mark.parametrize("recomputed", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["griffin", "based", "alibi", "linearized"])
def test_graphs_are_the_eager_engine_bit_for_bit(family, precision, recomputed):
    engines = pair(lambda: model_of(family, ALONE, activation_checkpoint=recomputed).float(), precision=precision)
    assert_same(engines, steps_of(PACKED))
    recorder = engines[1]._graphs._recorder
    micro_batches = sum(map(len, PACKED))
    assert (recorder.runs, recorder.records, recorder.replays) == (KEYS, RECORDED, micro_batches - KEYS)


def test_rows_of_another_length_are_another_graph():
    engines = pair(lambda: model_of("griffin", ALONE).float())
    long = steps_of(PACKED[:2])
    recorder = engines[1]._graphs._recorder
    assert_same(engines, [*long, [piece_of(batch, 0, 2) for batch in long[0] + long[1]]])
    assert len(recorder.graphs) == 1, "a graph of rows that were trained before"
    assert_same(engines, [long[0] * 2])
    assert (recorder.runs, recorder.records) == (4, 5)  # whole rows of either length come once


def test_batches_are_copied_not_kept():
    engine = pair(lambda: model_of("griffin", ALONE).float())[1]
    (batches,) = steps_of(PACKED[:1])
    learn(engine, batches)
    places = [place.batch for place in engine._graphs._places.values()]
    held = {tensor.data_ptr() for place in places for tensor in module._tensors(place).values()}
    given = {tensor.data_ptr() for batch in batches for tensor in module._tensors(batch).values()}
    assert not held & given


def test_other_positions_and_other_trained_parameters_drop_the_graphs():
    engines = pair(lambda: model_of("biased", ALONE).float())
    recorder = engines[1]._graphs._recorder
    steps = steps_of(PACKED[:3])
    assert_same(engines, steps)
    assert recorder.runs == 2
    for engine in engines:
        engine.model.use_positions(with_positions(engine.model.config, rope_base=100.0))
    assert_same(engines, steps)
    assert recorder.runs == 4
    for engine in engines:
        engine.model.frozen = {"embedding.weight"}
        engine.model.freeze()
    assert_same(engines, steps)
    assert recorder.runs == 6


def test_a_rehearsal_has_the_memory_of_all_graphs_and_leaves_no_trace():
    engines = pair(lambda: model_of("griffin", ALONE).float())
    steps = steps_of(PACKED)
    assert_same(engines, steps[:2])
    recorder = engines[1]._graphs._recorder
    assert recorder.graphs
    engines[1].rehearse(steps[2][:1])
    assert not recorder.graphs
    assert_same(engines, steps[2:])


def test_attention_transfer_counts_its_errors_in_place():
    def make():
        model = AttentionTransfer(config_of_twin())
        model.init_weights(3)
        model.frozen = frozen_parameters(model, "mixers")
        return model

    engines = pair(make)
    for engine in engines:
        engine.model.freeze()
    steps = steps_of([WHOLE, *PACKED[:2]])
    counted = set()
    for batches in steps:
        learned = [learn(engine, batches) for engine in engines]
        assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))
        counted.add(engines[1].model.errors.data_ptr())
        assert torch.equal(*(engine.model.reset_errors() for engine in engines))
    assert len(counted) == 1


def test_a_closed_engine_holds_no_graph():
    engine = pair(lambda: model_of("griffin", ALONE).float())[1]
    learn(engine, steps_of(PACKED[:1])[0])
    assert engine._graphs._places
    begun = engine._graphs._recorder.forgotten
    engine.close()
    assert not engine._graphs._places
    assert engine._graphs._recorder.forgotten == begun + 1


def test_what_has_no_graphs_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="run.cuda_graphs is true and the device is cpu"):
        Engine(model_of("griffin", ALONE), ALONE, OPTIONS, cuda_graphs=True)
    with process_group(), pytest.raises(AssertionError, match="takes no CUDA graphs"):
        Engine(model_of("griffin", ALONE), ParallelDims(zero=1), OPTIONS, cuda_graphs=True)


def train_divided(folder, names):
    """Whether the bits are the eager engine's in each layout, and what this rank ran, recorded and repeated."""
    module.CudaRecorder, found = Repeating, {}
    rank = int(os.environ["RANK"])
    for name in names:
        dims, options = LAYOUTS[name]
        with process_group(rank=rank, world_size=2, store=f"{folder}/store-{name}", timeout_seconds=60):
            engines = pair(lambda: model_of("griffin", dims, **options).float(), dims)  # noqa: B023
            # A row of three documents of which a piece has but one: its rank must not take it for a whole row.
            assert_same(engines, steps_of([[[[12, 8, 4], [12, 12]]], *PACKED[:3]]))
            recorder = engines[1]._graphs._recorder
            found[name] = [recorder.runs, recorder.records, recorder.replays]
    return found


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_ranks_of_a_replica_record_together(tmp_path):
    names = ["cp2", "tp2-sp"]
    ranks = run_distributed(train_divided, 2, tmp_path, names, join=False, preload=["longscan.parallel.tensor"])
    assert ranks == [dict.fromkeys(names, [2, 3, 7])] * 2
