"""attention held to a T x T softmax in float64."""

import math

import pytest
import torch

from longscan.kernels import Segments, attention
from longscan.kernels.attention import reference
from longscan.kernels.attention.scoring import Scoring


def make(batch, tokens, heads, key_heads, halo=0, dtype=torch.float64, key=8, value=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, tokens, heads, key),
        (batch, tokens + halo, key_heads, key),
        (batch, tokens + halo, key_heads, value),
    ]
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def slopes_of(heads, device="cpu"):
    """Steep to flat: 2 to 2^-5, so that their reach cuts some heads short even at these lengths."""
    return torch.logspace(1, -5, heads, base=2.0, device=device)


def naive(q, k, v, segments, window, key_offset, slopes=None):
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[3] ** -0.5
    i = torch.arange(q.shape[1])[:, None]
    p = torch.arange(k.shape[1])[None] + key_offset
    if slopes is not None:
        scores = scores - slopes.view(-1, 1, 1).double() * (i - p)
    keep = (p <= i) if window is None else (p <= i) & (i - p < window)
    keep = keep[None]
    if segments is not None:
        keep = keep & (p >= segments.doc_start.view(*q.shape[:2], 1))
    weights = torch.softmax(scores.masked_fill(~keep[:, None], -torch.inf), -1).nan_to_num(0)
    return torch.einsum("bhij,bjhv->bihv", weights, v)


def with_gradients(function, inputs):
    y = function(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


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


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_alibi_is_the_distance_form(heads, window, random_segments):
    inputs, slopes, segments = make(2, 90, *heads, 7), slopes_of(heads[0]), random_segments(2, 90, device="cpu")
    options = {"window": window, "key_offset": -7}
    actual = with_gradients(lambda *a: attention(*a, segments, alibi_slopes=slopes, **options), inputs)
    exact = with_gradients(lambda *a: naive(*a, segments, window, -7, slopes), inputs)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


def test_gradcheck(random_segments):
    segments = random_segments(1, 9, device="cpu")
    inputs = make(1, 9, 2, 1, 2, key=2, value=2)
    options = {"window": 4, "key_offset": -2, "alibi_slopes": slopes_of(2).double()}
    assert torch.autograd.gradcheck(lambda *a: attention(*a, segments, **options), inputs)


# (batch, tokens, heads, key heads, halo, head dim, value dim, window, documents, ALiBi, dtype): between them every
# branch of the kernels; the interpreter takes about a second for each.
KERNEL_CASES = [
    (1, 1, 4, 1, 0, 16, 16, None, False, False, torch.float32),
    (1, 65, 3, 1, 0, 16, 16, None, False, False, torch.float32),
    (2, 70, 4, 2, 13, 24, 16, 20, True, False, torch.float32),
    (1, 70, 4, 4, 0, 16, 16, None, True, True, torch.float32),
    (1, 63, 6, 2, 13, 16, 40, None, False, True, torch.float16),
    (1, 150, 10, 1, 9, 16, 16, 30, True, False, torch.float16),
    (1, 200, 2, 2, 0, 16, 16, 150, False, True, torch.float16),
    # Rows enough that walks over them go round.
    (1, 330, 2, 1, 9, 16, 16, 140, True, False, torch.float32),
    (1, 150, 3, 1, 5, 16, 16, None, False, False, torch.float16),
    (1, 150, 4, 2, 0, 16, 16, None, True, True, torch.float16),
    (1, 30, 2, 1, 3, 136, 130, None, True, True, torch.float16),
]
# (batch, tokens, heads, key heads, halo, window, documents, ALiBi); each with every bf16 tile, two with other dtypes.
WIDE_SHAPES = [
    (1, 1000, 10, 1, 100, 128, True, False),
    (2, 777, 6, 2, 31, None, True, True),
    (2, 500, 4, 4, 0, None, False, True),
    (1, 2049, 4, 1, 0, 1024, False, False),
    (1, 1000, 16, 1, 0, 64, True, False),
]
WIDE_CASES = [
    (b, t, h, g, halo, dim, dim, window, documents, alibi, dtype)
    for dtype, dims, shapes in [
        (torch.bfloat16, (64, 128, 256), WIDE_SHAPES),
        (torch.float32, (32, 256), WIDE_SHAPES[:2]),
        (torch.float16, (96,), WIDE_SHAPES[:2]),
    ]
    for dim in dims
    for b, t, h, g, halo, window, documents, alibi in shapes
]


def kernel_against_bar(case, device, random_segments):
    """The kernel's error against float64 is at most twice the reference's at the same precision, and a rounding."""
    batch, tokens, heads, key_heads, halo, key, value, window, documents, alibi, dtype = case
    inputs = make(batch, tokens, heads, key_heads, halo, dtype, key, value)
    segments = random_segments(batch, tokens, device="cpu") if documents else None
    slopes = slopes_of(heads) if alibi else None
    exact = with_gradients(
        lambda *a: attention(*a, segments, window=window, key_offset=-halo, alibi_slopes=slopes),
        [t.detach().double().requires_grad_() for t in inputs],
    )
    there = [t.detach().to(device).requires_grad_() for t in inputs]
    options = {
        "window": window,
        "key_offset": -halo,
        "alibi_slopes": None if slopes is None else slopes.to(device),
        "segments": None if segments is None else segments.to(device),
    }
    kernel, again, reference = (
        with_gradients(lambda *a, i=i: attention(*a, **options, implementation=i), there)
        for i in ("triton", "triton", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True)), "other bits the second time"
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, k, r, e in zip(("y", "dq", "dk", "dv"), kernel, reference, exact, strict=True):
        assert k.dtype == dtype and k.isfinite().all()
        # One key alone has gradients of exactly 0 for q and k: there the scale is that of the inputs.
        scale = max(e.norm(), 1e-2 * e.numel() ** 0.5)
        errors = [float((t.cpu().double() - e).norm() / scale) for t in (k, r)]
        assert errors[0] <= 2 * errors[1] + floor, f"{name}: {errors[0]:.1e}, reference {errors[1]:.1e}"


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernel_within_bar(case, device, random_segments):
    kernel_against_bar(case, device, random_segments)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("case", [case for case in KERNEL_CASES if case[1] > 64], ids=str)
def test_programs_that_share_a_key_block_add_up(case, parts, device, random_segments, monkeypatch):
    from longscan.kernels.attention import kernel

    monkeypatch.setattr(kernel, "parts_of", lambda *_: parts)
    kernel_against_bar(case, device, random_segments)


# (tokens, halo, window, batch rows times key heads, query heads to each) on 132 multiprocessors, in blocks of 64 rows
# and 128 keys, and how many programs share a key block.
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((32768, 0, 2048, 1, 16), 1),
        ((16384, 0, 2048, 1, 16), 1),
        ((16384, 2047, 2048, 1, 16), 1),
        ((12288, 0, 2048, 1, 16), 4),
        ((8192, 0, 2048, 1, 16), 2),
        ((8192, 2047, 2048, 1, 16), 4),
        ((2048, 0, 2048, 1, 16), 8),
        ((16384, 0, 16384, 1, 16), 2),
        # Walks too short, programs enough, and so many that one round more or less is little.
        ((8192, 0, 64, 1, 4), 1),
        ((8192, 0, 2048, 2, 16), 1),
        ((65536, 0, 2048, 16, 1), 1),
        ((1, 0, 1, 1, 16), 1),
    ],
)
def test_programs_share_a_key_block_where_they_are_few(case, expected):
    from longscan.kernels.attention import kernel

    tokens, halo, window, copies, groups = case
    tile = kernel.Tile(64, 128, 8, 3)
    assert kernel.parts_of(tile, 132, copies, tokens, tokens + halo, -halo, window, groups) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_kernel_within_bar_on_gpu(case, random_segments):
    kernel_against_bar(case, "cuda", random_segments)


def test_kernel_leaves_queries_without_keys_at_zero(device):
    q, k, v = make(1, 90, 2, 1, dtype=torch.float32, key=16, value=16)
    q, k, v = (t.detach().to(device).requires_grad_() for t in (q, k[:, :12], v[:, :12]))
    y, dq, dk, dv = with_gradients(lambda *a: attention(*a, window=3, implementation="triton"), [q, k, v])
    assert (y[:, 14:] == 0).all() and (y[:, :14] != 0).any(-1).all()
    assert (dq[:, 14:] == 0).all()
    assert all(t.isfinite().all() for t in (y, dq, dk, dv))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("heads", "key_heads", "documents"), [(1, 1, False), (4, 1, False), (3, 3, True)])
def test_queries_beyond_all_keys_keep_the_last_ones(
    heads, key_heads, documents, parts, device, random_segments, monkeypatch
):
    from longscan.kernels.attention import kernel

    monkeypatch.setattr(kernel, "parts_of", lambda *_: parts)
    q, k, v = make(1, 137, heads, key_heads, dtype=torch.float32, key=16, value=16)
    inputs = [t.detach().to(device).requires_grad_() for t in (q, k[:, :36], v[:, :36])]
    # Steep: a key reaches fewer queries than there are beyond the last.
    slopes = torch.linspace(4.0, 2.0, heads, device=device)
    segments = random_segments(1, 137, device=device) if documents else None
    found, exact = (
        with_gradients(lambda *a, i=i: attention(*a, segments, alibi_slopes=slopes, implementation=i), inputs)
        for i in ("triton", "reference")
    )
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, exact, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_kernel_takes_strided_inputs(device):
    rng = torch.Generator().manual_seed(0)
    fused = torch.randn(1, 40, 3, 2, 16, generator=rng).to(device)
    q, k, v = fused.unbind(2)
    packed = attention(*(t.contiguous() for t in (q, k, v)), window=9, implementation="triton")
    assert torch.equal(attention(q, k, v, window=9, implementation="triton"), packed)


def marked(q, k, v, slopes, device):
    """Which rows met key 0, [T, H], and which keys the last row, [T, Hkv]: there NaN spreads from its v, or its dy.

    Of the last row of the batch.
    """
    there = [t.detach().clone().to(device).requires_grad_() for t in (q, k, v)]

    def gradients(value, last):
        y = attention(there[0], there[1], value, alibi_slopes=slopes.to(device), implementation="triton")
        dy = torch.ones_like(y)
        dy[:, -1] = last
        return y, *torch.autograd.grad(y, [*there[:2], value], dy)

    value = there[2].detach().clone()
    value[:, 0] = torch.nan
    y, dq, _, _ = gradients(value.requires_grad_(), 1.0)
    _, _, dk, dv = gradients(there[2], torch.nan)
    rows, rows_again, keys, keys_again = (t[-1].isnan().all(-1).cpu() for t in (y, dq, dv, dk))
    assert torch.equal(rows, rows_again) and torch.equal(keys, keys_again)
    return rows, keys


def test_reach_keeps_every_weight_that_counts(device):
    """Keys that are not met have weights that vanish under the largest; none is met a block beyond the bound."""
    tokens = 310
    q, k, v = make(1, tokens, 4, 4, dtype=torch.float32, key=16, value=16)
    slopes = torch.tensor([1.0, 0.5, 0.3, 0.0])
    rows, keys = marked(q, k, v, slopes, device)
    scores = torch.einsum("bihk,bjhk->bhij", q, k)[0].detach().double() * 0.25
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)[None]).double()
    weights = (scores - slopes.double()[:, None, None] * distance).masked_fill(distance < 0, -torch.inf).softmax(-1)
    share = weights / weights.amax(-1, keepdim=True)
    bound = 0.5 * q.norm(dim=-1).amax((0, 1)) * k.norm(dim=-1).amax((0, 1)) + 48 * math.log(2)
    assert rows[:, 3].all() and keys[:, 3].all()
    for head in range(3):
        far = bound[head] / slopes[head]
        for met, away, weight in [
            (rows[:, head], torch.arange(tokens), share[head, :, 0]),
            (keys[:, head], tokens - 1 - torch.arange(tokens), share[head, -1]),
        ]:
            assert met[away <= far].all() and not met[away > far + 64].any() and not met.all()
            assert weight[~met].amax() < 2.0**-48
        assert share[head][distance > far / 8].amax() > 2.0**-48


def test_reach_is_the_groups_largest(device):
    """Query heads 0 to 2 of key head 0 have the reach of their flattest, those of key head 1 their own; so do rows."""
    q, k, v = make(2, 170, 6, 2, dtype=torch.float32, key=16, value=16)
    with torch.no_grad():
        q[0] *= 100
    rows, keys = marked(q, k, v, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]), device)
    assert rows[:, :3].all() and keys[:, 0].all()
    assert not rows[140:, 3:].any() and not keys[:30, 1].any()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
def test_no_reach_is_shortened_by_what_is_not_finite(which, value, device):
    """One such number in a head of a row makes it meet everything; other heads do as before."""
    inputs = make(1, 170, 2, 2, dtype=torch.float32, key=16, value=16)
    with torch.no_grad():
        inputs[which][0, 60, 1, 5] = value
    rows, keys = marked(*inputs, torch.ones(2), device)
    assert rows[:, 1].all() and keys[:, 1].all()
    assert not rows[140:, 0].any() and not keys[:30, 0].any()


def test_norms_are_those_of_each_head_and_row(device):
    """Of blocks that are not full too, and -NaN as NaN."""
    from longscan.kernels.attention import kernel

    q, k, _ = (t.detach() for t in make(3, 700, 4, 2, 5, torch.float32, 24, 16))
    q[1, 699, 2, 3], k[2, 0, 1, 0] = torch.inf, -torch.nan
    scoring = Scoring(None, torch.ones(4), None, -5, 1.0)
    norms = kernel.largest_norms(q.to(device), k.to(device), scoring)
    exact = torch.cat([t.square().sum(-1).amax(1) for t in (q, k)], 1)
    torch.testing.assert_close(norms.cpu(), exact, rtol=1e-6, atol=0, equal_nan=True)
    assert kernel.largest_norms(q, k, scoring._replace(slopes=None)) is None


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


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_documents_cut_into_groups_attend_inside_them(implementation, device):
    """Segments whose documents are groups of 16 tokens, the first one begun 5 tokens before the piece."""
    groups = Segments.from_lengths([[11, 16, 16, 3, 16, 8]], [5])
    inputs = make(1, 70, 4, 2, 5, torch.float32, 16, 16)
    there = [t.detach().to(device).requires_grad_() for t in inputs]
    options = {"window": 16, "key_offset": -5, "implementation": implementation}
    actual = with_gradients(lambda *a: attention(*a, groups.to(device), **options), there)
    exact = with_gradients(
        lambda *a: naive(*a, groups, None, -5), [t.detach().double().requires_grad_() for t in inputs]
    )
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=1e-4, atol=1e-5)


def test_a_row_of_one_document_needs_no_segments():
    """Also one that began before the piece; with a halo it does."""
    inputs = make(2, 30, 2, 1)
    whole = with_gradients(lambda *a: attention(*a), inputs)
    for earlier in ([0, 0], [0, 9]):
        segments = Segments.from_lengths([[30], [30]], earlier)
        for one, other in zip(whole, with_gradients(lambda *a, s=segments: attention(*a, s), inputs), strict=True):
            assert torch.equal(one, other)
    halo = make(2, 30, 2, 1, halo=4)
    segments = Segments.from_lengths([[30], [30]], [0, 2])
    exact = naive(*halo, segments, None, -4)
    torch.testing.assert_close(attention(*halo, segments, key_offset=-4), exact, rtol=1e-10, atol=1e-11)


# (batch, tokens, heads, key heads, head dim, dtype).
PLAIN_SHAPES = [
    (2, 1024, 4, 4, 128, torch.bfloat16),
    (1, 1333, 6, 2, 64, torch.bfloat16),
    (1, 2049, 16, 1, 128, torch.float16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PLAIN_SHAPES, ids=str)
def test_plain_causal_goes_to_cudnn(shape, caplog):
    """Where bits need not repeat; there, values and gradients are as near to float64 as the Triton kernels'."""
    from longscan.kernels import dispatch
    from longscan.kernels.attention import sdpa

    batch, tokens, heads, key_heads, dim, dtype = shape
    inputs = make(batch, tokens, heads, key_heads, 0, dtype, dim, dim)
    exact = with_gradients(attention, [t.detach().double().requires_grad_() for t in inputs])
    there = [t.detach().cuda().requires_grad_() for t in inputs]
    plain = Scoring(None, None, None, 0, dim**-0.5)
    assert not sdpa.covers(*there, plain), "its gradients have other bits each time"
    own = with_gradients(lambda *a: attention(*a, implementation="triton"), there)
    torch.use_deterministic_algorithms(False)
    dispatch.log_choice.cache_clear()
    assert sdpa.covers(*there, plain)
    assert not any(sdpa.covers(*there, plain._replace(**{k: v})) for k, v in [("window", 9), ("key_offset", -1)])
    with caplog.at_level("INFO", logger="longscan"):
        routed = with_gradients(attention, there)
    assert "attention on cuda" in caplog.text and "sdpa" in caplog.text
    for name, a, o, e in zip(("y", "dq", "dk", "dv"), routed, own, exact, strict=True):
        assert a.dtype == dtype and a.is_contiguous()
        errors = [float((t.cpu().double() - e).norm() / e.norm()) for t in (a, o)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, f"{name}: {errors[0]:.1e}, Triton {errors[1]:.1e}"
    # Either implementation can finish what the other began: both give the same log-sum-exp.
    scoring = plain._replace(scale=0.2)
    from longscan.kernels.attention import kernel

    statistics = [m.forward(*(t.detach() for t in there), scoring)[1] for m in (sdpa, kernel)]
    torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-3)


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


def test_bad_arguments_are_named(device):
    q, k, v = make(1, 4, 4, 2)
    with pytest.raises(ValueError, match=r"window=0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"key_offset=3"):
        attention(q, k, v, key_offset=3)
    with pytest.raises(ValueError, match=r"3 query heads are not a multiple of 2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(TypeError, match=r"expected one dtype"):
        attention(q.float(), k, v)
    with pytest.raises(ValueError, match=r"scale=0"):
        attention(q, k, v, scale=0)
    with pytest.raises(ValueError, match=r"alibi_slopes has shape \[3\], expected \[4\]"):
        attention(q, k, v, alibi_slopes=torch.ones(3))
    with pytest.raises(TypeError, match=r"alibi_slopes is torch.float16"):
        attention(q, k, v, alibi_slopes=torch.ones(4, dtype=torch.float16))
    wide = torch.zeros(1, 4, 1, 257, device=device)
    with pytest.raises(ValueError, match=r"head dim 257: the Triton kernel takes at most 256"):
        attention(wide, wide, wide, implementation="triton")
