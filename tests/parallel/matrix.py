"""The body of the matrix: a tiny model trained for some steps in some layout, and what came out of it."""

from unittest.mock import patch

import torch
from torch.nn.functional import cross_entropy

from longscan.data.batch import IGNORED_LABEL, Batch
from longscan.kernels.segments import Segments
from longscan.models import tiles
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, deepspeed_setup, make_model

VOCABULARY, TOKENS, STEPS, RATE = 33, 24, 5, 1e-2
# An eps that keeps AdamW from blowing the rounding of tiny gradients up to whole steps.
OPTIONS = OptimizerOptions(clip=0.5, weight_decay=0.1, eps=1e-2)
# So that stage 3 shards parameters of such small models, norms among them, and keeps small biases whole.
deepspeed_setup.KEPT_WHOLE = 30
# Tokens a tile: an MLP that is computed again has several, of other lengths than its documents.
TILE = 14

# What is trained: preset and changes.
FAMILIES = {
    "griffin": ("griffin-tiny", {"layers": 5}),
    "hawk": ("hawk-tiny", {"tie_embeddings": False, "embedding_scale": True, "logit_soft_cap": 5.0}),
    "based": ("based-tiny", {}),
    "alibi": ("alibi-tiny", {}),
    "sinusoidal": (
        "alibi-tiny",
        {
            "position_embedding": "sinusoidal",
            "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "position": "none"},
        },
    ),
    "linearized": ("linearized-tiny", {}),
    # Every option of a transformer before Llama. Rotary: without positions the gradient of the keys' biases is zero.
    "biased": (
        "rope-tiny",
        {
            "norm": "layer",
            "embedding_norm": True,
            "mlp": {"hidden": 88, "gated": False, "activation": "relu"},
            "attention": {"heads": 4, "head_dim": 8, "position": "rope", "qkv_bias": True, "output_bias": True},
        },
    ),
}

# How it is laid out: sizes of axes, options of the model. Without ZeRO in fp64, with it in fp32.
_LAYOUTS = {
    "cp2": ({"context": 2}, {}),
    "cp3": ({"context": 3}, {}),
    "cp4": ({"context": 4}, {}),
    "cp2-recomputed": ({"context": 2}, {"activation_checkpoint": "full"}),
    "tp2": ({"tensor": 2}, {}),
    "tp2-sp": ({"tensor": 2, "sequence_parallel": True}, {}),
    "tp4": ({"tensor": 4}, {}),
    "tp2-cp2": ({"tensor": 2, "context": 2}, {}),
    "tp2-sp-cp2": ({"tensor": 2, "context": 2, "sequence_parallel": True}, {}),
    "tp2-sp-recomputed": ({"tensor": 2, "sequence_parallel": True}, {"activation_checkpoint": "offload"}),
    "dp2-cp2": ({"data": 2, "context": 2}, {}),
    "dp2-tp2": ({"data": 2, "tensor": 2}, {}),
    "cp2-zero1": ({"context": 2, "zero": 1}, {}),
    "tp2-sp-zero1": ({"tensor": 2, "sequence_parallel": True, "zero": 1}, {"activation_checkpoint": "selective"}),
    "tp2-cp2-zero1": ({"tensor": 2, "context": 2, "zero": 1}, {}),
    "pp2": ({"pipeline": 2}, {}),
    "pp2-interleaved": ({"pipeline": 2, "interleave": 2}, {}),
    "pp4": ({"pipeline": 4}, {}),
    "pp2-recomputed": ({"pipeline": 2}, {"activation_checkpoint": "full"}),
    "pp2-interleaved-offload": ({"pipeline": 2, "interleave": 2}, {"activation_checkpoint": "offload"}),
    "pp2-cp2-selective": ({"pipeline": 2, "context": 2}, {"activation_checkpoint": "selective"}),
    "tp2-sp-selective": ({"tensor": 2, "sequence_parallel": True}, {"activation_checkpoint": "selective"}),
    "pp2-interleaved-dp2": ({"pipeline": 2, "interleave": 2, "data": 2}, {}),
    "pp4-uneven": ({"pipeline": 4, "stage_layers": (2, 1, 1, 1)}, {}),
    "tp2-cp2-pp2": ({"tensor": 2, "context": 2, "pipeline": 2}, {}),
    "pp2-dp2": ({"pipeline": 2, "data": 2}, {}),
    "pp2-tp2": ({"pipeline": 2, "tensor": 2}, {}),
    "pp2-tp2-sp": ({"pipeline": 2, "tensor": 2, "sequence_parallel": True}, {}),
    "pp2-cp2": ({"pipeline": 2, "context": 2}, {}),
    "pp2-zero1": ({"pipeline": 2, "zero": 1}, {}),
    "pp2-dp2-zero1": ({"pipeline": 2, "data": 2, "zero": 1}, {}),
    "pp2-tp2-zero1": ({"pipeline": 2, "tensor": 2, "zero": 1}, {}),
    "pp2-interleaved-zero1": ({"pipeline": 2, "interleave": 2, "zero": 1}, {}),
    "pp2-cp2-zero1-offloaded": ({"pipeline": 2, "context": 2, "zero": 1, "offload_optimizer": True}, {}),
    "cp3-zero2": ({"context": 3, "zero": 2}, {}),
    "cp3-zero3": ({"context": 3, "zero": 3}, {}),
    "dp2-zero2": ({"data": 2, "zero": 2}, {}),
    "dp2-zero3": ({"data": 2, "zero": 3}, {}),
    "dp2-cp2-zero3": ({"data": 2, "context": 2, "zero": 3}, {}),
    "dp2-zero3-recomputed": ({"data": 2, "zero": 3}, {"activation_checkpoint": "full"}),
    "dp2-tp2-zero2": ({"data": 2, "tensor": 2, "zero": 2}, {}),
    "dp2-tp2-sp-zero3": (
        {"data": 2, "tensor": 2, "sequence_parallel": True, "zero": 3},
        {"activation_checkpoint": "full"},
    ),
    "dp2-zero1-offloaded": ({"data": 2, "zero": 1, "offload_optimizer": True}, {}),
    "dp2-zero2-offloaded": ({"data": 2, "zero": 2, "offload_optimizer": True}, {}),
    "cp2-zero3-offloaded": ({"context": 2, "zero": 3, "offload_optimizer": True}, {"activation_checkpoint": "full"}),
}

LAYOUTS = {name: (ParallelDims(**{"zero": 0} | sizes), options) for name, (sizes, options) in _LAYOUTS.items()}
TOLERANCES = {0: 1e-9, 1: 2e-5, 2: 2e-5, 3: 2e-5}

# Lengths of the documents of the rows, micro-batch by micro-batch. Pieces of 2, 3 and 4 ranks end at 12, at 8 and 16,
# and at 6, 12 and 18: documents begin exactly there, beside them, span three ranks, or leave a rank without a start.
PACKED = [
    [[12, 12], [3, 19, 2]],
    [[8, 8, 8], [24]],
    [[6, 6, 6, 6], [1, 10, 13]],
    [[7, 10, 7], [17, 1, 1, 5]],
]
WHOLE = [[[TOKENS]] * 2] * 2


def config_of(family):
    """The family's ModelConfig."""
    preset, changes = FAMILIES[family]
    return config_from_mapping(load_preset(preset) | changes | {"vocab_size": VOCABULARY})


def fits(family, layout):
    """Whether the family has a layer for each chunk of the layout, and as many as its stages hold where it says."""
    (dims, _), layers = LAYOUTS[layout], config_of(family).layers
    return layers == sum(dims.stage_layers) if dims.stage_layers else dims.pipeline * dims.interleave <= layers


def model_of(family, dims, **options):
    """The family's model in fp64, divided as `dims` says, its weights drawn."""
    config = config_of(family)
    dims.validate(model=config, seq_lens=[TOKENS])
    model = make_model(config, dims, **options)
    model.init_weights(3)
    return model.double()


def batch_of(lengths, seed):
    """Random tokens in rows of documents of those lengths, some labels masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (len(lengths), TOKENS + 1), generator=generator)
    labels = tokens[:, 1:].masked_fill(torch.rand(len(lengths), TOKENS, generator=generator) < 0.2, IGNORED_LABEL)
    segments = Segments.from_lengths(lengths)
    return Batch(tokens[:, :-1], labels, segments.cu_seqlens, segments.continues, segments.doc_start, (), 0.0)


def batches_of(step, packed):
    """The micro-batches of one step, of all replicas."""
    lengths = PACKED[step % 2 :: 2] if packed else WHOLE
    return [batch_of(rows, 100 * step + index) for index, rows in enumerate(lengths)]


@patch.object(tiles, "TILE", TILE)
def train(family, packed, dims, device="cpu", precision="fp64", cuda_graphs=False, **options):
    """{name: tensor} of every step's loss, gradient norm and gradients, and of the weights at the end; logical.

    ZeRO shards gradients, and is fp32 or bf16: there they are not among what is found.
    """
    model = model_of(family, dims, **options)
    exact = precision == "fp64" and not dims.zero
    model = model if exact else model.float()
    engine = Engine(model, dims, OPTIONS, "fp32" if precision == "fp64" else precision, device, cuda_graphs)
    found = {}
    gradients = {} if dims.zero else record_gradients(engine)
    replica = torch.distributed.get_rank() // dims.replica_size if torch.distributed.is_initialized() else 0
    for step in range(STEPS):
        batches = batches_of(step, packed)
        tokens = sum(batch.valid_tokens for batch in batches)
        (loss,) = engine.sum(engine.forward_backward(batches[replica :: dims.data], tokens))
        numbers = {"loss": loss / tokens, "norm": engine.update(RATE)}
        found |= {f"{step}/{name}": torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
        found |= {f"{step}/{name}": logical(model, name, grad) for name, grad in gradients.items()}
    engine.close()
    found |= {f"weights/{name}": logical(model, name, p.detach()) for name, p in model.named_parameters()}
    return {name: tensor.cpu() for name, tensor in found.items()}


def train_plainly(family, packed):
    """The same in one process with nothing but torch: whole logits, torch's cross entropy, clipping and AdamW."""
    model = model_of(family, ParallelDims())
    named, exempt, found = dict(model.named_parameters()), model.no_weight_decay(), {}
    decays = {True: OPTIONS.weight_decay, False: 0.0}
    groups = [
        {"params": [p for n, p in named.items() if (n not in exempt) is decay], "weight_decay": decays[decay]}
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=OPTIONS.betas, eps=OPTIONS.eps)
    for step in range(STEPS):
        batches = batches_of(step, packed)
        loss = sum(plain_loss(model, batch) for batch in batches) / sum(batch.valid_tokens for batch in batches)
        loss.backward()
        found |= {f"{step}/{name}": p.grad.clone() for name, p in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), OPTIONS.clip)
        found |= {f"{step}/loss": loss.detach(), f"{step}/norm": norm}
        optimizer.step()
        optimizer.zero_grad()
    return found | {f"weights/{name}": p.detach() for name, p in named.items()}


def plain_loss(model, batch):
    segments = Segments(batch.cu_seqlens, batch.continues, batch.doc_start)
    logits = model(batch.inputs, segments).flatten(0, 1)
    return cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def record_gradients(engine):
    """A dictionary that holds, after every update, the gradients it was taken with."""
    optimizer, gradients = engine._optimizer, {}
    apply = optimizer._apply

    def recording(rate, norm):
        gradients.update({optimizer._names[p]: grad.clone() for p, _, grad in optimizer._views()})
        apply(rate, norm)

    optimizer._apply = recording
    return gradients


def logical(model, name, tensor):
    """The logical tensor of which this rank holds `tensor`, put together from its tensor ranks in rank order."""
    shape = model.backend.logical(name, model.get_parameter(name)).shape
    if shape == tuple(tensor.shape):
        return tensor.clone()
    parts = [None] * model.backend.size
    torch.distributed.all_gather_object(parts, tensor.tolist(), group=model.backend.group)
    divided = next(dim for dim, size in enumerate(tensor.shape) if size != shape[dim])
    return torch.cat([torch.tensor(part, dtype=tensor.dtype) for part in parts], dim=divided)


def worst(found, expected):
    """The largest error of a tensor that was found, relative to its norm, and the tensor."""
    assert found.keys() <= expected.keys()
    errors = {}
    for name in found:
        tensor = expected[name]
        size = torch.linalg.vector_norm(tensor).item()
        errors[name] = torch.linalg.vector_norm(found[name] - tensor).item() / (size or 1.0)
    name = max(errors, key=errors.__getitem__)
    return errors[name], name
