"""The gradient that a piece's outputs alone give its initial state, and what becomes of the answer."""

import dataclasses

import pytest
import torch
from torch import Tensor

from longscan.kernels import Segments, linear_attention, linear_scan, rg_lru, taylor_attention

# Rows of one document that goes on, of one that begins, and of several, of which the first goes on.
DOCUMENTS = {
    "none": None,
    "one": ([[1], [1]], [4, 0]),
    "several": ([[0.3, 0.1, 0.6], [1]], [3, 3]),
    "begun": ([[0.5, 0.5], [0.9, 0.1]], [0, 5]),
}
GROUPED = {"group": 12}
OPS = {
    "linear_scan": (linear_scan, {}),
    "rg_lru": (rg_lru, {}),
    "taylor": (taylor_attention, {}),
    "taylor sums": (taylor_attention, {"normalize": False, "scale": 0.7}),
    "linear": (linear_attention, {"normalize": False}),
    "linear normalized": (linear_attention, {"scale": 0.7, "shared": 2}),
    "linear decays": (linear_attention, {"decays": True, "shared": 2}),
    "grouped": (linear_attention, GROUPED | {"shared": 2}),
    "grouped sums": (linear_attention, GROUPED | {"normalize": False}),
    "long groups": (linear_attention, {"group": 20}),
    "grouped decays": (linear_attention, GROUPED | {"decays": True}),
}
ops = pytest.mark.parametrize("name", OPS)


def make(name: str, tokens: int, dtype: torch.dtype, device: str, shared=1, decays=False, **options):
    """(the op's inputs by name, its initial state last; its options)."""
    rng = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    sequence = (2, tokens, 5)
    if name == "linear_scan":
        inputs = {"x": draw(*sequence), "log_a": -0.3 * draw(*sequence).exp(), "initial_state": draw(2, 5)}
    elif name == "rg_lru":
        gates = {"gate_a": draw(*sequence) - 3, "gate_x": draw(*sequence), "a_param": draw(5)}
        inputs = {"x": draw(*sequence), **gates, "initial_state": draw(2, 5)}
    else:
        keys, width = draw(2, tokens, 2, 8).abs(), 4 + (options.get("normalize", True) or name == "taylor sums")
        inputs = {"q": draw(2, tokens, 2 * shared, 8).abs(), "k": keys, "v": draw(2, tokens, 2, 4)}
        slots = (2,) if "group" in options else ()
        # Of sums that keys could have left: positive, and more over all keys than over the open group.
        state = draw(2, 2, *slots, 45 if name.startswith("taylor") else 8, width).abs()
        inputs["initial_state"] = state + state.flip(2) * torch.tensor([1, 0])[:, None, None] if slots else state
        inputs |= {"log_a": -0.1 * draw(2, tokens, 2).exp()} if decays else {}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = {"x", "gate_a", "gate_x", "q", "k", "v"} | ({"log_a"} if name == "linear_scan" else set())
    return {n: t.to(device, dtype if n in narrow else wide).requires_grad_() for n, t in inputs.items()}, options


def segments_of(documents: str, tokens: int, device: str) -> Segments | None:
    if DOCUMENTS[documents] is None:
        return None
    shares, earlier = DOCUMENTS[documents]
    lengths = [[max(1, int(share * tokens)) for share in row[:-1]] for row in shares]
    return Segments.from_lengths([[*row, tokens - sum(row)] for row in lengths], earlier, device)


def cut_short(monkeypatch) -> None:
    """Lets every kernel cut short rows into several tiles, or chunks and pieces."""
    from longscan.kernels.linear_attention import cuts
    from longscan.kernels.linear_scan import kernel as scan
    from longscan.kernels.rg_lru import kernel as gated
    from longscan.kernels.taylor_attention import kernel as taylor

    for module in (scan, gated):
        monkeypatch.setattr(module, "SUMMARY", (scan.Tile(rows=2, steps=2, block=16, warps=2),) * 2)
    monkeypatch.setattr(cuts, "UNIT", 16)
    planned = taylor.plan

    def plan(k: Tensor, v: Tensor, whole: bool = False):
        cut = planned(k, v, whole)
        return cut if whole else dataclasses.replace(cut, pieces=-(-cut.chunks // 2))

    monkeypatch.setattr(taylor, "WIDE_CHUNK", 16)
    monkeypatch.setattr(taylor, "plan", plan)


def autograd(op, inputs: dict[str, Tensor], dy: Tensor, dfinal: Tensor | None, **options) -> list[Tensor]:
    """The gradients of all inputs, by the op without an answer from the right."""
    y, final = op(**inputs, **options)
    outputs, grads = ([y], [dy]) if dfinal is None else ([y, final], [dy, dfinal])
    return list(torch.autograd.grad(outputs, list(inputs.values()), grads))


def answered(op, inputs: dict[str, Tensor], dy: Tensor, dfinal: Tensor, **options) -> tuple[list[Tensor], Tensor]:
    """(the gradients of all inputs where `dfinal` is the answer, the question)."""
    asked = []

    def from_right(gradient: Tensor) -> Tensor:
        asked.append(gradient)
        return dfinal

    y, final = op(**inputs, from_right=from_right, **options)
    assert not final.requires_grad
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    (question,) = asked
    return list(gradients), question


def check(name: str, tokens: int, documents: str, implementation: str, dtype, device: str, tolerance: float) -> None:
    op, options = OPS[name]
    inputs, options = make(name, tokens, dtype, device, **options)
    options |= {"segments": segments_of(documents, tokens, device), "implementation": implementation}
    with torch.no_grad():
        y, final = op(**inputs, **options)
    rng = torch.Generator().manual_seed(9)
    dy, dfinal = (torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t) for t in (y, final))
    at = list(inputs).index("initial_state")
    gradients, question = answered(op, inputs, dy, dfinal, **options)
    expected = autograd(op, inputs, dy, None, **options)[at]
    assert question.shape == expected.shape and question.dtype == expected.dtype
    torch.testing.assert_close(question, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    # The rest of the backward pass is the op's own.
    for one, other in zip(gradients, autograd(op, inputs, dy, dfinal, **options), strict=True):
        assert torch.equal(one, other)


@ops
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("tokens", [3, 33, 150])
def test_the_reference_asks_what_autograd_finds(name, tokens, documents):
    check(name, tokens, documents, "reference", torch.float64, "cpu", 1e-12)


@pytest.mark.parametrize(
    "name", ["linear_scan", "rg_lru", "taylor", "taylor sums", "linear decays", "grouped", "long groups"]
)
def test_the_kernel_asks_what_autograd_finds(name, device, monkeypatch):
    cut_short(monkeypatch)
    check(name, 37, "several", "triton", torch.float32, device, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in OPS if name != "grouped decays"])
def test_the_kernel_at_length(name, device, monkeypatch):
    if device != "cuda":
        pytest.skip("needs a CUDA GPU")
    for documents in DOCUMENTS:
        check(name, 3001, documents, "triton", torch.bfloat16, device, 2e-2)


@ops
def test_a_checkpoint_asks_the_same_once(name):
    op, options = OPS[name]
    inputs, options = make(name, 19, torch.float64, "cpu", **options)
    asked = []

    def from_right(gradient: Tensor) -> Tensor:
        asked.append(gradient)
        return torch.ones_like(gradient)

    def outputs(*values: Tensor) -> Tensor:
        given = dict(zip(inputs, values, strict=True))
        return op(**given, from_right=from_right, **options)[0]

    values = list(inputs.values())
    plain = torch.autograd.grad(outputs(*values).square().sum(), values)
    y = torch.utils.checkpoint.checkpoint(outputs, *values, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), values)
    assert len(asked) == 2 and torch.equal(*asked)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
