"""The diagonal linear scan in PyTorch: the specification the kernel is held to, and what CPU runs train with.

`scan` and `summarize` work in two levels, chunks of 32 or 64 tokens and the chain of chunks, so Python steps over the
tokens of one chunk while PyTorch covers all chunks at once. Only factors in [0, 1] are ever multiplied: no exponential
of a sum, so nothing overflows whatever the decays are. State is fp32, fp64 where an input is.

One core of a 2-core Xeon, fp32: `scan` takes 2.4 ms at (B, T, D) = (8, 512, 384), 23 ms at (1, 32768, 256); log2(T)
doubling 31 and 632 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """fp64 where an input is, else fp32: what states and factors are kept in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def scan(x: Tensor, a: Tensor, initial: Tensor, out: Tensor | None = None, reverse: bool = False) -> Tensor:
    """h [B, T, D] with h_t = a_t h_{t-1} + x_t and h_{-1} = initial [B, D].

    Args:
        x, a: [B, T, D] of the state's dtype, any strides.
        out: where h goes; may be x.
        reverse: runs from the last token to the first, h_t = a_t h_{t+1} + x_t with h_T = initial.
    """
    out = torch.empty_like(x) if out is None else out
    tokens, chunk = x.shape[1], _chunk(x.shape[1])
    if tokens <= chunk:
        _walk(x[:, None], a[:, None], initial[:, None], out[:, None], reverse)
        return out
    whole = tokens // chunk * chunk
    if reverse and whole < tokens:
        initial = scan(x[:, whole:], a[:, whole:], initial, out[:, whole:], reverse)[:, 0]
    xs, factors, outs = (t[:, :whole].unflatten(1, (-1, chunk)) for t in (x, a, out))
    states, transitions = _fold(xs, factors, reverse)
    ends = scan(states, transitions, initial, reverse=reverse)
    first = initial[:, None]
    enters = torch.cat([ends[:, 1:], first] if reverse else [first, ends[:, :-1]], dim=1)
    _walk(xs, factors, enters, outs, reverse)
    if not reverse and whole < tokens:
        scan(x[:, whole:], a[:, whole:], out[:, whole - 1], out[:, whole:])
    return out


def fold(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(state, transition) [B, D] each: what `scan` leaves from a zero state, and the product of all factors."""
    tokens, chunk = x.shape[1], _chunk(x.shape[1])
    if tokens <= chunk:
        state, transition = _fold(x[:, None], a[:, None])
        return state[:, 0], transition[:, 0]
    whole = tokens // chunk * chunk
    xs, factors = (t[:, :whole].unflatten(1, (-1, chunk)) for t in (x, a))
    state, transition = fold(*_fold(xs, factors))
    if whole < tokens:
        last, factor = fold(x[:, whole:], a[:, whole:])
        state, transition = torch.addcmul(last, factor, state), transition * factor
    return state, transition


def forward(x: Tensor, log_a: Tensor, initial: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    a = _factors(log_a, resets, state_dtype(x, log_a))
    h = scan(x.to(a.dtype), a[:, :-1], _or_zero(initial, a))
    return h.to(x.dtype), h[:, -1].clone()


def backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    extra: Tensor | None,
    log_a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dlog_a, dinitial), by the adjoint scan dx_t = dh_t + a_{t+1} dx_{t+1}, dlog_a_t = a_t h_{t-1} dx_t.

    Args:
        dh: gradient of h, or None for zero.
        dfinal: [B, D], gradient of the final state, or None for zero.
        extra: [B, D], added to the gradient of every token's log_a (what the transition of `summarize` asks for).
        log_a, h, initial, resets: as they entered and left the forward pass.
    """
    a = _factors(log_a, resets, state_dtype(h, log_a))
    dh = torch.zeros_like(a[:, 1:]) if dh is None else dh.to(a.dtype)
    dx = scan(dh, a[:, 1:], _or_zero(dfinal, a), reverse=True)
    dlog_a = a[:, :-1] * dx
    dinitial = dlog_a[:, 0].clone()
    dlog_a[:, 1:].mul_(h[:, :-1])
    dlog_a[:, 0].mul_(_or_zero(initial, a))
    if extra is not None:
        dlog_a.add_(extra[:, None])
    return dx.to(h.dtype), dlog_a.to(log_a.dtype), dinitial


def summarize(x: Tensor, log_a: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    a = _factors(log_a, resets, state_dtype(x, log_a))
    return fold(x.to(a.dtype), a[:, :-1])


def adjoint(dh: Tensor, log_a: Tensor, resets: Tensor | None) -> Tensor:
    """dinitial [B, D] where the final state has no gradient: a_0 (dh_0 + a_1 (dh_1 + ...))."""
    a = _factors(log_a, resets, state_dtype(dh, log_a))[:, :-1]
    return fold((a * dh).flip(1), a.flip(1))[0]


def _chunk(tokens: int) -> int:
    """Tokens a chunk; of the powers of two these were the fastest at 512 and at 32768 tokens."""
    return 32 if tokens < 2048 else 64


def _walk(x: Tensor, a: Tensor, enters: Tensor, out: Tensor, reverse: bool) -> None:
    """Scans every chunk of [B, N, C, D] into `out` from the state [B, N, D] that enters it."""
    chunk = x.shape[2]
    for c in range(chunk - 1, -1, -1) if reverse else range(chunk):
        enters = torch.addcmul(x[:, :, c], a[:, :, c], enters, out=out[:, :, c])


def _fold(x: Tensor, a: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """(state, transition) [B, N, D] of every chunk of [B, N, C, D]."""
    steps = range(x.shape[2] - 1, -1, -1) if reverse else range(x.shape[2])
    state, transition = x[:, :, steps[0]].clone(), a[:, :, steps[0]].clone()
    for c in steps[1:]:
        torch.addcmul(x[:, :, c], a[:, :, c], state, out=state)
        transition.mul_(a[:, :, c])
    return state, transition


def _factors(log_a: Tensor, resets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, T + 1, D]: exp(log_a), 0 at resets, and a last row of 1 so that [:, 1:] are the adjoint's factors."""
    batch, tokens, width = log_a.shape
    a = torch.empty(batch, tokens + 1, width, dtype=dtype, device=log_a.device)
    torch.exp(log_a.to(dtype), out=a[:, :-1])
    a[:, -1] = 1
    if resets is not None:
        a[resets.nonzero(as_tuple=True)] = 0
    return a


def _or_zero(initial: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[0], like.shape[2]) if initial is None else initial
