"""Linearized attention against its three branches written out over one document."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from longscan.kernels import Segments, rotary
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixers import LinearizedAttention
from longscan.models.mixers.linearized_attention import groups_of
from longscan.models.parameters import init_parameters
from longscan.models.positions import rotary_table

HEADS, DIMS, GROUP, TAPS = 4, 8, 3, 4
MAPS = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0) + 1e-3,
    "identity": lambda x: x / x.norm(dim=-1, keepdim=True),
    "taylor": lambda x: torch.cat(
        [
            torch.ones_like(x[..., :1]),
            x / x.shape[-1] ** 0.25,
            (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * x.shape[-1]) ** 0.5,
        ],
        dim=-1,
    ),
    "learned": lambda x: torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1),
}


def by_hand(mixer: LinearizedAttention, x: torch.Tensor, feature_map: str, local: str, normalize: bool) -> torch.Tensor:
    """The mixer's equation over one document x [T, D], pair by pair of [T, T] matrices."""
    tokens = len(x)
    q, k, v = ((x @ layer.weight.T).unflatten(1, (-1, DIMS)) for layer in (mixer.query, mixer.key, mixer.value))
    cos, sin = rotary_table(torch.arange(tokens)[None], DIMS, 10000.0, x.dtype)
    q, k = rotary(q[None], cos, sin)[0], rotary(k[None], cos, sin)[0]
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    at = torch.arange(tokens)
    group = at // mixer.group
    same = (group[:, None] == group[None, :]) & (at[None, :] <= at[:, None])
    completed = group[None, :] < group[:, None]
    if local == "softmax":
        scores = torch.einsum("ihk,jhk->hij", q, k) / DIMS**0.5
        inside = scores.masked_fill(~same, float("-inf")).softmax(-1)
    else:
        unit_q, unit_k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        inside = torch.einsum("ihk,jhk->hij", unit_q, unit_k).clamp(min=0) ** 2 * same
    if feature_map in ("taylor", "learned"):
        q, k = (torch.einsum("thk,hkf->thf", t, w) for t, w in ((q, mixer.query_map), (k, mixer.key_map)))
    across = torch.einsum("ihf,jhf->hij", MAPS[feature_map](q), MAPS[feature_map](k)) * completed
    if normalize:
        across = across / (across.sum(-1, keepdim=True) + 1e-6)
    weights = inside + (1 + mixer.global_scale)[:, None, None] * across
    y = torch.einsum("hij,jhv->ihv", weights, v)
    for tap in range(min(TAPS, tokens)):
        filtered = mixer.conv_weight[:, TAPS - 1 - tap, None] * v[: tokens - tap]
        y = y + F.pad(filtered, (0, 0, 0, 0, tap, 0))
    return y.flatten(1) @ mixer.output.weight.T


CASES = [
    case for case in itertools.product(MAPS, ("softmax", "relu2"), (True, False)) if case[::2] != ("identity", True)
]


def make(make_config, **options) -> LinearizedAttention:
    """The mixer in fp64, its parameters away from zero."""
    options |= {"head_dim": DIMS, "conv_taps": TAPS, "feature_dim": 3}
    config = make_config(pattern=["linearized_attention"], linearized_attention=options)
    mixer = LinearizedAttention(config, LocalBackend())
    init_parameters(mixer, seed=0)
    mixer.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())
    return mixer


@pytest.mark.parametrize("feature_map, local, normalize", CASES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_outputs_are_the_three_branches(make_config, feature_map, local, normalize, kv_heads):
    options = {"feature_map": feature_map, "local": local, "normalize": normalize, "kv_heads": kv_heads}
    mixer, generator = make(make_config, group=GROUP, **options), torch.Generator().manual_seed(1)
    lengths = [8, 2, 7]
    x = torch.randn(17, 32, generator=generator).double().requires_grad_()
    expected = torch.cat([by_hand(mixer, part, feature_map, local, normalize) for part in x.split(lengths)])
    ours = mixer(x[None], LocalContext(Segments.from_lengths([lengths])))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    wanted = [x, *mixer.parameters()]
    expected, actual = (torch.autograd.grad(y.square().sum(), wanted) for y in (expected, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("local", ["softmax", "relu2"])
@pytest.mark.parametrize("group", [64, 128, 256])
def test_groups_of_the_papers_sizes(make_config, group, local):
    mixer, lengths = make(make_config, group=group, local=local), [2 * group + 7, group, 3]
    x = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = torch.cat([by_hand(mixer, part, "elu", local, True) for part in x.split(lengths)])
        ours = mixer(x[None], LocalContext(Segments.from_lengths([lengths])))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_groups_are_documents_of_their_own():
    """The bounds, the starts and what continues are those of Segments built from the groups' lengths."""
    segments = Segments.from_lengths([[5, 4], [9]], earlier=[2, 3])
    ours = groups_of(segments, 3)
    expected = Segments.from_lengths([[1, 3, 1, 3, 1], [3, 3, 3]], earlier=[2, 0])
    assert torch.equal(ours.cu_seqlens.unique(), expected.cu_seqlens)
    assert torch.equal(ours.continues, expected.continues)
    assert torch.equal(ours.doc_start, expected.doc_start)
    assert torch.equal(ours.resets, expected.resets)


def test_the_key_gradients_of_a_split_are_exact_in_fp32(make_config):
    """Nothing lies before a first group: its queries leave no 1 / eps in what the state's two sums cancel to."""
    config = make_config(pattern=["linearized_attention"])
    mixer = LinearizedAttention(config, LocalBackend())
    init_parameters(mixer, seed=0)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float64, torch.float32):
        mixer.to(dtype)
        carry, pieces = mixer.init_carry(1, x.device, dtype), []
        for begin in (0, 3):
            context = LocalContext(Segments.whole(1, 20).split(begin, begin + 3 if begin == 0 else 20), carry)
            pieces.append(mixer(x[:, begin : begin + 3 if begin == 0 else 20].to(dtype), context))
            carry = context.leaving
        loss = torch.cat(pieces, 1).square().sum()
        results.append(torch.autograd.grad(loss, mixer.key.weight)[0].double())
    assert (results[1] - results[0]).norm() < 1e-5 * results[0].norm()
