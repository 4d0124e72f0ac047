import os

import pytest
import torch
from distributed import run_distributed
from tiny_model import TinyModel, train, train_plainly

from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
OPTIONS = OptimizerOptions(clip=0.4, weight_decay=0.3)


def train_save_and_load(folder):
    """bf16 over NCCL: both stages train, save while training, load each other's checkpoint and go on alike."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    found, device = {}, f"cuda:{rank}"
    with process_group(rank=rank, world_size=world_size, store=f"{folder}/store", device=device):
        for zero in (0, 1):
            dims = ParallelDims(data=world_size, zero=zero)
            engine = Engine(TinyModel(), dims, OPTIONS, precision="bf16", device=device)
            checkpointer = Checkpointer(f"{folder}/zero-{zero}", engine)
            seen = train(engine, range(3), rank, world_size)
            checkpointer.save(3, {})
            seen += train(engine, range(3, 6), rank, world_size)
            path = checkpointer.wait()
            found[f"seen {zero}"] = seen
            checkpointer.load(path)
            found[f"again {zero}"] = train(engine, range(3, 6), rank, world_size)
            other = Checkpointer(f"{folder}/zero-{1 - zero}", engine)
            if zero:
                other.load(f"{folder}/zero-0/step-3")
                found["across"] = train(engine, range(3, 6), rank, world_size)
            checkpointer.close()
            other.close()
    return found


def test_bf16_trains_saves_and_loads_over_nccl(tmp_path):
    ranks = run_distributed(train_save_and_load, min(2, torch.cuda.device_count()), tmp_path, join=False)
    plain = torch.tensor(train_plainly(TinyModel(), OPTIONS, range(6)))
    for found in ranks:
        for zero in (0, 1):
            seen = torch.tensor(found[f"seen {zero}"])
            torch.testing.assert_close(seen, plain, rtol=1e-2, atol=1e-2)
            assert found[f"again {zero}"] == found[f"seen {zero}"][3:]
            verify(tmp_path / f"zero-{zero}" / "step-3")
        torch.testing.assert_close(
            torch.tensor(found["across"]), torch.tensor(found["seen 0"][3:]), rtol=1e-3, atol=1e-3
        )
