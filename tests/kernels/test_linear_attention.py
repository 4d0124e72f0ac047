"""linear_attention, reference and kernel, held to the sum over all pairs in float64."""

import dataclasses

import pytest
import torch
from sass import printed
from torch import Tensor

from longscan.kernels import (
    Segments,
    linear_attention,
    linear_attention_step,
    linear_attention_summarize,
)

both_implementations = pytest.mark.parametrize("implementation", ["reference", "triton"])
documents = pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
MODES = {
    "plain": {"normalize": False},
    "normalized": {"scale": 0.7},
    "grouped": {"group": 12, "scale": 0.7},
    "grouped sums": {"group": 5, "normalize": False},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)
# Groups longer than a chunk.
LONG = {"long groups": {"group": 20}, "long grouped sums": {"group": 100, "normalize": False}}
decays = pytest.mark.parametrize("decays", [False, True], ids=["sums", "decays"])


def make(
    batch, tokens, heads, key_dim, value_dim, dtype=torch.float64, device="cpu", shared=1, group=None, normalize=True,
    decays=None, seed=0, **_,
) -> dict[str, Tensor]:  # fmt: skip
    """Inputs with positive features, and a state that keys could have left; without groups with decays."""
    rng = torch.Generator().manual_seed(seed)

    def draw(heads, *shape, length=tokens):
        return torch.randn(batch, length, heads, *shape, generator=rng, dtype=torch.float64)

    key = {"length": 19}
    k, v = draw(heads, key_dim, **key).exp(), draw(heads, value_dim, **key)
    state, _ = linear_attention_summarize(k, v, group=group, normalize=normalize)
    inputs = {"q": draw(heads * shared, key_dim).abs(), "k": draw(heads, key_dim).abs(), "v": draw(heads, value_dim)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {name: t.to(device, dtype) for name, t in inputs.items()}
    inputs["initial_state"] = state.to(device, wide)
    decays = group is None if decays is None else decays
    if decays:
        inputs["log_a"] = (-0.1 * draw(heads).exp()).to(device, wide)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def pairs(q, k, v, initial_state, log_a=None, segments=None, group=None, scale=1.0, normalize=True):
    """The op as its docstring states it: every pair weighed, the state as if its parts were two more keys."""
    batch, tokens, heads, _ = q.shape
    shared = heads // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    state = initial_state.repeat_interleave(shared, 1)
    log_a = torch.zeros(k.shape[:3], dtype=k.dtype) if log_a is None else log_a.repeat_interleave(shared, 2)
    if segments is None:
        ids, positions = torch.zeros(batch, tokens), torch.arange(tokens).expand(batch, tokens)
    else:
        ids, positions = segments.resets.cpu().cumsum(1), segments.positions.cpu()
    live = ids[:, :, None] == ids[:, None]
    if group is None:
        live = live & torch.ones(tokens, tokens).tril().bool()
    else:
        live = live & (positions[:, :, None] // group > positions[:, None] // group)
    reach = log_a.cumsum(1)
    gap = (reach[:, :, None] - reach[:, None]).masked_fill(~live[..., None], 0)
    w = scale * torch.einsum("bihk,bjhk->bijh", q, k) * gap.exp() * live[..., None]
    extended = torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v
    read = state[:, None]
    if group is not None:
        opened = positions // group == (positions[:, :1] - 1) // group
        read = state[:, None, :, 0] - state[:, None, :, 1] * opened[..., None, None, None]
    entered = torch.einsum("bihk,bih,bihkv->bihv", q, reach.exp(), read.expand(-1, tokens, -1, -1, -1))
    entered = entered * (ids == 0)[..., None, None]
    sums = torch.einsum("bijh,bjhv->bihv", w, extended) + scale * entered
    y = sums
    if normalize:
        y = torch.where(sums[..., -1:] == 0, 0, sums[..., :-1] / (sums[..., -1:] + 1e-6))

    def left(kept, carried, state):
        rest = (reach[:, -1:] - reach).masked_fill(~kept[..., None], 0).exp() * kept[..., None]
        added = torch.einsum("bjhk,bjh,bjhv->bhkv", k, rest, extended)[:, ::shared]
        return added + (state * (carried[:, None] * reach[:, -1].exp())[..., None, None])[:, ::shared]

    kept, carried = ids == ids[:, -1:], ids[:, -1] == 0
    if group is None:
        return y, left(kept, carried, state)
    last = positions[:, -1:] // group
    same = kept & (positions // group == last)
    stays = carried & ((positions[:, 0] - 1) // group == last[:, 0])
    return y, torch.stack([left(kept, carried, state[:, :, 0]), left(same, stays, state[:, :, 1])], 2)


def with_gradients(function, inputs: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs and the gradients of every input for random gradients of every output."""
    outputs = function(**inputs)
    rng = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, list(inputs.values()), grads))


def run(inputs: dict[str, Tensor], segments, implementation: str, **options) -> list[Tensor]:
    return with_gradients(
        lambda **a: linear_attention(**a, segments=segments, implementation=implementation, **options), inputs
    )


def run_exact(inputs: dict[str, Tensor], segments, **options) -> list[Tensor]:
    wide = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.items()}
    return with_gradients(lambda **a: pairs(**a, segments=segments, **options), wide)


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


def cut_short(monkeypatch, pieces: int = 2) -> None:
    """Lets the kernel cut chunks of 16 tokens, and rows into `pieces`, so that a short row has several of each."""
    from longscan.kernels.linear_attention import cuts, grouped

    monkeypatch.setattr(cuts, "UNIT", 16)
    monkeypatch.setattr(cuts, "PROGRAMS", pieces * 2)
    monkeypatch.setattr(grouped, "BLOCK", 16)


def packed(tokens: int, device: str = "cpu") -> Segments:
    """Two rows, one that goes on with a document and one of several."""
    return Segments.from_lengths([[tokens], [9, 4, tokens - 13]], [5, 3], device)


@documents
@decays
@modes
@pytest.mark.parametrize("tokens", [1, 63, 150])
def test_reference_is_the_sum_over_pairs(options, decays, documents, tokens, random_segments):
    inputs = make(2, tokens, 2, 5, 3, shared=2, decays=decays, **options)
    segments = random_segments(2, tokens, device="cpu") if documents and tokens > 1 else None
    exact = run_exact(inputs, segments, **options)
    for one, other in zip(run(inputs, segments, "reference", **options), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@documents
def test_gradcheck(documents, random_segments):
    segments = random_segments(2, 5, device="cpu") if documents else None
    for options in MODES.values():
        inputs = make(2, 5, 1, 2, 2, decays=True, **options)
        names = list(inputs)

        def op(*values, names=names, options=options):
            return linear_attention(**dict(zip(names, values, strict=True)), segments=segments, **options)

        assert torch.autograd.gradcheck(op, list(inputs.values()))


HALVES = [
    (torch.float32, (1, 1, 1, 16, 16)),
    (torch.float32, (1, 63, 1, 20, 24)),
    (torch.bfloat16, (1, 65, 1, 16, 40)),
    (torch.bfloat16, (1, 35, 1, 17, 16)),
    (torch.float16, (1, 50, 1, 24, 16)),
]


@pytest.mark.parametrize(("dtype", "shape"), HALVES, ids=str)
@modes
def test_kernel_within_bar(options, dtype, shape, device, random_segments):
    inputs = make(*shape, dtype=dtype, device=device, **options)
    segments = random_segments(*shape[:2]) if shape[1] > 1 else None
    kernel, reference = (run(inputs, segments, i, **options) for i in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(inputs, segments, **options), dtype)


# Each mode with and without documents, without groups also decays, and in one piece and several.
CUTS = [
    ("plain", False, False, 1),
    ("plain", True, True, 4),
    ("normalized", True, False, 4),
    ("normalized", False, True, 1),
    ("grouped", False, False, 4),
    ("grouped", False, True, 4),
    ("grouped", False, True, 1),
    ("grouped sums", False, False, 1),
    ("grouped sums", False, True, 4),
    ("long groups", False, False, 1),
    ("long groups", False, True, 4),
    ("long grouped sums", False, False, 4),
]


@pytest.mark.parametrize("twin", [True, False], ids=["dv and dk together", "apart"])
@pytest.mark.parametrize(("mode", "decays", "documents", "pieces"), CUTS, ids=str)
def test_kernel_over_many_chunks_and_pieces(mode, decays, documents, pieces, twin, device, monkeypatch):
    from longscan.kernels.linear_attention import kernel as module

    # Two rows of four query heads.
    cut_short(monkeypatch, 4 * pieces)
    monkeypatch.setattr(module, "TWIN_WIDTH", 16 if twin else 15)
    options = (MODES | LONG)[mode]
    inputs = make(2, 50, 2, 16, 16, torch.float32, device, shared=2, decays=decays, **options)
    segments = Segments.from_lengths([[9, 4, 37], [20, 30]], [3, 0], device) if documents else None
    kernel, reference = (run(inputs, segments, i, **options) for i in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(inputs, segments, **options), torch.float32)


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "twin"), [(64, 64, True), (16, 40, True), (65, 64, False), (64, 65, False)]
)
def test_gradients_of_keys_share_a_walk_that_holds_the_state(key_dim, value_dim, twin, monkeypatch):
    import triton.language as tl

    from longscan.kernels.linear_attention import kernel

    k, v = torch.empty(1, 50, 1, key_dim), torch.empty(1, 50, 1, value_dim)
    cut = dataclasses.replace(kernel.plan(k, k, v, None, True), operand=tl.bfloat16)
    runs = []
    monkeypatch.setattr(kernel, "_run", lambda *a, **options: runs.append(options))
    for decay, together in ((None, twin), (torch.empty(1, 1, 50), False)):
        runs.clear()
        rows = kernel.Rows(decay, None, None)
        kernel._run_keys(cut, k, v, k, v, k, v, rows, None, None, None, normalize=True)
        assert len(runs) == (1 if together else 2)
    # What is fetched ahead shares a multiprocessor's memory: of three tensors or four, and a normaliser's.
    plain = dataclasses.replace(cut, width=value_dim)
    stages = [p.tile(key_dim, value_dim, twin).stages for p in (plain, cut) for twin in (False, True)]
    assert stages == ([4, 3, 3, 2] if key_dim <= 64 else [2] * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(2, 1000, 2, 64, 64), (1, 513, 2, 128, 80), (1, 300, 1, 256, 256)], ids=str)
@pytest.mark.parametrize("options", (MODES | LONG).values(), ids=MODES | LONG)
def test_kernel_within_bar_at_length(options, dtype, shape, device, random_segments):
    if device != "cuda":
        pytest.skip("needs a CUDA GPU")
    segments = random_segments(*shape[:2])
    # The widest kernels take seconds each to compile.
    cases = (
        [(1, False, None), (2, True, segments)]
        if shape[3] == 256
        else [(shared, decays, s) for shared, decays in ((1, False), (2, True)) for s in (None, segments)]
    )
    for shared, decays, s in cases:
        decays &= "group" not in options
        inputs = make(*shape, dtype=dtype, device=device, shared=shared, decays=decays, **options)
        kernel, reference = (run(inputs, s, i, **options) for i in ("triton", "reference"))
        assert_within_bar(kernel, reference, run_exact(inputs, s, **options), dtype)


@pytest.mark.parametrize("pieces", [1, 4])
@modes
def test_no_state_is_one_of_zeros(options, pieces, device, monkeypatch):
    cut_short(monkeypatch, pieces)
    inputs = make(2, 50, 1, 16, 16, torch.float32, device, **options)
    zeros = torch.zeros_like(inputs.pop("initial_state"))
    alone = run(inputs, None, "triton", **options)
    given = run(inputs | {"initial_state": zeros.requires_grad_()}, None, "triton", **options)
    assert all(torch.equal(one, other) for one, other in zip(alone, given[:-1], strict=True))


@both_implementations
@modes
def test_split_invariance(implementation, options, device, random_segments, monkeypatch):
    """A sequence in pieces through the state, cut anywhere in a group, equals the whole, gradients too."""
    cut_short(monkeypatch)
    tokens, dtype = (97, torch.float64) if implementation == "reference" else (37, torch.float32)
    segments = random_segments(2, tokens, 3)
    options = options | {"implementation": implementation}

    def whole(**inputs):
        return linear_attention(**inputs, segments=segments, **options)

    def split(initial_state, **inputs):
        outputs, state = [], initial_state
        for begin, end in ((0, 3), (3, 30), (30, tokens)):
            piece = {name: t[:, begin:end] for name, t in inputs.items()}
            y, state = linear_attention(**piece, initial_state=state, segments=segments.split(begin, end), **options)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    inputs = make(2, tokens, 1, 8, 4, dtype, device, **options)
    tolerance = 1e-10 if implementation == "reference" else 5e-5
    for one, many in zip(with_gradients(whole, inputs), with_gradients(split, inputs), strict=True):
        torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)


@both_implementations
@documents
@modes
def test_summary_is_what_the_piece_does(implementation, options, documents, device, monkeypatch):
    """final == transition * initial + state, as values and as functions of every input."""
    cut_short(monkeypatch, 3 if documents else 1)
    tokens, dtype = (70, torch.float64) if implementation == "reference" else (40, torch.float32)
    segments = packed(tokens, device) if documents else None
    inputs = make(2, tokens, 1, 8, 4, dtype, device, **options)
    del inputs["q"]

    def final(**inputs):
        op_inputs = inputs | {"q": inputs["k"]}
        return linear_attention(**op_inputs, segments=segments, implementation=implementation, **options)[1:]

    def composed(initial_state, **inputs):
        kept = {name: options[name] for name in ("group", "normalize") if name in options}
        added, transition = linear_attention_summarize(
            **inputs, segments=segments, implementation=implementation, **kept
        )
        gone = transition.flatten(1)[-1] == 0
        assert gone.all() if documents else gone.tolist() == ([False, True] if "group" in options else [False])
        return (transition * initial_state + added,)

    tolerance = 1e-11 if implementation == "reference" else 2e-5
    for one, other in zip(with_gradients(final, inputs), with_gradients(composed, inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@both_implementations
def test_a_piece_inside_a_group_keeps_it_open(implementation, device):
    segments = Segments.from_lengths([[7]], [9], device)
    inputs = make(1, 7, 1, 8, 4, torch.float32, device)
    k, v = (inputs[name] for name in ("k", "v"))
    for group, opened in ((20, True), (16, True), (15, False), (9, False)):
        state, transition = linear_attention_summarize(k, v, None, segments, group=group, implementation=implementation)
        assert (transition[0, 0].flatten() > 0).tolist() == [True, opened]
        assert torch.equal(state[:, :, 0], state[:, :, 1]) == (opened or group == 9)


@both_implementations
@modes
def test_no_leaks(implementation, options, device, monkeypatch):
    """A changed token moves no bit before it, in its open group or in other documents; gradients mirror that."""
    cut_short(monkeypatch)
    tokens, at, group = 40, 13, options.get("group")
    segments = Segments.from_lengths([[8, 20, 12]], [3], device)
    options = options | {"segments": segments, "implementation": implementation}
    inputs = make(1, tokens, 1, 8, 4, torch.float32, device, **options)
    first = at if group is None else 8 + ((at - 8) // group + 1) * group
    changed = {name: t.detach().clone() for name, t in inputs.items()}
    for name in ("k", "v"):
        changed[name][:, at] *= 1.5
    y, others = linear_attention(**inputs, **options)[0], linear_attention(**changed, **options)[0]
    moved = (y != others).flatten(2).any(-1)[0].nonzero().view(-1).tolist()
    assert min(moved) == first and max(moved) == 27
    for at, begin, end in ((first, 8, first if group is None else first - 1), (4, 0, 4)):
        gradients = torch.autograd.grad(y[:, at].sum(), [inputs["k"], inputs["v"]], retain_graph=True)
        for gradient in gradients:
            reached = gradient.flatten(2).any(-1)[0].nonzero().view(-1).tolist()
            assert not reached or (min(reached) >= begin and max(reached) <= end)


@pytest.mark.parametrize("group", [None, 12])
@pytest.mark.parametrize("pieces", [1, 4])
def test_the_states_of_the_pieces_have_the_room_that_is_promised(group, pieces, device, monkeypatch):
    from longscan.kernels.linear_attention import kernel
    from longscan.kernels.linear_attention.op import _groups

    cut_short(monkeypatch, pieces)
    q, k, v = (t.detach() for n, t in make(2, 50, 1, 16, 16, torch.float32, device).items() if n in "qkv")
    groups = _groups(None, k, group)
    _, final, _, entering = kernel.forward(group or 0, q, k, v, None, None, None, groups, 1.0, True, 1e-6)
    assert entering.shape == kernel.room(q, v, None, final.shape).shape
    _, _, _, entering = kernel.forward(group or 0, q, k, v, None, final, None, groups, 1.0, True, 1e-6)
    assert entering.shape == kernel.room(q, v, final, final.shape).shape
    assert entering.shape[2] == pieces + (group is not None)


WIDE = [(torch.float32, 8, 4)]
WIDE += [
    pytest.param(dtype, dim, dim, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.half) for dim in (64, 128)
]


@pytest.mark.parametrize(("dtype", "key_dim", "value_dim"), WIDE)
@pytest.mark.parametrize("tokens", [40, 150])
def test_a_first_group_leaves_the_same_bits_twice(dtype, key_dim, value_dim, tokens, device):
    """As the sum over all keys and as that over the open group, whose difference is what its queries read."""
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("needs a CUDA GPU")
    inputs = make(2, tokens, 2, key_dim, value_dim, dtype, device)
    segments = Segments.from_lengths([[tokens], [7, tokens - 7]], device=device)
    q, k, v = (inputs[name].detach() for name in "qkv")
    _, final = linear_attention(q, k, v, segments=segments, group=tokens, implementation="triton")
    state, _ = linear_attention_summarize(k, v, segments=segments, group=tokens, implementation="triton")
    for both, opened in (final.unbind(2), state.unbind(2)):
        assert torch.equal(both, opened)


@both_implementations
def test_first_group_reads_zero(implementation, device, monkeypatch):
    cut_short(monkeypatch)
    inputs = make(1, 40, 1, 8, 4, torch.float32, device, group=12)
    del inputs["initial_state"]
    y, _ = linear_attention(**inputs, group=12, implementation=implementation)
    assert (y[:, :12] == 0).all() and (y[:, 12:] != 0).all()


@both_implementations
def test_strong_decay_stays_finite(implementation, device, monkeypatch):
    cut_short(monkeypatch)
    inputs = make(1, 40, 1, 8, 4, torch.float32, device)
    with torch.no_grad():
        inputs["log_a"].fill_(-1e4)
    y, *others = run(inputs, None, implementation)
    torch.testing.assert_close(y, inputs["v"].detach(), rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in others)


@both_implementations
@pytest.mark.parametrize("group", [None, 6])
def test_same_bits_twice(implementation, group, device, random_segments):
    inputs = make(2, 35, 1, 8, 4, torch.float32, device, group=group)
    segments = random_segments(2, 35)
    one, two = (run(inputs, segments, implementation, group=group) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@decays
@modes
def test_steps_are_the_sequence(options, decays):
    inputs = make(2, 29, 2, 8, 4, shared=2, decays=decays, **options)
    state = torch.zeros_like(inputs.pop("initial_state"))
    q, k, v = (inputs[name] for name in "qkv")
    log_a = inputs.get("log_a")
    whole, final = linear_attention(q, k, v, log_a, segments=Segments.whole(2, 29), **options)
    for t in range(29):
        decay = None if log_a is None else log_a[:, t]
        position = torch.full((2,), t)
        y, state = linear_attention_step(q[:, t], k[:, t], v[:, t], decay, state, position, **options)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@both_implementations
def test_strided_inputs(implementation, device):
    inputs = make(1, 6, 2, 8, 4, torch.float32, device)
    strided = {n: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for n, t in inputs.items()}
    for one, other in zip(run(inputs, None, implementation), run(strided, None, implementation), strict=True):
        torch.testing.assert_close(one, other)


@both_implementations
@pytest.mark.parametrize("group", [None, 4])
def test_compiles_and_checkpoints(implementation, group, device):
    inputs = make(1, 9, 1, 8, 4, torch.float32, device, group=group)
    names = list(inputs)

    def loss(*values):
        given = dict(zip(names, values, strict=True))
        options = {"group": group, "implementation": implementation}
        y, final = linear_attention(**given, **options)
        state, transition = linear_attention_summarize(given["k"], given["v"], given.get("log_a"), **options)
        return y.square().sum() + (final * (state + transition)).sum()

    values = list(inputs.values())
    plain = torch.autograd.grad(loss(*values), values)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    checkpointed = torch.utils.checkpoint.checkpoint(loss, *values, use_reentrant=False)
    for other in (compiled(*values), checkpointed):
        for one, two in zip(plain, torch.autograd.grad(other, values), strict=True):
            torch.testing.assert_close(two, one)


def test_bad_arguments_are_named(device):
    inputs = {name: t.detach().float() for name, t in make(2, 3, 2, 8, 4).items()}
    q, k, v, state, log_a = inputs.values()
    with pytest.raises(ValueError, match=r"q has shape \[2, 3, 2, 7\], expected \[2, 3, 2, 8\]"):
        linear_attention(q[..., :7], k, v)
    with pytest.raises(ValueError, match=r"q has shape \[2, 3, 1, 8\], expected \[B, T, H, K\] with H a multiple of 2"):
        linear_attention(q[:, :, :1], k, v)
    with pytest.raises(ValueError, match=r"log_a has shape \[2, 3, 1\], expected \[2, 3, 2\]"):
        linear_attention_summarize(k, v, log_a[..., :1])
    with pytest.raises(ValueError, match=r"initial_state has shape \[2, 2, 8, 5\], expected \[2, 2, 2, 8, 5\]"):
        linear_attention(q, k, v, initial_state=state, group=2)
    with pytest.raises(ValueError, match=r"group=0, expected >= 1"):
        linear_attention(q, k, v, group=0)
    with pytest.raises(ValueError, match=r"position has shape None, expected \[2\] with group=2"):
        linear_attention_step(q[:, 0], k[:, 0], v[:, 0], None, state[:, :, None].repeat(1, 1, 2, 1, 1), group=2)
    with pytest.raises(ValueError, match=r"segments describe 2 rows of 4 tokens"):
        linear_attention_summarize(k, v, segments=Segments.whole(2, 4))
    q, k, v = (t.to(device) for t in (q, k, v))
    with pytest.raises(ValueError, match=r"K=264, V=4: the kernel takes up to 256"):
        linear_attention(q.repeat(1, 1, 1, 33), k.repeat(1, 1, 1, 33), v, implementation="triton")
    with pytest.raises(ValueError, match=r"log_a with group=2: the kernel takes one of them"):
        linear_attention(q, k, v, log_a.to(device), group=2, implementation="triton")
    with pytest.raises(TypeError, match=r"the kernel takes one dtype"):
        linear_attention(q.half(), k, v, implementation="triton")


# In a process of its own: here triton may be in interpreter mode, where nothing compiles.
BUILD = """
import triton.language as tl
from sass import compiled, lost
from longscan.kernels.linear_attention import grouped, kernel as linear

SINGLE = {"p_inverse", "p_drop", "p_decay", "p_decays", "p_ddecay", "p_entering", "p_leaving", "p_sums", "p_initial",
          "p_last", "p_opened"}
INTEGERS = {"p_documents", "p_groups", "p_marks", "p_ids"}
VALUES = {"C": 64, "BLOCK_X": 64, "BLOCK_U": 64, "BLOCK_K": 64, "BLOCK_V": 32, "BLOCK": 256, "SHARED": 1,
          "OPERAND": tl.bfloat16, "PRECISION": "tf32", "x_dim": 64, "u_dim": 64, "key_dim": 64, "value_dim": 64}


def kind(name):
    if name.startswith("p_"):
        return "*fp32" if name in SINGLE else "*i32" if name in INTEGERS else "*bf16"
    return "fp32" if name in {"scale", "eps"} else "i32"


def build(kernel, *absent, **values):
    values = VALUES | dict.fromkeys(absent) | values
    built = compiled(kernel, values, kind, num_warps=4, num_stages=2)
    print(kernel.__name__, "wgmma" in built.asm["ptx"], lost(built.asm["cubin"]))


every = {"SHARING": 1, "NORMALIZE": True, "TRANSPOSED": False, "REVERSE": False}
single = ("p_twin", "p_twin_out")
build(linear._walk, "p_result", "p_drop", "p_states", *single, **every)
build(linear._walk, "p_leaving", *single, **every | {"TRANSPOSED": True})
build(linear._walk, "p_result", *single, **every | {"TRANSPOSED": True, "REVERSE": True, "SHARING": 2})
build(linear._walk, "p_result", **every | {"REVERSE": True, "SHARING": 2})
# The adjoint of a summary.
alone = ("p_x", "p_out", "p_drop", "p_entering", "p_states", *single)
build(linear._walk, *alone, **every | {"TRANSPOSED": True, "REVERSE": True, "SHARING": 2})
plain = ("p_result", "p_drop", "p_inverse", "p_decay", "p_documents", "p_states", "p_leaving")
build(linear._walk, *plain, *single, **every | {"NORMALIZE": False, "REVERSE": True})
build(linear._walk, *plain, **every | {"NORMALIZE": False, "REVERSE": True})
# Columns of 16 and a width of 40, where ptxas lost one.
narrow = {"NORMALIZE": False, "TRANSPOSED": True, "x_dim": 40, "u_dim": 16, "BLOCK_U": 16}
alone = ("p_result", "p_inverse", "p_drop", "p_leaving", *single)
build(linear._walk, *alone, **every | narrow)
build(linear._walk, *alone, **every | narrow | {"REVERSE": True})
build(linear._decay_gradients, **every)
grouped_walk = every | {"DOCUMENTS": True, "WHOLE": True, "LAST": False}
build(grouped.walk_groups, "p_result", "p_drop", *single, **grouped_walk)
build(grouped.walk_groups, "p_leaving", *single, **grouped_walk | {"TRANSPOSED": True, "WHOLE": False})
build(grouped.walk_groups, "p_result", *single, **grouped_walk | {"TRANSPOSED": True, "REVERSE": True, "SHARING": 2})
build(grouped.walk_groups, "p_result", **grouped_walk | {"REVERSE": True, "SHARING": 2})
alone = ("p_x", "p_out", "p_drop", "p_entering", "p_opened", *single)
build(grouped.walk_groups, *alone, **grouped_walk | {"TRANSPOSED": True, "REVERSE": True, "LAST": True})
build(linear._fold, REVERSE=True, STAGES=linear.FOLD_STAGES)
build(grouped._mark)
"""


def test_kernels_compile_for_sm_90(tmp_path):
    pytest.importorskip("triton")
    lines = printed(BUILD, tmp_path)
    assert len(lines) == 17 and all("True" in line for line in lines[:15]), f"no tensor cores: {lines}"
    assert all(line.endswith("[]") for line in lines), f"ptxas lost registers: {lines}"
