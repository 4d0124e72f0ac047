"""Divided layers hold boxes of the undivided model's parameters, and their loss is the whole vocabulary's."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from matrix import OPTIONS, VOCABULARY, batch_of, config_of, logical, model_of

from longscan.kernels import Segments, linear_cross_entropy
from longscan.models import LanguageModel
from longscan.parallel import Engine, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, load_weights

FAMILIES = ["griffin", "sinusoidal"]
# Every mixer, a plain MLP and biases.
GENERATING = ["griffin", "based", "linearized", "biased"]
LOSSES = {
    "plain": {},
    "all options": {"z_loss": 0.1, "label_smoothing": 0.2, "soft_cap": 3.0},
    "a row each": {"reduction": "none"},
}
LAYOUTS = {"tp4": {"tensor": 4}, "tp2-sp": {"data": 2, "tensor": 2, "sequence_parallel": True}}


def examine(folder):
    rank, found = int(os.environ["RANK"]), {}
    for layout, sizes in LAYOUTS.items():
        dims = ParallelDims(zero=0, **sizes)
        with process_group(rank=rank, world_size=4, store=f"{folder}/{layout}", timeout_seconds=60):
            models = {family: model_of(family, dims) for family in FAMILIES}
            found[layout] = {
                "begins alike": {family: begins_alike(family, model) for family, model in models.items()},
                "losses": {name: loss_error(models["griffin"], **options) for name, options in LOSSES.items()},
                "logits": logits_error("griffin", models["griffin"]),
                "steps": {} if dims.sequence_parallel else {f: step_error(f, dims) for f in GENERATING},
                "partial": sorted(models["griffin"].backend.partial_gradients(models["griffin"])),
                "table": list(models["griffin"].get_parameter("embedding.weight").shape),
                "contained": stand_in_is_contained(),
                "loaded": [
                    saves_and_loads(f"{folder}/{layout}-zero{zero}", models["griffin"], replace(dims, zero=zero))
                    for zero in (0, 1)
                ],
            }
    return found


def stand_in_is_contained():
    """Whether only the modules that need it see another torch, and torch itself is as it was."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    cuda = torch.cuda.current_device.__module__
    return mappings.torch is not torch and parallel_state.torch is torch and cuda == "torch.cuda"


def begins_alike(family, model):
    """Whether the boxes make up the weights that one device draws, bit for bit."""
    undivided = model_of(family, ParallelDims())
    pairs = zip(model.named_parameters(), undivided.parameters(), strict=True)
    return all(torch.equal(logical(model, name, p.detach()), whole) for (name, p), whole in pairs)


def loss_error(model, **options):
    """The relative error of the loss and of its gradients, against the whole table."""
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (50,)).masked_fill(torch.rand(50) < 0.2, -100)
    hidden = torch.randn(50, 32, dtype=torch.float64)
    own = model.get_parameter("embedding.weight").detach().clone().requires_grad_()
    table = logical(model, "embedding.weight", own.detach()).requires_grad_()
    divided, whole = (hidden.clone().requires_grad_() for _ in range(2))
    factor = torch.rand(50 if options.get("reduction") == "none" else (), dtype=torch.float64)
    loss = model.backend.cross_entropy(divided, own, labels, **options)
    (loss * factor).sum().backward()
    expected = linear_cross_entropy(whole, table, labels, **options)
    (expected * factor).sum().backward()
    total = divided.grad.clone()
    dist.all_reduce(total, group=model.backend.group)
    pairs = [(loss, expected), (total, whole.grad), (logical(model, "embedding.weight", own.grad), table.grad)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def logits_error(family, model):
    """The largest difference of the gathered logits from one device's."""
    batch, undivided = batch_of([[24], [7, 17]], 0), model_of(family, ParallelDims())
    segments = Segments(batch.cu_seqlens, batch.continues, batch.doc_start)
    with torch.no_grad():
        return float((model(batch.inputs, segments) - undivided(batch.inputs, segments)).abs().max())


def step_error(family, dims):
    """The largest difference of a prompt's and a further token's logits from one device's."""
    divided, whole = (model_of(family, layout) for layout in (dims, ParallelDims()))
    found = []
    with torch.no_grad():
        for model in (divided, whole):
            prompt, carry = model.prefill(torch.tensor([[3, 4, 5], [6, 7, 8]]))
            found.append(torch.stack([prompt, model.step(torch.tensor([1, 2]), carry)[0]]))
    return float((found[0] - found[1]).abs().max())


def saves_and_loads(folder, model, dims):
    """Whether a checkpoint of the divided model is one of the undivided, and loads back into each."""
    model = model.float()
    weights = {name: logical(model, name, p.detach()) for name, p in model.named_parameters()}
    engine = Engine(model, dims, OPTIONS)
    checkpointer = Checkpointer(folder, engine)
    checkpointer.save(1, {})
    path = checkpointer.wait()
    held = {fragment.name: fragment.data.clone() for fragment in engine.fragments()}
    for fragment in engine.fragments():
        fragment.data.add_(1)
    checkpointer.load(path)
    same = all(torch.equal(fragment.data, held[fragment.name]) for fragment in engine.fragments())
    checkpointer.close()
    engine.close()
    undivided = LanguageModel(config_of("griffin"))
    load_weights(path, undivided)
    load_weights(path, model)
    same = same and all(torch.equal(p, weights[name]) for name, p in undivided.named_parameters())
    return same and all(torch.equal(logical(model, n, p.detach()), weights[n]) for n, p in model.named_parameters())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor")
    preload, env = ["longscan.parallel.tensor", "deepspeed"], {"DS_ACCELERATOR": "cpu"}
    return run_distributed(examine, 4, folder, join=False, preload=preload, env=env)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def test_weights_begin_as_on_one_device(ranks, layout):
    assert all(all(found[layout]["begins alike"].values()) for found in ranks)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_slices_is_the_whole_vocabularys(ranks, layout, name):
    assert max(found[layout]["losses"][name] for found in ranks) < 1e-13


def test_a_vocabulary_need_not_divide(ranks, layout):
    rows = [found[layout]["table"][0] for found in ranks]
    assert rows == ([9, 9, 9, 6] if layout == "tp4" else [17, 16, 17, 16])


def test_logits_are_gathered_for_who_asks(ranks, layout):
    assert max(found[layout]["logits"] for found in ranks) < 1e-12


def test_it_generates_token_by_token_without_sequence_parallel(ranks):
    for found in ranks:
        assert all(error < 1e-12 for error in found["tp4"]["steps"].values()), found["tp4"]["steps"]


def test_whole_parameters_among_divided_ones_have_partial_gradients(ranks, layout):
    partial = set(ranks[0][layout]["partial"])
    assert {"blocks.2.mixer.key.weight", "blocks.2.mixer.value.weight"} <= partial
    on_residual = {"norm.scale", "blocks.0.mlp_norm.scale", "blocks.1.mixer.output.bias", "blocks.0.mlp.down.bias"}
    assert on_residual <= partial if layout == "tp2-sp" else not on_residual & partial
    assert not {"blocks.0.mixer.a_param", "blocks.0.mlp.up.bias", "embedding.weight"} & partial


def test_megatron_sees_the_cpu_and_nobody_else_does(ranks, layout):
    assert all(found[layout]["contained"] for found in ranks)


def test_checkpoints_hold_logical_tensors(ranks, layout):
    assert all(all(found[layout]["loaded"]) for found in ranks)
