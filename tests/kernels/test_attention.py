"""attention held to a T x T softmax in float64."""

import pytest
import torch

from longscan.kernels import Segments, attention
from longscan.kernels.attention import reference


def make(batch, tokens, heads, key_heads, halo=0, dtype=torch.float64, key=8, value=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, tokens, heads, key),
        (batch, tokens + halo, key_heads, key),
        (batch, tokens + halo, key_heads, value),
    ]
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def naive(q, k, v, segments, window, key_offset):
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[3] ** -0.5
    i = torch.arange(q.shape[1])[:, None]
    p = torch.arange(k.shape[1])[None] + key_offset
    keep = (p <= i) if window is None else (p <= i) & (i - p < window)
    keep = keep[None]
    if segments is not None:
        keep = keep & (p >= segments.doc_start.view(*q.shape[:2], 1))
    weights = torch.softmax(scores.masked_fill(~keep[:, None], -torch.inf), -1).nan_to_num(0)
    return torch.einsum("bhij,bjhv->bihv", weights, v)


def with_gradients(function, inputs):
    y = function(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("halo", [0, 13])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 400])
@pytest.mark.parametrize(("tokens", "heads"), [(1, (4, 4)), (63, (4, 2)), (65, (4, 1)), (200, (6, 2))])
def test_values_and_gradients(tokens, heads, window, halo, documents, random_segments):
    inputs = make(2, tokens, *heads, halo)
    segments = random_segments(2, tokens, device="cpu") if documents else None
    actual = with_gradients(lambda *a: attention(*a, segments, window=window, key_offset=-halo), inputs)
    exact = with_gradients(lambda *a: naive(*a, segments, window, -halo), inputs)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_gradcheck(random_segments):
    segments = random_segments(1, 9, device="cpu")
    inputs = make(1, 9, 2, 1, 2, key=2, value=2)
    assert torch.autograd.gradcheck(lambda *a: attention(*a, segments, window=4, key_offset=-2), inputs)


def test_split_invariance(random_segments):
    """Two pieces, the second with a halo of W - 1 keys, equal the whole; so do the gradients."""
    tokens, cut, window = 150, 67, 20
    segments = random_segments(2, tokens, device="cpu")
    halo = window - 1

    def split(q, k, v):
        left = attention(q[:, :cut], k[:, :cut], v[:, :cut], segments.split(0, cut), window=window)
        k, v = k[:, cut - halo :], v[:, cut - halo :]
        right = attention(q[:, cut:], k, v, segments.split(cut, tokens), window=window, key_offset=-halo)
        return torch.cat([left, right], 1)

    inputs = make(2, tokens, 4, 2)
    whole = with_gradients(lambda *a: attention(*a, segments, window=window), inputs)
    for one, other in zip(whole, with_gradients(split, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_step_by_step_over_a_cache():
    q, k, v = make(2, 20, 4, 2)
    whole = attention(q, k, v, window=6)
    for t in range(20):
        first = max(0, t - 5)
        keys, values = k[:, first : t + 1], v[:, first : t + 1]
        step = attention(q[:, t : t + 1], keys, values, window=6, key_offset=first - t)
        torch.testing.assert_close(step[:, 0], whole[:, t])


def test_padding_in_a_halo_is_not_seen():
    """Whatever lies in the halo of a row that begins a document, even NaN-prone sizes, changes no bit."""
    q, k, v = make(1, 10, 2, 1, halo=5, dtype=torch.float32)
    segments = Segments.whole(1, 10)
    before = attention(q, k, v, segments, window=4, key_offset=-5)
    with torch.no_grad():
        k[:, :5], v[:, :5] = 1e30, 0.0
    assert torch.equal(before, attention(q, k, v, segments, window=4, key_offset=-5))


def test_queries_without_keys_give_zero():
    """Keys that end before the window of the last queries: 0 out, 0 gradient, no NaN."""
    q, k, v = make(1, 90, 2, 1, dtype=torch.float32)
    k, v = (t[:, :12].detach().requires_grad_() for t in (k, v))
    y, dq, dk, dv = with_gradients(lambda *a: attention(*a, window=3), [q, k, v])
    assert (y[:, 14:] == 0).all() and (y[:, :14] != 0).any(-1).all()
    assert (dq[:, 14:] == 0).all()
    assert all(t.isfinite().all() for t in (y, dq, dk, dv))


@pytest.mark.parametrize("window", [None, 9])
def test_no_leaks(window):
    q, k, v = make(1, 90, 2, 1, dtype=torch.float32)
    segments = Segments.from_lengths([[20, 50, 20]], [4])
    before = attention(q, k, v, segments, window=window)
    with torch.no_grad():
        k[:, 30] += 1
        v[:, 30] += 1
    after = attention(q, k, v, segments, window=window)
    moved = (before != after).flatten(2).any(-1)[0].nonzero().view(-1).tolist()
    assert moved == list(range(30, 70 if window is None else 39))


def test_half_precision(random_segments):
    segments = random_segments(2, 70, device="cpu")
    inputs = make(2, 70, 4, 1, dtype=torch.bfloat16)
    exact = attention(*(t.double() for t in inputs), segments, window=16)
    y = attention(*inputs, segments, window=16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_window_meets_a_bounded_number_of_keys():
    spans = list(reference._blocks(10_000, 10_000, 300, 0))
    assert max(keys.stop - keys.start for _, keys in spans) <= 300 + reference.BLOCK
    assert [rows.start for rows, _ in spans] == list(range(0, 10_000, reference.BLOCK))


def test_bad_arguments_are_named():
    q, k, v = make(1, 4, 4, 2)
    with pytest.raises(ValueError, match=r"window=0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"key_offset=3"):
        attention(q, k, v, key_offset=3)
    with pytest.raises(ValueError, match=r"3 query heads are not a multiple of 2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(TypeError, match=r"expected one dtype"):
        attention(q.float(), k, v)
    with pytest.raises(ValueError, match=r"'triton' cannot run: this op has no Triton kernel"):
        attention(q, k, v, implementation="triton")
