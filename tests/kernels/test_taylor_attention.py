"""taylor_attention, reference and kernel, held to the quadratic form over all pairs in float64."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from longscan.kernels import (
    Segments,
    taylor_attention,
    taylor_attention_step,
    taylor_attention_summarize,
)

both_implementations = pytest.mark.parametrize("implementation", ["reference", "triton"])
documents = pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])


def make(batch, tokens, heads, key_dim, value_dim, dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
    """q, k, v and a state that keys could have left, so that its normaliser is one."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k, v = (draw(batch, tokens, heads, width) for width in (key_dim, key_dim, value_dim))
    state, _ = taylor_attention_summarize(draw(batch, 5, heads, key_dim), draw(batch, 5, heads, value_dim))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(device, dtype).requires_grad_() for t in (q, k, v)] + [state.to(device, wide).requires_grad_()]


def monomials(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1])
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j]], -1)


def coefficients(key_dim: int, scale: float) -> Tensor:
    i, j = torch.triu_indices(key_dim, key_dim)
    powers = [1.0] + [scale] * key_dim + [scale**2 * (0.5 if same else 1.0) for same in (i == j).tolist()]
    return torch.tensor(powers, dtype=torch.float64)


def pairs(q, k, v, state, segments, scale=None, normalize=True) -> tuple[Tensor, Tensor]:
    """The op as its docstring states it: every pair weighed, the state by its monomials."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens = q.shape[1]
    ids = torch.zeros(q.shape[:2]) if segments is None else segments.resets.cpu().cumsum(1)
    s = scale * torch.einsum("bihk,bjhk->bhij", q, k)
    live = torch.ones(tokens, tokens).tril().bool() & (ids[:, :, None] == ids[:, None])
    w = (1 + s + s**2 / 2) * live[:, None]
    extended = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums = torch.einsum("bhij,bjhv->bihv", w, extended)
    entered = torch.einsum("bihf,f,bhfv->bihv", monomials(q), coefficients(q.shape[-1], scale), state)
    sums = sums + entered * (ids == 0)[..., None, None]
    kept = (ids == ids[:, -1:])[..., None, None]
    final = torch.einsum("bjhf,bjhv->bhfv", monomials(k) * kept, extended)
    final = final + state * (ids[:, -1] == 0)[:, None, None, None]
    y = sums[..., :-1] / (sums[..., -1:] + 1e-6) if normalize else sums[..., :-1]
    return y, final


def with_gradients(function, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs and the gradients of every input for random gradients of every output."""
    outputs = function(*inputs)
    rng = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def run(inputs: list[Tensor], segments, implementation: str, **options) -> list[Tensor]:
    return with_gradients(lambda *a: taylor_attention(*a, segments, implementation=implementation, **options), inputs)


def run_exact(inputs: list[Tensor], segments, **options) -> list[Tensor]:
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    return with_gradients(lambda *a: pairs(*a, segments, **options), wide)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.cpu().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def assert_within_bar(kernel: list[Tensor], reference: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """The kernel's error is at most twice the reference's at the same precision, and a rounding of the dtype."""
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for position, (k, r, e) in enumerate(zip(kernel, reference, exact, strict=True)):
        assert k.dtype == r.dtype
        assert error(k, e) <= 2 * error(r, e) + floor, (
            f"output {position}: {error(k, e):.1e}, reference {error(r, e):.1e}"
        )


def cut_short(monkeypatch) -> None:
    """Lets the kernel cut chunks of 16 tokens, two to a piece, so that a short row has several of each."""
    from longscan.kernels.taylor_attention import kernel

    planned = kernel.plan

    def plan(k: Tensor, v: Tensor, whole: bool = False):
        cut = planned(k, v, whole)
        return cut if whole else dataclasses.replace(cut, pieces=-(-cut.chunks // 2))

    monkeypatch.setattr(kernel, "CHUNK", 16)
    monkeypatch.setattr(kernel, "WIDE_CHUNK", 16)
    monkeypatch.setattr(kernel, "plan", plan)


@documents
@pytest.mark.parametrize("tokens", [1, 63, 65, 200])
def test_reference_is_the_quadratic_form(documents, tokens, random_segments):
    inputs = make(2, tokens, 2, 5, 3)
    segments = random_segments(2, tokens, device="cpu") if documents else None
    for options in ({}, {"normalize": False, "scale": 0.7}):
        exact = run_exact(inputs, segments, **options)
        for one, other in zip(run(inputs, segments, "reference", **options), exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@documents
def test_gradcheck(documents, random_segments):
    inputs = make(2, 5, 1, 2, 2)
    segments = random_segments(2, 5, device="cpu") if documents else None
    assert torch.autograd.gradcheck(lambda *a: taylor_attention(*a, segments), inputs)
    assert torch.autograd.gradcheck(lambda *a: taylor_attention_summarize(*a, segments), inputs[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 16), (1, 63, 1, 8, 20), (1, 65, 1, 16, 64)], ids=str)
def test_kernel_within_bar(dtype, shape, device, random_segments):
    inputs = make(*shape, dtype=dtype, device=device)
    segments = random_segments(*shape[:2]) if shape[1] > 1 else None
    kernel, reference = (run(inputs, segments, implementation) for implementation in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(inputs, segments), dtype)


@documents
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "sums"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernel_over_many_chunks_and_pieces(documents, normalize, dtype, device, monkeypatch):
    cut_short(monkeypatch)
    inputs = make(2, 70, 1, 8, 16, dtype, device)
    segments = Segments.from_lengths([[70], [20, 20, 30]], [3, 0], device) if documents else None
    kernel, reference = (
        run(inputs, segments, implementation, normalize=normalize) for implementation in ("triton", "reference")
    )
    assert_within_bar(kernel, reference, run_exact(inputs, segments, normalize=normalize), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "shape", [(2, 1000, 3, 16, 64), (1, 513, 2, 24, 128), (1, 300, 2, 32, 32), (1, 3001, 1, 8, 64)], ids=str
)
def test_kernel_within_bar_at_length(dtype, shape, device, random_segments):
    if device != "cuda":
        pytest.skip("needs a CUDA GPU")
    inputs = make(*shape, dtype=dtype, device=device)
    for segments in (None, random_segments(*shape[:2])):
        kernel, reference = (run(inputs, segments, implementation) for implementation in ("triton", "reference"))
        assert_within_bar(kernel, reference, run_exact(inputs, segments), dtype)


@both_implementations
@pytest.mark.parametrize("seed", range(2))
def test_split_invariance(implementation, seed, device, random_segments, monkeypatch):
    """A sequence in two pieces through the state equals the whole, gradients too."""
    cut_short(monkeypatch)
    tokens, dtype = (97, torch.float64) if implementation == "reference" else (37, torch.float32)
    segments = random_segments(2, tokens, seed)
    cut = 30 - 7 * seed

    def whole(*inputs):
        return taylor_attention(*inputs, segments, implementation=implementation)

    def split(q, k, v, state):
        outputs = []
        for begin, end in ((0, cut), (cut, tokens)):
            piece = [t[:, begin:end] for t in (q, k, v)]
            y, state = taylor_attention(*piece, state, segments.split(begin, end), implementation=implementation)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    inputs = make(2, tokens, 1, 8, 4, dtype, device)
    tolerance = 1e-11 if implementation == "reference" else 2e-5
    for one, many in zip(with_gradients(whole, inputs), with_gradients(split, inputs), strict=True):
        torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)


@both_implementations
@documents
def test_summary_is_what_the_piece_does(implementation, documents, device, monkeypatch):
    """final == transition * initial + state, as values and as functions of every input."""
    cut_short(monkeypatch)
    tokens, dtype = (70, torch.float64) if implementation == "reference" else (40, torch.float32)
    segments = Segments.from_lengths([[tokens], [4, tokens - 4]], [5, 5], device) if documents else None
    inputs = make(2, tokens, 1, 8, 4, dtype, device)

    def final(k, v, state):
        return taylor_attention(k, k, v, state, segments, implementation=implementation)[1:]

    def composed(k, v, state):
        added, transition = taylor_attention_summarize(k, v, segments, implementation=implementation)
        assert transition.flatten().tolist() == [1.0, 0.0 if documents else 1.0]
        return (transition * state + added,)

    tolerance = 1e-11 if implementation == "reference" else 2e-5
    for one, other in zip(with_gradients(final, inputs[1:]), with_gradients(composed, inputs[1:]), strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@both_implementations
def test_no_leaks(implementation, device, monkeypatch):
    """A changed token moves no bit before it and none in other documents; gradients mirror that."""
    cut_short(monkeypatch)
    tokens, at = 40, 13
    segments = Segments.from_lengths([[8, 12, 20]], [3], device)
    inputs = make(1, tokens, 1, 8, 4, torch.float32, device)
    changed = [t.detach().clone().requires_grad_() for t in inputs]
    with torch.no_grad():
        for t in changed[:3]:
            t[:, at] *= 1.5

    def outputs_and_gradients(inputs, at=None):
        y, _ = taylor_attention(*inputs, segments, implementation=implementation)
        grad = torch.ones_like(y)
        if at is not None:
            grad[:, at, :, 0] += 1
        return y.detach(), torch.autograd.grad(y, inputs[:3], grad)

    before, gradients = outputs_and_gradients(inputs)
    after, _ = outputs_and_gradients(changed)
    moved = (before != after).flatten(2).any(-1)[0].nonzero().view(-1).tolist()
    assert moved and min(moved) == at and max(moved) < 20
    _, others = outputs_and_gradients(inputs, at)
    for one, other in zip(gradients, others, strict=True):
        moved = (one != other).flatten(2).any(-1)[0].nonzero().view(-1).tolist()
        assert moved and min(moved) >= 8 and max(moved) == at


@both_implementations
def test_same_bits_twice(implementation, device, random_segments):
    inputs = make(2, 35, 1, 8, 4, torch.float32, device)
    segments = random_segments(2, 35)
    one, two = (run(inputs, segments, implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@both_implementations
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "sums"])
def test_steps_are_the_sequence(implementation, normalize, device, monkeypatch):
    """From an empty state and from one that entered; by the kernel over several blocks of features and of v's dims."""
    if implementation == "triton":
        from longscan.kernels.taylor_attention import kernel

        monkeypatch.setattr(kernel, "STEP_TILE", 32 * 16)
    reference = implementation == "reference"
    dtype, tolerance = (torch.float64, 1e-10) if reference else (torch.float32, 1e-5)
    q, k, v, entered = (t.detach() for t in make(2, 9, 2, 8, 20, dtype, device))
    options = {"normalize": normalize, "implementation": implementation}
    for state in (entered, torch.zeros_like(entered)):
        whole, final = taylor_attention(q, k, v, state, normalize=normalize, implementation="reference")
        kept = state.clone()
        for t in range(9):
            y, after = taylor_attention_step(q[:, t], k[:, t], v[:, t], state, **options)
            assert torch.equal(state, kept)
            torch.testing.assert_close(y, whole[:, t], rtol=tolerance, atol=tolerance)
            state, kept = after, after.clone()
        torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (3, 50, 16, 64), (2, 3, 32, 128)], ids=str)
def test_step_within_bar(shape, dtype, device):
    """With the state in fp32 whatever the inputs are, few rows and many."""
    batch, heads, key_dim, value_dim = shape
    *inputs, state = (t.detach() for t in make(batch, 1, heads, key_dim, value_dim, dtype, device))
    inputs = [t[:, 0] for t in inputs] + [state]
    kernel, reference = (taylor_attention_step(*inputs, implementation=i) for i in ("triton", "reference"))
    exact = taylor_attention_step(*(t.cpu().double() for t in inputs))
    assert_within_bar(list(kernel), list(reference), list(exact), dtype)


def test_step_has_gradients_where_it_may_choose(device):
    inputs = [t[:, 0] for t in make(1, 1, 1, 8, 4, torch.float32, device)[:3]]
    state = torch.zeros(1, 1, 45, 5, device=device, requires_grad=True)
    y, _ = taylor_attention_step(*inputs, state)
    assert torch.autograd.grad(y.sum(), state)[0].abs().sum() > 0
    with pytest.raises(TypeError, match=r"state is torch.bfloat16; the kernel takes torch.float32"):
        taylor_attention_step(*inputs, state.bfloat16(), implementation="triton")


@both_implementations
def test_strided_inputs(implementation, device):
    inputs = make(1, 6, 2, 8, 4, torch.float32, device)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in inputs]
    for one, other in zip(run(inputs, None, implementation), run(strided, None, implementation), strict=True):
        torch.testing.assert_close(one, other)


@both_implementations
def test_compiles_and_checkpoints(implementation, device):
    def loss(*inputs):
        y, final = taylor_attention(*inputs, implementation=implementation)
        state, _ = taylor_attention_summarize(*inputs[1:3], implementation=implementation)
        return y.square().sum() + (final * state).sum()

    inputs = make(1, 9, 1, 8, 4, torch.float32, device)
    plain = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    checkpointed = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)
    for other in (compiled(*inputs), checkpointed):
        for one, two in zip(plain, torch.autograd.grad(other, inputs), strict=True):
            torch.testing.assert_close(two, one)


def test_bad_arguments_are_named(device):
    q, k, v, state = (t.detach().float() for t in make(2, 3, 2, 8, 4))
    with pytest.raises(ValueError, match=r"q has shape \[2, 3, 2, 7\], expected \[2, 3, 2, 8\]"):
        taylor_attention(q[..., :7], k, v)
    with pytest.raises(ValueError, match=r"initial_state has shape \[2, 2, 45, 4\], expected \[2, 2, 45, 5\]"):
        taylor_attention(q, k, v, state[..., :4])
    with pytest.raises(ValueError, match=r"scale=0, expected > 0"):
        taylor_attention(q, k, v, scale=0)
    with pytest.raises(ValueError, match=r"segments describe 2 rows of 4 tokens"):
        taylor_attention_summarize(k, v, Segments.whole(2, 4))
    q, k, v = (t.to(device) for t in (q, k, v))
    with pytest.raises(ValueError, match=r"K=7, V=4: the kernel takes K 8 to 32"):
        taylor_attention(q[..., :7], k[..., :7], v, implementation="triton")
    with pytest.raises(TypeError, match=r"the kernel takes one dtype"):
        taylor_attention(q.half(), k, v, implementation="triton")


# In a process of its own: here triton may be in interpreter mode, where nothing compiles.
BUILD = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longscan.kernels.taylor_attention import kernel as taylor

VALUES = {"C": 128, "PART": taylor.PART, "APART": True, "KEY_DIM": 16, "VALUE_DIM": 64, "BLOCK_K": 16, "BLOCK_V": 64,
          "BLOCK_F": taylor.BLOCK, "F_PADDED": 160, "OPERAND": tl.bfloat16, "PRECISION": "tf32", "REVERSE": True,
          "NORMALIZE": True}
KINDS = {"scale": "fp32", "eps": "fp32", "p_ids": "*i32", "p_entries": "*i32"}
SINGLE = {"p_outer", "p_summary", "p_sums", "p_entering_sums", "p_last", "p_inverse", "p_drop", "p_weights", "p_state",
          "p_next"}


def kind(name):
    if name in VALUES:
        return "constexpr"
    return KINDS.get(name, ("*fp32" if name in SINGLE else "*bf16") if name.startswith("p_") else "i32")


def build(kernel, warps, stages, registers=None, **sizes):
    values = VALUES | sizes
    signature = {name: kind(name) for name in kernel.arg_names}
    constants = {(i,): values[n] for i, n in enumerate(kernel.arg_names) if n in values}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, "wgmma" in built.asm["ptx"])


states = {"warps": taylor.STATE_WARPS, "stages": taylor.STATE_STAGES, "BLOCK_F": taylor.STATE_BLOCK}
build(taylor._states, p_y=None, **states)
build(taylor._states, p_drop=None, p_states=None, p_sums=None, **states)
for kernel in (taylor._outputs, taylor._query_gradients, taylor._key_gradients):
    build(kernel, 8, taylor.STAGES, taylor.REGISTERS)
build(taylor._fold, taylor.FOLD_WARPS, 3, BLOCK_F=taylor.FOLD_BLOCK, STAGES=taylor.FOLD_STAGES)
build(taylor._step, 8, 3, BLOCK_F=256)
"""


def test_kernels_compile_for_sm_90(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 7 and all(line.endswith("True") for line in lines[:5]), f"no tensor cores: {done.stdout}"
