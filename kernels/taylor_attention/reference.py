"""Taylor attention in PyTorch: the specification the kernel is held to, differentiated by autograd.

Features of a key are plain monomials, [1, k_i, k_i k_j for i <= j]; those of a query carry the coefficients, so the
state does not depend on the scale. Chunks of 64 tokens: inside one the quadratic form, between them the state.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..linear_scan.reference import state_dtype

CHUNK = 64


def features(key_dim: int) -> int:
    """The packed terms of a `key_dim`-vector, 1 + K + K (K + 1) / 2."""
    return 1 + key_dim + key_dim * (key_dim + 1) // 2


@functools.cache
def monomials(key_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two indices a feature into [x, 1], whose product it is: (K, K), then (i, K), then (i, j) for i <= j by rows."""
    i, j = torch.triu_indices(key_dim, key_dim, device=device)
    one = torch.full((1 + key_dim,), key_dim, device=device)
    linear = torch.arange(key_dim, device=device)
    return torch.cat([one[:1], linear, i]), torch.cat([one, j])


def key_features(k: Tensor) -> Tensor:
    """[..., F] monomials of k [..., K]."""
    first, second = monomials(k.shape[-1], k.device)
    extended = torch.cat([k, torch.ones_like(k[..., :1])], dim=-1)
    return extended[..., first] * extended[..., second]


def query_features(q: Tensor, scale: float) -> Tensor:
    """[..., F] so that query_features(q) . key_features(k) = 1 + s + s^2 / 2 with s = scale * q . k."""
    first, second = monomials(q.shape[-1], q.device)
    order = (first < q.shape[-1]).to(q.dtype) + (second < q.shape[-1]).to(q.dtype)
    repeated = (first == second) & (order == 2)
    return key_features(q) * scale**order * torch.where(repeated, 0.5, 1.0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    ids: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final_state, inverse [B, H, T] of the normaliser, empty where y is not divided); see op.py.

    `ids` int32 [B, T] number the documents; 0 is the one that entered.
    """
    dtype, out = state_dtype(q, k, v), v.dtype
    tokens = q.shape[1]
    qs, ks, vs = (_chunks(t.to(dtype)) for t in (q, k, _with_one(v)))
    here, before, last = _documents(ids, q, qs.shape[1])
    scores = torch.einsum("bnihk,bnjhk->bnhij", qs, ks) * scale
    live = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril() & (here[..., None] == here[..., None, :])
    weights = (1 + scores + scores * scores / 2).masked_fill(~live[:, :, None], 0)
    inside = torch.einsum("bnhij,bnjhv->bnihv", weights, vs)
    entering, final = _states(ks, vs, initial, here, before, last)
    seen = (here == before[..., None]).to(dtype)[..., None, None]
    sums = inside + torch.einsum("bnihf,bnhfv->bnihv", query_features(qs, scale) * seen, entering)
    sums = sums.flatten(1, 2)[:, :tokens]
    if not normalize:
        return sums[..., :-1].to(out), final, sums.new_empty(0)
    divisor = sums[..., -1] + eps
    return (sums[..., :-1] / divisor[..., None]).to(out), final, divisor.reciprocal().transpose(1, 2)


def summarize(k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
    """State [B, H, F, V + 1] that the piece leaves from zero; see op.py."""
    dtype = state_dtype(k, v)
    ks, vs = _chunks(k.to(dtype)), _chunks(_with_one(v).to(dtype))
    return _states(ks, vs, None, *_documents(ids, k, ks.shape[1]))[1]


def adjoint(scale: float, dy: Tensor, q: Tensor, y: Tensor, inverse: Tensor, ids: Tensor | None) -> Tensor:
    """dinitial [B, H, F, V + 1] where the final state has no gradient: phi(q_t) times the gradient of t's sums."""
    dtype = state_dtype(q, dy)
    dsums = torch.cat([dy, torch.zeros_like(dy[..., :1])], dim=-1).to(dtype)
    if inverse.numel():
        dsums[..., -1] = -(dy.to(dtype) * y.to(dtype)).sum(-1)
        dsums *= inverse.transpose(1, 2)[..., None]
    if ids is not None:
        dsums *= (ids == 0)[..., None, None]
    return torch.einsum("bthf,bthv->bhfv", query_features(q.to(dtype), scale), dsums)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, state) of one token; see op.py."""
    state = state + key_features(k.to(state.dtype))[..., None] * _with_one(v).to(state.dtype)[..., None, :]
    sums = torch.einsum("bhf,bhfv->bhv", query_features(q.to(state.dtype), scale), state)
    y = sums[..., :-1] / (sums[..., -1:] + eps) if normalize else sums[..., :-1]
    return y.to(v.dtype), state


def _states(
    ks: Tensor, vs: Tensor, initial: Tensor | None, here: Tensor, before: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """(entering [B, N, H, F, V + 1], final): the state before each chunk and after all."""
    kept = (here == last[..., None]).to(ks.dtype)[..., None, None]
    added = torch.einsum("bnjhf,bnjhv->bnhfv", key_features(ks) * kept, vs)
    carries = (before == last).to(ks.dtype)[..., None, None, None]
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(ks.dtype)
    entering = []
    for n in range(added.shape[1]):
        entering.append(state)
        state = carries[:, n] * state + added[:, n]
    return torch.stack(entering, 1), state


def _documents(ids: Tensor | None, like: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents [B, N, C] of the tokens (padding: of the last), [B, N] of the token before each chunk, of its last."""
    if ids is None:
        ids = torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)
    padding = ids[:, -1:].expand(-1, chunks * CHUNK - ids.shape[1])
    here = torch.cat([ids, padding], 1).unflatten(1, (chunks, CHUNK))
    last = here[..., -1]
    return here, torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1), last


def _with_one(v: Tensor) -> Tensor:
    """v with a last column of ones, whose sums are the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _chunks(x: Tensor) -> Tensor:
    """[B, N, C, ...] from [B, T, ...], zeros after the end: a zero in v's column of ones adds nothing to the state."""
    padding = -x.shape[1] % CHUNK
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, padding]).unflatten(1, (-1, CHUNK))
