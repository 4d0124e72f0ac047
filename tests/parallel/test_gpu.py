import os
from dataclasses import replace
from unittest.mock import patch

import matrix
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from matrix import LAYOUTS, TOLERANCES, batch_of, fits, model_of, worst
from matrix import train as train_layout
from matrix import train_plainly as train_layout_plainly
from safetensors.torch import load_file, save_file
from test_graphs import ALONE, assert_same, pair, steps_of
from test_graphs import PACKED as SEVERAL_KEYS
from tiny_model import STAGES, TinyModel, train, train_plainly

from longscan.kernels.attention import sdpa
from longscan.models import LanguageModel
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, verify
from longscan.parallel.graphs import CudaRecorder
from longscan.parallel.peers import GPUs, PeerCopies
from longscan.parallel.products import Exchange

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


@pytest.mark.parametrize("family", ["griffin", "based"])
def test_cuda_graphs_of_several_keys_share_a_pool(family):
    """Each is dropped for another's first micro-batch and recorded again; in between is evaluated."""
    engines = pair(lambda: model_of(family, ALONE).float(), precision="bf16", device="cuda:0")
    assert_same(engines, steps_of(SEVERAL_KEYS))


@patch.object(matrix, "TOKENS", 1024)
def test_a_first_micro_batch_has_the_memory_that_graphs_kept():
    packed, whole = (batch_of([lengths] * 64, 0) for lengths in ([512, 512], [1024]))
    torch.cuda.empty_cache()
    engine = Engine(model_of("griffin", ALONE).float(), ALONE, OPTIONS, "bf16", "cuda:0", True)
    engine.forward_backward([packed], packed.valid_tokens)
    room = 1.7 * torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room, 0)
    try:
        engine.forward_backward([packed, whole] * 2, packed.valid_tokens)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        engine.close()


@patch.object(matrix, "TOKENS", 1024)
def test_cuda_graphs_hold_cudnns_attention():
    """Its gradients have other bits each time: near the eager engine's, not the same."""
    attending = {"heads": 2, "head_dim": 64, "position": "rope"}
    config = config_from_mapping(load_preset("rope-tiny") | {"vocab_size": matrix.VOCABULARY, "attention": attending})

    def make():
        model = LanguageModel(config)
        model.init_weights(3)
        return model

    steps, found = [batch_of([[1024]], seed) for seed in range(4)], []
    with patch.object(sdpa, "forward", wraps=sdpa.forward) as forward:
        for engine in pair(make, precision="bf16", device="cuda:0"):
            losses = [(engine.forward_backward([b], b.valid_tokens), engine.update(1e-2)) for b in steps]
            found.append(torch.tensor(losses, dtype=torch.float64))
    assert forward.call_count == config.layers * (len(steps) + 2), "of the graph: run once, recorded once"
    torch.testing.assert_close(found[1], found[0], rtol=5e-3, atol=0)


GRAPHED = ["griffin tp2", "griffin tp2-sp", "griffin cp2", "griffin cp2-recomputed", "based cp2", "linearized tp2-sp"]


def each_of(folder, cases):
    """(case, its family, dims and options of training it in bf16 on this rank's GPU), a group of two ranks for each."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    for number, case in enumerate(cases):
        family, name = case.split()
        dims, options = LAYOUTS[name]
        place = {"rank": rank, "world_size": 2, "store": f"{folder}/store-{number}", "device": f"cuda:{rank}"}
        with process_group(**place, timeout_seconds=60):
            yield case, family, dims, {"device": f"cuda:{rank}", "precision": "bf16", **options}


def train_graphed(folder, cases):
    """What differs in each case on this rank."""
    return {case: differing(family, True, dims, **options) for case, family, dims, options in each_of(folder, cases)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.timeout(240)
def test_cuda_graphs_repeat_the_bits_of_a_pair_of_gpus(tmp_path):
    ranks = run_distributed(train_graphed, 2, tmp_path, GRAPHED, join=False, timeout=220)
    assert ranks == [{case: [] for case in GRAPHED}] * 2


COPIED = ["griffin tp2-sp", "griffin tp2-sp-selective", "based tp2-sp", "linearized tp2-sp"]


def train_copied(folder, cases):
    """What copy engines change in each case on this rank, eagerly and by CUDA graphs."""
    found = {}
    for case, family, dims, options in each_of(folder, cases):
        plain = train_layout(family, True, dims, **options)
        for graphs in (False, True):
            copied = train_layout(family, True, replace(dims, copy_engines=True), cuda_graphs=graphs, **options)
            found[f"{case} {graphs}"] = [key for key in plain if not torch.equal(plain[key], copied[key])]
    return found


def exchange_and_compare(folder):
    """Whether rows of many lengths arrive whole while products run, eagerly and by a graph that is repeated."""
    rank, same = int(os.environ["RANK"]), []
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    with process_group(rank=rank, world_size=2, store=f"{folder}/store", device=device, timeout_seconds=60):
        theirs = Exchange(dist.group.WORLD)
        ours = PeerCopies(dist.group.WORLD, GPUs(dist.group.WORLD))
        torch.manual_seed(rank)
        # The last two are cut into pieces, the last into more than there are slots.
        for tokens in (1, 7, 4096, 5000, 20000):
            x, parts = (torch.randn(n * tokens, 2048, device=device, dtype=torch.bfloat16) for n in (1, 2))
            found = [[(torch.empty_like(parts), torch.empty_like(x)) for _ in range(3)] for _ in range(2)]

            def exchange(way, results, x=x, parts=parts):
                waits = [way.all_gather(whole, x) for whole, _ in results]
                x @ x.t()[:, :256]
                for number, (_, total) in enumerate(results, 1):
                    fill = lambda tokens, part: torch.mul(parts[tokens], number, out=part)  # noqa: B023, E731
                    waits.append(way.reduce_scatter(total, fill, number == len(results)))
                for wait in waits:
                    wait()

            exchange(theirs, found[0])
            exchange(ours, found[1])
            same += [torch.equal(a, b) for pair in zip(*found, strict=True) for a, b in zip(*pair, strict=True)]
            recorder = CudaRecorder(device)
            replay = recorder.record(lambda: exchange(ours, found[1]) or x)  # noqa: B023
            for _ in range(3):
                x.normal_()
                parts.normal_()
                for tensor in (t for pair in found[1] for t in pair):
                    tensor.fill_(float("nan"))
                replay()
                exchange(theirs, found[0])
                same += [torch.equal(a, b) for pair in zip(*found, strict=True) for a, b in zip(*pair, strict=True)]
            torch.cuda.synchronize()
            del replay, recorder
    return same


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.timeout(120)
def test_rows_arrive_by_copy_engines(tmp_path):
    for same in run_distributed(exchange_and_compare, 2, tmp_path, join=False):
        assert len(same) == 5 * 4 * 6
        assert all(same)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.timeout(240)
def test_copy_engines_give_the_bits_of_collectives(tmp_path):
    ranks = run_distributed(train_copied, 2, tmp_path, COPIED, join=False, timeout=220)
    assert ranks == [{f"{case} {graphs}": [] for case in COPIED for graphs in (False, True)}] * 2
