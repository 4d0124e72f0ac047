"""Linear attention in PyTorch: the specification the kernel is held to, differentiated by autograd.

Chunks of 64 tokens: inside one the quadratic form, between them the state. Heads of keys are `h`, the query heads that
share one are `r`. Tokens' documents and groups are numbered; 0 are those that entered. With groups the state has two
parts, over the completed groups and over the open one; outside of this module the first is the sum of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear_scan.reference import state_dtype

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """Per chunk what tokens see of the state and leave in it.

    Attributes:
        documents, groups: [B, N, C], `groups` None for ordinary causal attention.
        before, group_before: [B, N], those of the token before each chunk.
        decay: [B, N, H, C], cumulative sums inside each chunk.
    """

    documents: Tensor
    before: Tensor
    groups: Tensor | None
    group_before: Tensor | None
    decay: Tensor

    @property
    def live(self) -> Tensor:
        """[B, N, C, C], which keys (last) a query sees."""
        same = self.documents[..., None] == self.documents[..., None, :]
        if self.groups is None:
            return same & torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=same.device).tril()
        return same & (self.groups[..., None] > self.groups[..., None, :])

    @property
    def seen(self) -> Tensor:
        """[B, N, slots, C], 1 where a query reads that part of the state."""
        reads = self.documents == self.before[..., None]
        if self.groups is None or self.group_before is None:
            return reads[:, :, None].to(self.decay.dtype)
        return torch.stack([reads, reads & (self.groups > self.group_before[..., None])], 2).to(self.decay.dtype)

    @property
    def left(self) -> Tensor:
        """[B, N, slots, C], 1 for the keys that a chunk adds to that part of the state."""
        goes = self.documents == self.documents[..., -1:]
        if self.groups is None:
            return goes[:, :, None].to(self.decay.dtype)
        opened = self.groups == self.groups[..., -1:]
        return torch.stack([goes & ~opened, goes & opened], 2).to(self.decay.dtype)

    @property
    def carried(self) -> Tensor:
        """[B, N, H], the factor of the state from chunk to chunk."""
        kept = self.documents[..., -1] == self.before
        return self.decay[..., -1].exp() * kept[..., None]

    @property
    def stays(self) -> Tensor | None:
        """[B, N], 1 where the open group is the same before and after a chunk."""
        return None if self.groups is None else (self.groups[..., -1] == self.group_before).to(self.decay.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final_state [B, H, slots, K, W], inverse of the normaliser [B, H, T] or empty); see op.py.

    `decay` [B, H, T]; the ids int32 [B, T].
    """
    dtype, out, tokens = state_dtype(q, k, v), v.dtype, q.shape[1]
    qs = _chunks(q.to(dtype)).unflatten(3, (k.shape[2], -1)) * scale
    ks, vs = _chunks(k.to(dtype)), _chunks((_with_one(v) if normalize else v).to(dtype))
    cut = _cut(ks, decay, documents, groups)
    difference = (cut.decay[..., None] - cut.decay[..., None, :]).clamp(max=0)
    weights = torch.einsum("bnihrk,bnjhk->bnhrij", qs, ks) * difference.exp()[:, :, :, None]
    weights = weights.masked_fill(~cut.live[:, :, None, None], 0)
    entering, final = _states(ks, vs, initial, cut)
    reach = cut.seen[:, :, None] * cut.decay.exp()[:, :, :, None]
    sums = torch.einsum("bnhrij,bnjhv->bnihrv", weights, vs)
    sums = sums + torch.einsum("bnihrk,bnhsi,bnhskv->bnihrv", qs, reach, entering)
    sums = sums.flatten(3, 4).flatten(1, 2)[:, :tokens]
    if not normalize:
        return sums.to(out), final, sums.new_empty(0)
    inverse = torch.where(sums[..., -1] == 0, 0, 1 / (sums[..., -1] + eps)).transpose(1, 2)
    return _divided(sums, eps).to(out), final, inverse


def adjoint(
    scale: float,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    y: Tensor,
    inverse: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
) -> Tensor:
    """dinitial [B, H, slots, K, W] where the final state has no gradient: q_t times the gradient of t's sums.

    Only the document that entered reads the state; its queries in the group that entered read both - open.
    """
    dtype = state_dtype(q, dy)
    dsums = dy.to(dtype)
    if inverse.numel():
        dsums = torch.cat([dsums, -(dsums * y.to(dtype)).sum(-1, keepdim=True)], dim=-1) * inverse.mT[..., None]
    dsums = dsums.unflatten(2, (k.shape[2], -1)) * scale
    if decay is not None:
        dsums = dsums * decay.to(dtype).cumsum(-1).exp().mT[..., None, None]
    if documents is not None:
        dsums = dsums * (documents == 0)[..., None, None, None]
    slots = [dsums] if groups is None else [dsums, -dsums * (groups == 0)[..., None, None, None]]
    qs = q.to(dtype).unflatten(2, (k.shape[2], -1))
    return torch.stack([torch.einsum("bthrk,bthrv->bhkv", qs, slot) for slot in slots], dim=2)


def summarize(
    k: Tensor, v: Tensor, decay: Tensor | None, documents: Tensor | None, groups: Tensor | None, normalize: bool
) -> Tensor:
    """State [B, H, slots, K, W] that the piece leaves from zero; see op.py."""
    dtype = state_dtype(k, v)
    ks, vs = _chunks(k.to(dtype)), _chunks((_with_one(v) if normalize else v).to(dtype))
    return _states(ks, vs, None, _cut(ks, decay, documents, groups))[1]


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    state: Tensor,
    begins: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(y, state [B, H, slots, K, W]) of one token; see op.py. `begins` [B], whether it opens a group."""
    if log_a is not None:
        state = state * log_a.to(state.dtype).exp()[..., None, None, None]
    added = (k[..., None] * (_with_one(v) if normalize else v)[..., None, :]).to(state.dtype)[:, :, None]
    if begins is None:
        state = state + added
        read = state[:, :, 0]
    else:
        kept = torch.stack([torch.ones_like(begins), ~begins], -1)
        state = state * kept[:, None, :, None, None]
        read = state[:, :, 0] - state[:, :, 1]
        state = state + added
    qs = q.to(state.dtype).unflatten(1, (k.shape[1], -1)) * scale
    sums = torch.einsum("bhrk,bhkv->bhrv", qs, read).flatten(1, 2)
    y = _divided(sums, eps) if normalize else sums
    return y.to(v.dtype), state


def _states(ks: Tensor, vs: Tensor, initial: Tensor | None, cut: Chunks) -> tuple[Tensor, Tensor]:
    """(entering [B, N, H, slots, K, W], final): the state before each chunk and after all."""
    remains = (cut.decay[..., -1:] - cut.decay).exp()
    added = torch.einsum("bnjhk,bnsj,bnhj,bnjhv->bnhskv", ks, cut.left, remains, vs)
    carried, stays = cut.carried[..., None, None, None], cut.stays
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(ks.dtype)
    if stays is not None:
        state = torch.stack([state[:, :, 0] - state[:, :, 1], state[:, :, 1]], 2)
    entering = []
    for n in range(added.shape[1]):
        entering.append(state)
        if stays is not None:
            state = _move(state, (1 - stays[:, n])[:, None, None, None])
        state = carried[:, n] * state + added[:, n]
    if stays is not None:
        state = torch.stack([state[:, :, 0] + state[:, :, 1], state[:, :, 1]], 2)
    return torch.stack(entering, 1), state


def _move(state: Tensor, completed: Tensor) -> Tensor:
    """The state with its open group's part, where `completed` is 1, joined to the others."""
    opened = completed * state[:, :, 1]
    return torch.stack([state[:, :, 0] + opened, state[:, :, 1] - opened], 2)


def _cut(ks: Tensor, decay: Tensor | None, documents: Tensor | None, groups: Tensor | None) -> Chunks:
    batch, count, _, heads, _ = ks.shape
    if decay is None:
        decay = ks.new_zeros(batch, heads, 1)
    decay = torch.nn.functional.pad(decay.to(ks.dtype), [0, count * CHUNK - decay.shape[2]])
    decay = decay.unflatten(2, (count, CHUNK)).transpose(1, 2).cumsum(-1)
    if documents is None:
        documents = torch.zeros(batch, 1, dtype=torch.int32, device=ks.device)
    return Chunks(*_ids(documents, count), *(_ids(groups, count) if groups is not None else (None, None)), decay)


def _ids(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """([B, N, C], [B, N]): of each token, those past the end as the last; of the token before each chunk, 0 first."""
    padding = ids[:, -1:].expand(-1, count * CHUNK - ids.shape[1])
    here = torch.cat([ids, padding], 1).unflatten(1, (count, CHUNK))
    last = here[..., -1]
    return here, torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1)


def _divided(sums: Tensor, eps: float) -> Tensor:
    """All columns over the last; where that is 0, 0 without a gradient, which eps alone would let grow to 1 / eps."""
    return torch.where(sums[..., -1:] == 0, 0, sums[..., :-1] / (sums[..., -1:] + eps))


def _with_one(v: Tensor) -> Tensor:
    """v with a last column of ones, whose sums are the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _chunks(x: Tensor) -> Tensor:
    """[B, N, C, ...] from [B, T, ...], zeros after the end."""
    padding = -x.shape[1] % CHUNK
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, padding]).unflatten(1, (-1, CHUNK))
