"""Collectives as pairs: a linear map over the ranks of a group, and its adjoint for the backward pass.

Pieces [B, T, ...] of the same rows lie on the ranks of a context group, contiguous, in rank order, of one length.
Every rank calls every function and uses what comes out, or backward passes would wait for one another. Where a result
is the same on every rank, so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def left_halo(x: Tensor, n: int, group: dist.ProcessGroup, alone: bool = False) -> tuple[Tensor, Callable[[], Tensor]]:
    """(x, its halo): called, the n entries [B, n, ...] left of x [B, T, ...], from as many ranks as they lie on; zeros
    left of the row.

    Entries travel from now until the call. Backward gradients travel from the call until here, where they are added to
    that of the x returned: what is computed between the two hides the way, in both passes. In place, where nothing
    else holds that gradient: then it is `alone`.
    """
    way = _Way(n, group)
    x, begun = _BeginHalo.apply(x, way, alone)
    return x, lambda: _EndHalo.apply(begun, way)


class StateExchange:
    """The states that enter the pieces, of which each maps h to `transition * h + state`, and the gradients' way back.

        h_0 = 0,               h_{r+1} = transition_r h_r + state_r
        g_{last} = 0,          g_{r-1} = transition_r g_r + gradient_r

    One all-gather each way, whose bytes do not depend on T: of the states and transitions, begun here; of the
    gradients. Nothing here is differentiable: an op takes `from_right` and gives the gradients.

    Args:
        state: the piece's final state from zero.
        transition: broadcasts to `state`, in its dtype.
        group: the ranks of the row.
    """

    def __init__(self, state: Tensor, transition: Tensor, group: dist.ProcessGroup) -> None:
        assert state.dtype == transition.dtype, f"state is {state.dtype} and transition {transition.dtype}"
        self._shapes, self._group = (state.shape, transition.shape), group
        packed = torch.cat([state.flatten(), transition.flatten()])
        self._gathered, self._work = _begin_gather(packed, group)

    def entering(self) -> Tensor:
        """The state h_r that enters this piece; to be called once."""
        self._work.wait()
        states, transitions = self._gathered.split([shape.numel() for shape in self._shapes], dim=1)
        # Of the states nothing is kept for the backward pass.
        self._transitions = transitions.clone().unflatten(1, self._shapes[1])
        del self._gathered, self._work
        return self._fold(states.unflatten(1, self._shapes[0]), range(self._group.rank()))

    def from_right(self, gradient: Tensor) -> Tensor:
        """The gradient g_r of the state that leaves this piece; `gradient` is what the piece alone gives to h_r."""
        gathered, work = _begin_gather(gradient.flatten(), self._group)
        work.wait()
        right = range(self._group.size() - 1, self._group.rank(), -1)
        return self._fold(gathered.unflatten(1, self._shapes[0]), right)

    def _fold(self, added: Tensor, ranks: range) -> Tensor:
        """What leaves the last of `ranks`, of which each adds its part; zero without ranks."""
        if not ranks:
            return torch.zeros_like(added[0])
        folded = added[ranks[0]].clone()
        for rank in ranks[1:]:
            folded = torch.addcmul(added[rank], self._transitions[rank], folded)
        return folded


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole rows [B, size * T, ...] of the pieces x [B, T, ...]; backward sums and scatters."""
    return _GatherTokens.apply(x, group)


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, the same on every rank, where each rank's use of it gives a part of its gradient; backward sums."""
    return _SumGradients.apply(x, group)


def sum_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's x; backward is the identity. The adjoint of `sum_gradients`."""
    return _SumParts.apply(x, group)


class _Way:
    """A halo of n entries on its way through a group; `begin` and `end` serve the entries and their gradients alike."""

    def __init__(self, n: int, group: dist.ProcessGroup) -> None:
        self.n, self.group = n, group
        self.shape = torch.Size()

    def begin(self, sent: dict[int, Tensor], taken: dict[int, Tensor]) -> None:
        """Sends and fills tensors by their peer's rank in the group."""
        sent = {peer: tensor.contiguous() for peer, tensor in sent.items()}
        sends = [dist.P2POp(dist.isend, t, group=self.group, group_peer=peer) for peer, t in sent.items()]
        receives = [dist.P2POp(dist.irecv, t, group=self.group, group_peer=peer) for peer, t in taken.items()]
        works = dist.batch_isend_irecv(sends + receives) if sends or receives else []
        self.under_way = sent, taken, works

    def end(self) -> dict[int, Tensor]:
        """What was taken."""
        _, taken, works = self.under_way
        for work in works:
            work.wait()
        del self.under_way
        return taken


class _BeginHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, way: _Way, alone: bool) -> tuple[Tensor, Tensor]:
        ctx.way, ctx.alone, way.shape = way, alone, x.shape
        tokens, rank = x.shape[1], way.group.rank()
        counts = _halo_counts(way.n, tokens, way.group)
        sent = {rank + hop: x[:, tokens - count :] for hop, count in counts.items() if rank + hop < way.group.size()}
        way.begin(sent, {rank - hop: _entries(x, count) for hop, count in counts.items() if rank - hop >= 0})
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        parts = ctx.way.end().values()
        dx = grads[0] if ctx.alone or not parts else grads[0].clone()
        for part in parts:
            dx[:, dx.shape[1] - part.shape[1] :] += part
        return dx, None, None


class _EndHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        taken = way.end()
        missing = way.n - sum(part.shape[1] for part in taken.values())
        zeros = begun.new_zeros(way.shape[0], missing, *way.shape[2:])
        return torch.cat([zeros, *(taken[source] for source in sorted(taken))], dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,), way = grads, ctx.way
        rank = way.group.rank()
        counts = _halo_counts(way.n, way.shape[1], way.group)
        sent, end = {}, way.n
        for hop, count in counts.items():
            if rank - hop >= 0:
                sent[rank - hop] = grad[:, end - count : end]
                end -= count
        taken = {rank + hop: _entries(grad, n) for hop, n in counts.items() if rank + hop < way.group.size()}
        way.begin(sent, taken)
        return grad.new_empty(0), None


def _halo_counts(n: int, tokens: int, group: dist.ProcessGroup) -> dict[int, int]:
    """How many entries the rank so many hops to the left gives to a halo of n."""
    hops = range(1, min(-(-n // tokens), group.size() - 1) + 1)
    return {hop: min(tokens, n - (hop - 1) * tokens) for hop in hops}


def _entries(x: Tensor, count: int) -> Tensor:
    return x.new_empty(x.shape[0], count, *x.shape[2:])


def _begin_gather(flat: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """[size, N] of every rank's flat [N], there when the work is done."""
    gathered = flat.new_empty(group.size(), flat.numel())
    work = dist.all_gather_into_tensor(gathered.view(-1), flat, group=group, async_op=True)
    assert work is not None
    return gathered, work


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        pieces, work = _begin_gather(x.flatten(), group)
        work.wait()
        pieces = pieces.view(group.size(), *x.shape)
        return pieces.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,), group = grads, ctx.group
        dx = grad.new_empty(ctx.shape)
        pieces = grad.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
        dist.reduce_scatter_tensor(dx.view(-1), pieces.view(-1), group=group)
        return dx, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _all_reduce(grads[0], ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
