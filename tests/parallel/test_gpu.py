import os

import pytest
import torch
from distributed import run_distributed
from matrix import LAYOUTS, TOLERANCES, fits, worst
from matrix import train as train_layout
from matrix import train_plainly as train_layout_plainly
from safetensors.torch import load_file, save_file
from tiny_model import STAGES, TinyModel, train, train_plainly

from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
OPTIONS = OptimizerOptions(clip=0.4, weight_decay=0.3)


def train_save_and_load(folder):
    """bf16 over NCCL: every stage trains, saves while training, loads the checkpoint before its own and goes on."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    found, device, before = {}, f"cuda:{rank}", "0"
    with process_group(rank=rank, world_size=world_size, store=f"{folder}/store", device=device):
        for stage, options in STAGES.items():
            engine = Engine(TinyModel(), ParallelDims(data=world_size, **options), OPTIONS, "bf16", device)
            checkpointer = Checkpointer(f"{folder}/{stage}", engine)
            found[stage] = train(engine, range(3), rank, world_size)
            checkpointer.save(3, {})
            found[stage] += train(engine, range(3, 6), rank, world_size)
            checkpointer.load(checkpointer.wait())
            found[f"{stage} again"] = train(engine, range(3, 6), rank, world_size)
            checkpointer.load(f"{folder}/{before}/step-3")
            found[f"{stage} across"] = train(engine, range(3, 6), rank, world_size)
            checkpointer.close()
            engine.close()
            before = stage
    return found


def test_bf16_trains_saves_and_loads_over_nccl(tmp_path):
    ranks = run_distributed(train_save_and_load, min(2, torch.cuda.device_count()), tmp_path, join=False)
    plain = torch.tensor(train_plainly(TinyModel(), OPTIONS, range(6)))
    for found in ranks:
        for stage in STAGES:
            seen = torch.tensor(found[stage])
            torch.testing.assert_close(seen, plain, rtol=1e-2, atol=1e-2)
            assert found[f"{stage} again"] == found[stage][3:]
            verify(tmp_path / stage / "step-3")
            torch.testing.assert_close(torch.tensor(found[f"{stage} across"]), seen[3:], rtol=1e-3, atol=1e-3)


PAIRS = [name for name, (dims, _) in LAYOUTS.items() if dims.world_size == 2]
FAMILIES = ["griffin", "based", "linearized"]
# Of one bf16 number: errors of losses below it are chance, and their ratio says nothing.
ROUNDING = 2**-9


def train_pair(folder, family, name, alone):
    """One layout of two ranks over NCCL: the worst error in fp64, and in bf16 that of loss and first gradients."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    expected, one = (load_file(f"{alone}/{kind}.safetensors") for kind in ("exact", "bf16"))
    dims, options = LAYOUTS[name]
    here = {"device": f"cuda:{rank}", **options}
    place = {"rank": rank, "world_size": 2, "store": f"{folder}/store", "device": f"cuda:{rank}"}
    with process_group(**place, timeout_seconds=60):
        exact = worst(train_layout(family, True, dims, **here), expected)
        rounded = train_layout(family, True, dims, precision="bf16", **here)
    one = {name: one[name] for name in rounded if name in one}
    return exact, rounding(rounded, expected), rounding(one, expected)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A family's training in one process, in fp64 and in bf16: the folder that has both."""
    folders = {}

    def train_alone(family):
        if family not in folders:
            folders[family] = folder = tmp_path_factory.mktemp(family)
            save_file(train_layout_plainly(family, True), folder / "exact.safetensors")
            rounded = train_layout(family, True, ParallelDims(zero=0), device="cuda:0", precision="bf16")
            save_file(rounded, folder / "bf16.safetensors")
        return folders[family]

    return train_alone


def rounding(found, expected):
    """The error of the losses, and of the first step's gradients where there are any, relative to their norms."""
    parts = [[n for n in found if n.endswith("/loss")]]
    parts += [[n for n in found if n.startswith("0/") and n[2:] not in ("loss", "norm")]]
    errors = []
    for names in filter(None, parts):
        a, b = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (found, expected))
        errors.append(float((a - b).norm() / b.norm()))
    return errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("family", "name"), [(f, name) for f in FAMILIES for name in PAIRS if fits(f, name)])
def test_a_pair_of_gpus_trains_like_one_process(family, name, alone, tmp_path):
    for exact, rounded, one in run_distributed(train_pair, 2, tmp_path, family, name, alone(family), join=False):
        assert exact[0] <= TOLERANCES[LAYOUTS[name][0].zero], exact
        # Other orders of summation, not other sums: as far from fp64 as one GPU is, give or take.
        assert all(a <= max(2 * b, ROUNDING) for a, b in zip(rounded, one, strict=True)), (rounded, one)


def differing(family, packed, dims, **options):
    """What of a training is not bit for bit the same with CUDA graphs: in ten micro-batches of one key."""
    eager, graphed = (train_layout(family, packed, dims, cuda_graphs=graphs, **options) for graphs in (False, True))
    assert eager.keys() == graphed.keys()
    return [name for name in eager if not torch.equal(eager[name], graphed[name])]


GRAPHED_ALONE = [
    *((family, True, recomputed, "bf16") for family in FAMILIES for recomputed in ("none", "full")),
    ("griffin", False, "none", "bf16"),
    ("griffin", True, "selective", "bf16"),
    ("griffin", True, "none", "fp32"),
    ("alibi", False, "none", "bf16"),
]


@pytest.mark.parametrize(("family", "packed", "recomputed", "precision"), GRAPHED_ALONE)
def test_cuda_graphs_repeat_the_eager_engines_bits(family, packed, recomputed, precision):
    options = {"device": "cuda:0", "activation_checkpoint": recomputed, "precision": precision}
    assert differing(family, packed, ParallelDims(zero=0), **options) == []


GRAPHED = ["griffin tp2", "griffin tp2-sp", "griffin cp2", "griffin cp2-recomputed", "based cp2", "linearized tp2-sp"]


def train_graphed(folder, cases):
    """What differs in each case on this rank."""
    rank, found = int(os.environ["RANK"]), {}
    torch.cuda.set_device(rank)
    for number, case in enumerate(cases):
        family, name = case.split()
        dims, options = LAYOUTS[name]
        place = {"rank": rank, "world_size": 2, "store": f"{folder}/store-{number}", "device": f"cuda:{rank}"}
        with process_group(**place, timeout_seconds=60):
            found[case] = differing(family, True, dims, device=f"cuda:{rank}", precision="bf16", **options)
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.timeout(240)
def test_cuda_graphs_repeat_the_bits_of_a_pair_of_gpus(tmp_path):
    ranks = run_distributed(train_graphed, 2, tmp_path, GRAPHED, join=False, timeout=220)
    assert ranks == [{case: [] for case in GRAPHED}] * 2
