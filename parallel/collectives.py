"""Collectives as autograd pairs: a linear map over the ranks of a group, and its adjoint as the backward pass.

Pieces [B, T, ...] of the same rows lie on the ranks of a context group, contiguous, in rank order, of one length.
Every rank calls every function and uses what comes out, or backward passes would wait for one another. Where a result
is the same on every rank, so is its gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def left_halo(x: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
    """The n entries [B, n, ...] left of x [B, T, ...], from as many ranks as they lie on; zeros left of the row."""
    return _LeftHalo.apply(x, n, group)


def entering_state(state: Tensor, transition: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The state that enters this piece, of which every piece left of it maps h to `transition * h + state`.

        h_0 = 0,   h_{r+1} = transition_r h_r + state_r

    One all-gather each way, whose bytes do not depend on T: of the states and transitions, of the gradients.

    Args:
        state: the piece's final state from zero.
        transition: broadcasts to `state`, in its dtype.
        group: the ranks of the row.
    """
    return _EnteringState.apply(state, transition, group)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole rows [B, size * T, ...] of the pieces x [B, T, ...]; backward sums and scatters."""
    return _GatherTokens.apply(x, group)


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, the same on every rank, where each rank's use of it gives a part of its gradient; backward sums."""
    return _SumGradients.apply(x, group)


def sum_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's x; backward is the identity. The adjoint of `sum_gradients`."""
    return _SumParts.apply(x, group)


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
        ctx.n, ctx.group, ctx.shape = n, group, x.shape
        tokens, rank = x.shape[1], group.rank()
        counts = _halo_counts(n, tokens, group)
        sent = {rank + hop: x[:, tokens - count :] for hop, count in counts.items() if rank + hop < group.size()}
        taken = {rank - hop: _entries(x, count) for hop, count in counts.items() if rank - hop >= 0}
        _exchange(sent, taken, group)
        missing = n - sum(part.shape[1] for part in taken.values())
        return torch.cat([_entries(x, missing).zero_(), *(taken[source] for source in sorted(taken))], dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,), group = grads, ctx.group
        tokens, rank = ctx.shape[1], group.rank()
        counts = _halo_counts(ctx.n, tokens, group)
        sent, end = {}, ctx.n
        for hop, count in counts.items():
            if rank - hop >= 0:
                sent[rank - hop] = grad[:, end - count : end]
                end -= count
        taken = {rank + hop: _entries(grad, count) for hop, count in counts.items() if rank + hop < group.size()}
        _exchange(sent, taken, group)
        dx = grad.new_zeros(ctx.shape)
        for part in taken.values():
            dx[:, tokens - part.shape[1] :] += part
        return dx, None, None


def _halo_counts(n: int, tokens: int, group: dist.ProcessGroup) -> dict[int, int]:
    """How many entries the rank so many hops to the left gives to a halo of n."""
    hops = range(1, min(-(-n // tokens), group.size() - 1) + 1)
    return {hop: min(tokens, n - (hop - 1) * tokens) for hop in hops}


def _entries(x: Tensor, count: int) -> Tensor:
    return x.new_empty(x.shape[0], count, *x.shape[2:])


def _exchange(sent: dict[int, Tensor], taken: dict[int, Tensor], group: dist.ProcessGroup) -> None:
    """Sends and fills tensors by their peer's rank in the group."""
    sends = [dist.P2POp(dist.isend, t.contiguous(), group=group, group_peer=peer) for peer, t in sent.items()]
    receives = [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for peer, t in taken.items()]
    for work in dist.batch_isend_irecv(sends + receives) if sends or receives else ():
        work.wait()


class _EnteringState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state: Tensor, transition: Tensor, group: dist.ProcessGroup) -> Tensor:
        assert state.dtype == transition.dtype, f"state is {state.dtype} and transition {transition.dtype}"
        packed = torch.cat([state.flatten(), transition.flatten()])
        states, transitions = _gather(packed, group).split([state.numel(), transition.numel()], dim=1)
        entering = torch.zeros_like(state)
        for left in range(group.rank()):
            entering = transitions[left].view_as(transition) * entering + states[left].view_as(state)
        ctx.group = group
        ctx.save_for_backward(entering, transitions.contiguous(), transition)
        return entering

    @staticmethod
    def backward(ctx, *grads: Tensor):
        entering, transitions, transition = ctx.saved_tensors
        (grad,), group = grads, ctx.group
        gathered = _gather(grad.flatten(), group)
        # The gradient of the state that leaves this piece, from the last rank to this one.
        leaving = torch.zeros_like(grad)
        for right in reversed(range(group.rank() + 1, group.size())):
            leaving = transitions[right].view_as(transition) * leaving + gathered[right].view_as(grad)
        return leaving, (leaving * entering).sum_to_size(transition.shape), None


def _gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[size, N] of every rank's flat [N]."""
    gathered = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_into_tensor(gathered, flat.contiguous(), group=group)
    return gathered.view(group.size(), -1)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        pieces = _gather(x.flatten(), group).view(group.size(), *x.shape)
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
