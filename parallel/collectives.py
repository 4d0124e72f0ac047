"""Collectives as pairs: a linear map over the ranks of a group, and its adjoint for the backward pass.

Pieces [B, T, ...] of the same rows lie on the ranks of a context group, contiguous, in rank order, of one length.
Every rank calls every function and uses what comes out, or backward passes would wait for one another. Where a result
is the same on every rank, so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def left_halos(
    xs: Sequence[Tensor], n: int, group: dist.ProcessGroup, alone: bool = False
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """(xs, their halos): called, the n entries [B, n, ...] left of each x [B, T, ...], from as many ranks as they lie
    on; zeros left of the row.

    Those of all xs, which are of one dtype, are one message a rank. Entries travel from now until the call. Backward
    gradients travel from the call until here, where they are added to those of the xs returned: what is computed
    between the two hides the way, in both passes. In place, where nothing else holds those: then they are `alone`.
    """
    way, shapes = _Way(n, group), [x.shape[2:] for x in xs]
    *xs, begun = _BeginHalo.apply(way, alone, *xs)

    def halos() -> list[Tensor]:
        parts = _EndHalo.apply(begun, way).split([shape.numel() for shape in shapes], dim=2)
        return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]

    return xs, halos


class StateExchange:
    """The states that enter the pieces, of which each maps h to `transition * h + state`, and the gradients' way back.

        h_0 = 0,               h_{r+1} = transition_r h_r + state_r
        g_{last} = 0,          g_{r-1} = transition_r g_r + gradient_r

    One all-gather each way and level, whose bytes do not depend on T: of the states and transitions, begun here; of
    the gradients. Nothing here is differentiable: an op takes `from_right` and gives the gradients.

    Args:
        state: the piece's final state from zero.
        transition: broadcasts to `state`, in its dtype.
        levels: the ranks of the row. Or the ranks of this node, then its peers on all nodes of the row, in order: what
            a node's ranks make of a state is folded there and goes on as that of one rank (`groups.fold_levels`).
    """

    def __init__(self, state: Tensor, transition: Tensor, *levels: dist.ProcessGroup) -> None:
        assert state.dtype == transition.dtype, f"state is {state.dtype} and transition {transition.dtype}"
        self._shapes, self._levels = (state.shape, transition.shape), levels
        self._transitions: list[Tensor] = []
        self._begin(state, transition, levels[0])

    def entering(self) -> Tensor:
        """The state h_r that enters this piece; to be called once."""
        added = [self._end()]
        for level, group in enumerate(self._levels[1:]):
            here = self._fold(level, added[-1], range(len(added[-1])), torch.zeros_like(added[-1][0]))
            self._begin(here, self._transitions[-1].prod(0), group)
            added.append(self._end())
        return self._descend(added, [range(group.rank()) for group in self._levels])

    def from_right(self, gradient: Tensor) -> Tensor:
        """The gradient g_r of the state that leaves this piece; `gradient` is what the piece alone gives to h_r."""
        added = []
        for level, group in enumerate(self._levels):
            if level:
                ranks = range(len(added[-1]) - 1, -1, -1)
                gradient = self._fold(level - 1, added[-1], ranks, torch.zeros_like(added[-1][0]))
            gathered, work = _begin_gather(gradient.flatten(), group)
            work.wait()
            added.append(gathered.unflatten(1, self._shapes[0]))
        return self._descend(added, [range(group.size() - 1, group.rank(), -1) for group in self._levels])

    def _begin(self, state: Tensor, transition: Tensor, group: dist.ProcessGroup) -> None:
        self._under_way = _begin_gather(torch.cat([state.flatten(), transition.flatten()]), group)

    def _end(self) -> Tensor:
        """The states of the group's ranks [size, ...]; of these nothing is kept for the backward pass."""
        gathered, work = self._under_way
        del self._under_way
        work.wait()
        states, transitions = gathered.split([shape.numel() for shape in self._shapes], dim=1)
        self._transitions.append(transitions.clone().unflatten(1, self._shapes[1]))
        return states.unflatten(1, self._shapes[0])

    def _descend(self, added: list[Tensor], sides: list[range]) -> Tensor:
        """What leaves the ranks of one side where zero enters, level by level from the farthest."""
        folded = torch.zeros_like(added[0][0])
        for level in reversed(range(len(added))):
            folded = self._fold(level, added[level], sides[level], folded)
        return folded

    def _fold(self, level: int, added: Tensor, ranks: range, folded: Tensor) -> Tensor:
        """What leaves the last of `ranks`, of which each adds its part, where `folded` enters the first."""
        for rank in ranks:
            folded = torch.addcmul(added[rank], self._transitions[level][rank], folded)
        return folded


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole rows [B, size * T, ...] of the pieces x [B, T, ...]; backward sums and scatters."""
    return _GatherTokens.apply(x, group)


def sum_tokens(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens [B, T, ...] of the sum of every rank's [B, size * T, ...]; the adjoint of `gather_tokens`."""
    return _SumTokens.apply(parts, group)


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
        self.tokens = 0

    def begin(self, sent: dict[int, Tensor], taken: dict[int, Tensor]) -> None:
        """Sends and fills contiguous tensors by their peer's rank in the group."""
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
    def forward(ctx, way: _Way, alone: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.way, ctx.alone = way, alone
        way.tokens, rank = xs[0].shape[1], way.group.rank()
        counts = _halo_counts(way)
        wanted = {rank + hop: n for hop, n in counts.items() if rank + hop < way.group.size()}
        packed = _last_entries(xs, max(wanted.values(), default=0))
        sent = {peer: packed[:, packed.shape[1] - n :].contiguous() for peer, n in wanted.items()}
        way.begin(sent, {rank - hop: _entries(packed, n) for hop, n in counts.items() if rank - hop >= 0})
        return *(x.view_as(x) for x in xs), _entries(packed, 0)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        parts = ctx.way.end().values()
        dxs = [grad if ctx.alone or not parts else grad.clone() for grad in grads[:-1]]
        for part in parts:
            shares = part.split([dx.shape[2:].numel() for dx in dxs], dim=2)
            for dx, share in zip(dxs, shares, strict=True):
                dx[:, dx.shape[1] - part.shape[1] :] += share.unflatten(2, dx.shape[2:])
        return None, None, *dxs


class _EndHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        taken = way.end()
        missing = way.n - sum(part.shape[1] for part in taken.values())
        zeros = begun.new_zeros(begun.shape[0], missing, begun.shape[2])
        return torch.cat([zeros, *(taken[source] for source in sorted(taken))], dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,), way = grads, ctx.way
        rank = way.group.rank()
        counts = _halo_counts(way)
        sent, end = {}, way.n
        for hop, count in counts.items():
            if rank - hop >= 0:
                sent[rank - hop] = grad[:, end - count : end].contiguous()
                end -= count
        taken = {rank + hop: _entries(grad, n) for hop, n in counts.items() if rank + hop < way.group.size()}
        way.begin(sent, taken)
        return grad[:, :0], None


def _halo_counts(way: _Way) -> dict[int, int]:
    """How many entries the rank so many hops to the left gives to the halo."""
    hops = range(1, min(-(-way.n // way.tokens), way.group.size() - 1) + 1)
    return {hop: min(way.tokens, way.n - (hop - 1) * way.tokens) for hop in hops}


def _last_entries(xs: Sequence[Tensor], count: int) -> Tensor:
    """[B, count, F], the entries of all xs side by side."""
    return torch.cat([x[:, x.shape[1] - count :].flatten(2) for x in xs], dim=2)


def _entries(x: Tensor, count: int) -> Tensor:
    return _room(x, x.shape[0], count, x.shape[2])


def _room(like: Tensor, *shape: int) -> Tensor:
    """Where what other ranks send is received."""
    return like.new_empty(shape)


def _begin_gather(flat: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """[size, N] of every rank's flat [N], there when the work is done."""
    gathered = _room(flat, group.size(), flat.numel())
    work = dist.all_gather_into_tensor(gathered.view(-1), flat, group=group, async_op=True)
    assert work is not None
    return gathered, work


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _scattered(grads[0], ctx.group), None


class _SumTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(parts, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _gathered(grads[0], ctx.group), None


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces, work = _begin_gather(x.flatten(), group)
    work.wait()
    return pieces.view(group.size(), *x.shape).transpose(0, 1).flatten(1, 2)


def _scattered(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces = parts.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    total = torch.empty_like(pieces[0])
    dist.reduce_scatter_tensor(total.view(-1), pieces.view(-1), group=group)
    return total


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
