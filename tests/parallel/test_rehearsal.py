"""A rehearsal whose kernels are left out leaves nothing: the steps after it have the bits they have without it."""

import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from distributed import run_distributed
from matrix import LAYOUTS, OPTIONS, RATE, batches_of, model_of

from longscan.kernels.opaque import Opaque
from longscan.parallel import Engine, ParallelDims, graphs, process_group
from longscan.parallel.checkpoint import rng_state

LAYOUTS = LAYOUTS | {
    "alone": (ParallelDims(zero=0), {}),
    "dp2": (ParallelDims(data=2, zero=0), {}),
    "dp2-zero1": (ParallelDims(data=2, zero=1), {}),
}
CASES = [
    *(f"{layout} fp32" for layout in ("alone", "cp2-recomputed", "tp2-sp", "pp2-interleaved-offload", "pp2-zero1")),
    *(f"{layout} fp32" for layout in ("dp2-zero2-offloaded", "cp2-zero3-offloaded", "dp2-zero3-recomputed")),
    *(f"{layout} bf16" for layout in ("dp2", "dp2-zero1", "dp2-zero2", "dp2-zero3")),
]


@contextmanager
def kernels_left_out():
    """What they would have written is NaN; gives the list of their calls."""
    calls, original = [], Opaque.__call__

    def left_out(self, *inputs):
        output = original(self, *inputs)
        calls.append(self)
        for tensor in output if isinstance(output, tuple) else (output,):
            tensor.data.fill_(torch.nan)
        return output

    with patch.object(Opaque, "__call__", left_out):
        yield calls


def trained(dims, options, precision, rehearsed):
    """Every loss and norm of some steps, then this rank's part of weights and moments, and the states of generators."""
    model = model_of("griffin", dims, **options).float()
    engine = Engine(model, dims, OPTIONS, precision)
    replica = torch.distributed.get_rank() // dims.replica_size
    found = []
    for step in range(2):
        batches = batches_of(step, True)
        mine = batches[replica :: dims.data]
        if rehearsed:
            with kernels_left_out() as calls:
                engine.rehearse(mine[:1])
            assert calls, "no kernel was left out"
        loss = engine.forward_backward(mine, sum(batch.valid_tokens for batch in batches))
        found += [loss, torch.tensor(engine.update(RATE))]
    assert (engine.steps, engine.skipped) == (2, 0)
    found += [fragment.data.clone() for fragment in engine.fragments()]
    engine.close()
    return [*found, *(parameter.detach().clone() for parameter in model.parameters())], rng_state()


def compare(folder):
    """Of each case this rank takes part in: whether the bits are the same with rehearsals and without."""
    rank, found = int(os.environ["RANK"]), {}
    for case in CASES:
        layout, precision = case.split()
        dims, options = LAYOUTS[layout]
        if rank < dims.world_size:
            with process_group(rank=rank, world_size=dims.world_size, store=f"{folder}/{case}", timeout_seconds=60):
                (plain, before), (other, after) = (trained(dims, options, precision, way) for way in (False, True))
            assert all(tensor.isfinite().all() for tensor in plain)
            same = [left.equal(right) for left, right in zip(plain, other, strict=True)]
            found[case] = all(same) and before == after
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    preload, env = ["longscan.parallel.tensor", "deepspeed"], {"DS_ACCELERATOR": "cpu"}
    return run_distributed(compare, 2, tmp_path_factory.mktemp("cases"), join=False, preload=preload, env=env)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_of_it(ranks, case):
    found = [rank[case] for rank in ranks if case in rank]
    assert found == [True] * LAYOUTS[case.split()[0]][0].world_size


def test_it_is_no_graph(monkeypatch):
    """Nor does it take the place of the eager micro-batch before one."""
    runs = []

    class Recorder:
        def __init__(self, device):
            pass

        def run(self, work):
            runs.append(work)
            return work()

        def forget(self):
            pass

    monkeypatch.setattr(graphs, "CudaRecorder", Recorder)
    with process_group():
        engine = Engine(model_of("griffin", ParallelDims(zero=0)), ParallelDims(zero=0), OPTIONS, cuda_graphs=True)
        engine.rehearse(batches_of(0, True)[:1])
        assert runs == []
        engine.forward_backward(batches_of(0, True)[:1], 1)
        assert len(runs) == 1
        engine.close()
