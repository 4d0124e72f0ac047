"""Bytes by formula against what autograd keeps of the real modules, on tensors that have shapes and no values."""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longscan.kernels import Segments, rms_norm
from longscan.kernels.cross_entropy import op as loss
from longscan.kernels.rg_lru import op as rg_lru
from longscan.models import LanguageModel, LocalBackend, fused, norm, offload
from longscan.models.config import config_from_mapping, load_preset, num_params
from longscan.models.positions import alibi_slopes
from longscan.models.sequence import Entry, LocalContext
from longscan.parallel import ParallelDims
from longscan.parallel.context import ContextParallelContext
from longscan.parallel.plan import Load, memory
from longscan.parallel.plan.activations import activation_bytes, batch_bytes, block_bytes, head_bytes, in_flight
from longscan.parallel.plan.memory import PROCESSORS, stage_params, temporaries

PRESETS = ("griffin-tiny", "based-tiny", "alibi-tiny", "linearized-tiny")
ROWS, TOKENS = 2, 384


class Gated(torch.autograd.Function):
    """Keeps what Liger's gated activations keep, and writes the gradients over it."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.saved_tensors


class Divided(LocalBackend):
    """The shapes of one of `size` tensor ranks, without the others."""

    def __init__(self, size):
        self.size = size

    def local(self, size):
        assert size % self.size == 0
        return size // self.size

    def part(self, size):
        return slice(0, self.local(size))

    def column_linear(self, inputs, outputs, bias, variance):
        return super().column_linear(inputs, self.local(outputs), bias, variance)

    def row_linear(self, inputs, outputs, bias, variance):
        return super().row_linear(self.local(inputs), outputs, bias, variance)

    def head_linear(self, inputs, heads, head_dim, variance):
        return super().head_linear(inputs, max(1, heads // self.size), head_dim, variance)

    def block_diagonal_linear(self, blocks, width, variance):
        return super().block_diagonal_linear(self.local(blocks), self.local(width), variance)

    def embedding(self, vocab_size, width, variance):
        return super().embedding(-(-vocab_size // self.size), width, variance)


class Piece:
    """The context of one of `size` ranks of a row, which keeps for the backward pass what a real one does."""

    def __init__(self, segments, size):
        self.segments, self.size = segments, size

    def left_halo(self, name, x, n, alone=False):
        return x, lambda: x.new_zeros(x.shape[0], (self.size - 1) * x.shape[1] if n is None else n, *x.shape[2:])

    def left_halos(self, entries, n, alone=False):
        halos = [self.left_halo(name, x, n)[1] for name, x in entries.items()]
        return list(entries.values()), lambda: [halo() for halo in halos]

    def initial_state(self, name, summarize):
        with torch.no_grad():
            state, _ = summarize()
        return Entry(lambda: torch.empty_like(state), lambda gradient: gradient)

    def leave(self, name, state):
        pass


@pytest.fixture
def on_gpu(monkeypatch):
    """Has the modules choose what they choose on a GPU, for tensors without values."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(loss, "_check_range", lambda *arguments: None)
    monkeypatch.setattr(fused, "runs", lambda x: True)
    monkeypatch.setattr(norm, "rms_norm", partial(rms_norm, implementation="triton"))
    monkeypatch.setattr(fused, "gated", lambda activation, gate, up: Gated.apply(gate, up))
    alibi_slopes.cache_clear()
    with FakeTensorMode():
        yield
    alibi_slopes.cache_clear()


def build(load, **options):
    torch.set_default_dtype(torch.bfloat16 if load.precision == "bf16" else torch.float32)
    backend = Divided(load.dims.tensor) if load.dims.tensor > 1 else LocalBackend()
    try:
        return LanguageModel(load.model, backend, "triton", **options)
    finally:
        torch.set_default_dtype(torch.float32)


def segments_of(load):
    rows, tokens = load.micro_rows, load.piece
    bounds = torch.empty(rows + 1, dtype=torch.int32)
    return Segments(bounds, torch.empty(rows, dtype=torch.bool), torch.empty(rows * tokens, dtype=torch.int32))


@contextmanager
def kept(without):
    """Collects the storages that autograd keeps, but for those of `without`."""
    found = {}
    ignored = {tensor.untyped_storage()._cdata for tensor in without}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            found[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def load_of(preset, mlp=None, **fields):
    model = config_from_mapping({**load_preset(preset), "vocab_size": 320, **({"mlp": mlp} if mlp else {})})
    return Load(model, **{"dims": ParallelDims(), "seq_len": TOKENS, "micro_rows": ROWS, **fields})


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "dims", [ParallelDims(), ParallelDims(tensor=2), ParallelDims(context=3)], ids=["one", "tensor", "context"]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_block_keeps_what_the_formula_says(on_gpu, preset, dims, precision):
    load = load_of(preset, dims=dims, precision=precision)
    model = build(load)
    for index, name in enumerate(load.model.mixers[:3]):
        segments = segments_of(load)
        # Kept once for all blocks.
        shared = [segments.positions, segments.resets, segments.doc_start]
        context = Piece(segments, dims.context) if dims.context > 1 else LocalContext(segments)
        x = torch.empty(load.micro_rows, load.piece, load.model.width, dtype=model.embedding.weight.dtype)
        with kept([*model.parameters(), *shared]) as found:
            y = model.blocks[index](x.requires_grad_(), context)
        assert y.shape == x.shape
        assert sum(storage.nbytes() for storage in found.values()) == block_bytes(load, name), name


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_plain_mlp_keeps_what_the_formula_says(on_gpu, activation):
    load = load_of("griffin-tiny", mlp={"gated": False, "activation": activation})
    model, segments = build(load), segments_of(load)
    shared = [segments.positions, segments.resets, segments.doc_start]
    x = torch.empty(load.micro_rows, load.piece, load.model.width, dtype=torch.bfloat16)
    with kept([*model.parameters(), *shared]) as found:
        model.blocks[0](x.requires_grad_(), LocalContext(segments))
    assert sum(storage.nbytes() for storage in found.values()) == block_bytes(load, "rg_lru")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_model_keeps_what_the_formula_says(on_gpu, monkeypatch, preset, checkpointing):
    load = load_of(preset, checkpointing=checkpointing)
    model, segments = build(load, activation_checkpoint=checkpointing), segments_of(load)
    tokens, labels = (torch.empty(ROWS, TOKENS, dtype=torch.int64) for _ in range(2))
    if checkpointing == "offload":
        sent_nowhere(monkeypatch)
    with kept(model.parameters()) as found:
        summed = model.cross_entropy(model.hidden(tokens, segments), labels)
    assert summed.shape == ()
    measured = sum(storage.nbytes() for storage in found.values())
    # Labels lie on the device whether autograd keeps them or not; what of the documents is kept depends on the mixers.
    assert 0 <= activation_bytes(load) - measured <= batch_bytes(load)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live, and the most there ever were."""

    def __init__(self, without):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in without}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                weakref.finalize(tensor.untyped_storage(), self.gone, key)
        self.most = max(self.most, self.now)
        return made

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def sent_nowhere(monkeypatch):
    """Has tensors leave for a host whose memory nobody counts, and come back as new ones."""

    class Nowhere(offload.HostStore):
        def _send(self, x, before):
            return offload._Sent(x.shape, {"dtype": x.dtype}, [x.shape], before)

        def _fetch(self, sent):
            sent.chunks = []
            return torch.empty(sent.shape, **sent.options), None

    monkeypatch.setattr(offload.HostStore, "_send", Nowhere._send)
    monkeypatch.setattr(offload.HostStore, "_fetch", Nowhere._fetch)
    monkeypatch.setattr(offload, "_goes", lambda x: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Arrived())


class Arrived:
    """A stream on which everything is there."""

    def wait_event(self, event):
        pass


@pytest.mark.timeout(400)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize(
    "preset, layers, tokens",
    [
        pytest.param("griffin-1.3b", 4, 2**16, marks=pytest.mark.slow),
        pytest.param("based-1.4b", 4, 2**16, marks=pytest.mark.slow),
        ("llama-1.3b", 2, 2**16),
    ],
)
def test_a_step_takes_what_the_plan_says(on_gpu, monkeypatch, preset, layers, tokens, checkpointing):
    """The most bytes that live at once in forward and backward, parameters and what kernels use inside aside."""
    load = load_of(preset, dims=ParallelDims(zero=0), seq_len=tokens, micro_rows=1, checkpointing=checkpointing)
    load = replace(load, model=replace(load.model, layers=layers, vocab_size=32000))
    model, segments = build(load, activation_checkpoint=checkpointing), segments_of(load)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    inputs, labels = (torch.empty(1, tokens, dtype=torch.int64) for _ in range(2))
    if checkpointing == "offload":
        sent_nowhere(monkeypatch)
    with Live(model.parameters()) as live:
        model.cross_entropy(model.hidden(inputs, segments), labels).backward()
    held = memory(load)
    planned = held.activations + held.temporary
    assert 0.98 * live.most <= planned <= 1.05 * live.most, (live.most / 2**30, planned / 2**30)


class Silent:
    """A group of three ranks whose middle one hears nothing from either side: what it takes has no values."""

    def rank(self):
        return 1

    def size(self):
        return 3

    def wait(self):
        pass


@pytest.fixture
def silent(monkeypatch):
    """Has pieces exchange in a Silent group, and the one pass that is no operator give tensors without values."""
    group = Silent()
    monkeypatch.setattr(torch.distributed, "P2POp", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.distributed, "batch_isend_irecv", lambda sent: [group])
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda *arguments, **options: group)
    monkeypatch.setattr(rg_lru, "_adjoint", lambda implementation, dh, *needed: dh.new_empty(dh[:, 0].shape).float())
    return group


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("mixer", ["rg_lru", "local_attention"])
def test_a_piece_of_a_row_takes_what_a_row_of_its_length_takes(on_gpu, silent, mixer, checkpointing):
    """But for the halo's keys and values, which stay below a tenth of a tensor of the piece."""
    most = []
    for size in (1, silent.size()):
        load = load_of("griffin-1.3b", dims=ParallelDims(context=size), seq_len=size * 2**15, micro_rows=1)
        load = replace(load, model=replace(load.model, layers=2, pattern=[mixer]))
        model, segments = build(load, activation_checkpoint=checkpointing), segments_of(load)
        pieces = [ContextParallelContext(segments, silent) for _ in model.blocks] if size > 1 else None
        inputs, labels = (torch.empty(1, load.piece, dtype=torch.int64) for _ in range(2))
        with Live(model.parameters()) as live:
            model.cross_entropy(model.hidden(inputs, segments, pieces), labels).backward()
        most.append(live.most)
    assert most[1] - most[0] <= 0.1 * load.piece * load.model.width * load.element, [most[1] / 2**20, most[0] / 2**20]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_a_rank(preset, tensor):
    load = load_of(preset, dims=ParallelDims(tensor=tensor))
    with torch.device("meta"):
        model = LanguageModel(load.model, Divided(tensor))
    held = sum(parameter.numel() for parameter in model.parameters())
    assert stage_params(load, 0) == held
    if tensor == 1:
        assert held == num_params(load.model)


def test_states_by_hand():
    load = load_of("griffin-tiny", dims=ParallelDims(data=2, context=2))
    params, share = num_params(load.model), -(-num_params(load.model) // 4)
    held = memory(load)
    assert (held.parameters, held.gradients, held.optimizer) == (2 * params, 4 * params, 12 * share)
    replicated = memory(replace(load, dims=ParallelDims(data=2, context=2, zero=0)))
    assert (replicated.gradients, replicated.optimizer) == (4 * params, 12 * params)
    fp32 = memory(replace(load, dims=ParallelDims(zero=0), precision="fp32"))
    assert (fp32.parameters, fp32.gradients, fp32.optimizer) == (4 * params, 4 * params, 8 * params)
    sharded = memory(replace(load, dims=ParallelDims(data=2, context=2, zero=3)))
    assert (sharded.parameters, sharded.gradients, sharded.optimizer) == (2 * share, 4 * share, 12 * share)
    offloaded = memory(replace(load, dims=ParallelDims(data=4, offload_optimizer=True)))
    assert (offloaded.optimizer, offloaded.host) == (0, 16 * share)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"),
    [
        (512, 2048, 32000),
        (4096, 2560, 32000),
        (16384, 2560, 32000),
        (4096, 2560, 100514),
        (16384, 2560, 100514),
        (8192, 4096, 512000),
        (40000, 8192, 32000),
    ],
)
def test_the_loss_takes_what_the_plan_says(monkeypatch, tokens, width, vocabulary, tensor, precision):
    """In one chunk, by rows and by columns, of a vocabulary that is rounded up; the last norm aside."""
    load = load_of("griffin-tiny", dims=ParallelDims(tensor=tensor, zero=0), seq_len=tokens, micro_rows=1)
    load = replace(load, model=replace(load.model, width=width, vocab_size=vocabulary), precision=precision)
    softmax = dict.fromkeys(("loss_and_gradient_", "gradient_", "statistics"), lambda *a, **options: None)
    softmax["scaled"] = lambda tensor, factor, dtype: torch.empty_like(tensor, dtype=dtype)
    monkeypatch.setattr(loss, "_module", lambda *a: SimpleNamespace(**softmax))
    monkeypatch.setattr(loss.chunks, "processors", lambda t: PROCESSORS)
    monkeypatch.setattr(loss.chunks, "_accumulate", lambda *a, **options: None)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with FakeTensorMode():
        hidden, table = (torch.empty(n, width, dtype=dtype) for n in (tokens, vocabulary // tensor))
        inputs = hidden, table, torch.empty(tokens, dtype=torch.int64)
        with Live(inputs) as live:
            if tensor == 1:
                keep = "logits" if precision == "bf16" and loss.chunks.at_once(tokens, width) else "gradient"
                made = loss._forward._function(*inputs, -100, 0.0, 0.0, 0.0, keep, "")
                context = SimpleNamespace(keep=keep, implementation="", saved_tensors=(hidden, table, *made[1:]))
                gradients = loss._gradients(context, made[0])[:2]
            else:
                pieces = loss._pieces._function(*inputs, 0.0, "")
                gradients = loss._pieces_backward._function(*inputs, *pieces, 0.0, False, "")
    norm = 2 * hidden.nbytes + 4 * tokens
    planned = temporaries(load)["the loss"] + (head_bytes(load) - norm if tensor == 1 else 0)
    assert len(gradients) == 2 and planned == pytest.approx(live.most, rel=3e-3)


def test_stages_of_a_pipeline_hold_the_model_once_but_for_a_tied_table():
    load = load_of("griffin-tiny", dims=ParallelDims(pipeline=3), micro_batches=8)
    held = sum(stage_params(load, stage) for stage in range(3))
    assert held == num_params(load.model) + load.model.vocab_size * load.model.width
    # 1F1B: the first rank has three micro-batches in flight, the last one.
    assert [in_flight(load, stage) for stage in range(3)] == [3, 2, 1]
    few = replace(load, micro_batches=2)
    assert [in_flight(few, stage) for stage in range(3)] == [2, 2, 1]
    one = batch_bytes(load) + block_bytes(load, "rg_lru") + TOKENS * ROWS * load.model.width * 2
    assert activation_bytes(load, 0) == 3 * one


def test_interleaving_keeps_more_in_flight_than_one_chunk():
    dims = ParallelDims(pipeline=2, interleave=2)
    load = load_of("based-tiny", dims=dims, micro_batches=8)
    # The first rank's warm-up is 2 + 2 passes of a chunk, and one more is at work: 5 chunks, each half of what it has.
    assert [in_flight(load, stage) for stage in range(2)] == [2.5, 1.5]


def test_recomputation_trades_what_is_kept_for_a_temporary():
    loads = [load_of("griffin-tiny", checkpointing=mode) for mode in ("none", "selective", "full", "offload")]
    kept_bytes = [activation_bytes(load) for load in loads]
    assert kept_bytes == sorted(kept_bytes, reverse=True)
    assert "a block computed again" in temporaries(loads[2])
    assert memory(loads[0]).total == sum(
        getattr(memory(loads[0]), key) for key in ("parameters", "gradients", "optimizer", "activations", "temporary")
    )
