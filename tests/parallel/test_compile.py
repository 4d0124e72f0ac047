"""torch.compile of the blocks: eager's loss and gradients in fp64, one graph for any number of documents."""

import os
import shutil

import pytest
import torch
from distributed import run_distributed
from matrix import FAMILIES, LAYOUTS, TOLERANCES, batch_of, model_of, train, train_plainly, worst
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters

from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group

ALONE = ParallelDims(zero=0)
# Two documents to six a row, one of them in no row alone.
PACKED = [[[12, 12], [3, 19, 2]], [[8, 8, 8], [1, 22, 1]], [[4] * 6, [5, 5, 5, 5, 4]]]
DIVIDED = [
    "tp2 griffin packed",
    "tp2-sp-selective griffin packed",
    "cp2 based packed",
    "cp2-recomputed griffin packed",
    "pp2-recomputed griffin packed",
    "dp2-zero2 griffin packed",
]


@pytest.fixture
def backend(request, monkeypatch):
    """Compiles with the backend that the test names, from nothing."""
    compile_with(request.param, monkeypatch.setattr)
    yield request.param
    torch._dynamo.reset()


def compile_with(backend, setattr=setattr):
    torch._dynamo.reset()
    counters.clear()
    original = nn.Module.compile
    setattr(nn.Module, "compile", lambda module, **options: original(module, backend=backend, **options))


INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
)


def engine_of(family, **options):
    return Engine(model_of(family, ALONE, **options), ALONE, OptimizerOptions())


def learn(engine, batches):
    """The loss and the gradients of one micro-batch each."""
    for batch in batches:
        loss = engine.forward_backward([batch], batch.valid_tokens)
        yield [loss, *(parameter.grad.clone() for parameter in engine.model.parameters())]
        engine.discard()


@pytest.mark.parametrize("recomputed", ["none", "full"])
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_compiled_is_eager(backend, recomputed):
    check("griffin", recomputed)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("recomputed", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", [INDUCTOR], indirect=True)
def test_each_family_compiled_is_eager(backend, family, recomputed):
    check(family, recomputed)


def check(family, recomputed):
    batches = [batch_of(lengths, seed) for seed, lengths in enumerate([*PACKED, [[24], [24]]])]
    expected = learn(engine_of(family, activation_checkpoint=recomputed), batches)
    found = learn(engine_of(family, activation_checkpoint=recomputed, compile=True), batches)
    for one, other in zip(expected, found, strict=True):
        for eager, compiled in zip(one, other, strict=True):
            assert torch.linalg.vector_norm(eager - compiled) <= 1e-12 * torch.linalg.vector_norm(eager)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_one_graph_serves_any_number_of_documents(backend):
    engine, graphs = engine_of("griffin", compile=True), []
    for seed, lengths in enumerate(PACKED):
        batch = batch_of(lengths, seed)
        engine.forward_backward([batch], batch.valid_tokens)
        engine.evaluate([batch])
        graphs.append(counters["stats"]["unique_graphs"])
    # Two kinds of blocks, with gradients and without.
    assert graphs == [4, 4, 4]
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_names_generation_and_evaluation_stay(backend):
    plain, compiled = model_of("griffin", ALONE), model_of("griffin", ALONE, compile=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    token, carry = torch.tensor([5]), plain.init_carry(1)
    assert torch.equal(plain.step(token, carry)[0], compiled.step(token, compiled.init_carry(1))[0])
    assert not counters["stats"]["unique_graphs"]


def compare(folder, cases):
    """This rank's worst error and its tensor in each case."""
    compile_with("aot_eager")
    rank, found = int(os.environ["RANK"]), {}
    for number, case in enumerate(cases):
        layout, family, packing = case.split()
        dims, options = LAYOUTS[layout]
        torch._dynamo.reset()
        with process_group(rank=rank, world_size=2, store=f"{folder}/store-{number}", timeout_seconds=60):
            trained = train(family, packing == "packed", dims, compile=True, **options)
        found[case] = worst(trained, load_file(f"{folder}/{family}.safetensors"))
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_it_composes_with_every_axis(tmp_path):
    for family in {case.split()[1] for case in DIVIDED}:
        save_file(train_plainly(family, True), tmp_path / f"{family}.safetensors")
    for ranks in run_distributed(compare, 2, tmp_path, DIVIDED, join=False, timeout=380, env={"DS_ACCELERATOR": "cpu"}):
        for case, error in ranks.items():
            assert error[0] <= TOLERANCES[LAYOUTS[case.split()[0]][0].zero], (case, error)
