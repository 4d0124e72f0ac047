"""The RG-LRU in PyTorch: gates, normaliser and scan; the specification of the kernel, and what CPU runs train with.

Everything is written from e = exp(log_a) - 1, taken by expm1: 1 - a^2 = -e (2 + e) keeps full precision where a is near
1. In the backward pass e = -1 at a document's first token gives its factor 0 and its multiplier 1 with no further case.

Elementwise work goes by tiles that stay in the cache of a core, and the backward pass recomputes the gates: kept for
it are the inputs and h.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..linear_scan.reference import fold, scan

DECAY_SCALE = 8.0
# The derivative of sqrt(y) is taken as 1 / sqrt(max(4 y, 1e-6)): at most 1000, as in RecurrentGemma.
SQRT_GUARD = 1e-6
# Elements of a tile: five fp32 tensors of it are 1.3 MB, inside a 2 MB L2.
TILE = 65536


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """fp64 where a gate or x is, else fp32: what states and gates are computed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def forward(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, initial: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    a, u = _recurrence(x, gate_a, gate_x, a_param, resets)
    if initial is None:
        initial = torch.zeros_like(u[:, 0])
    h = scan(u, a, initial, out=u)
    return h.to(x.dtype), h[:, -1].clone()


def summarize(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    a, u = _recurrence(x, gate_a, gate_x, a_param, resets)
    return fold(u, a)


def backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    extra: Tensor | None,
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    a_param: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_a, dgate_x, da_param, dinitial).

    With u_t = m_t i_t x_t the input of the scan and du its adjoint scan of dh:
        dx = du m i,  dgate_x = du m x i (1 - i),  dgate_a = dlog_a (-8 softplus(a_param)) r (1 - r)
        dlog_a = a h_{t-1} du - 2 a^2 (du i x) / sqrt(max(4 (1 - a^2), 1e-6)) + extra

    Args:
        dh: gradient of h, or None for zero.
        dfinal: [B, D], gradient of the final state, or None for zero.
        extra: [B, D], added to the gradient of every token's log_a (what the transition of `summarize` asks for).
        x, gate_a, gate_x, a_param, h, initial, resets: as they entered and left the forward pass.
    """
    dtype = state_dtype(x, gate_a, gate_x)
    batch, tokens, width = x.shape
    rate = _rate(a_param, dtype)
    e = torch.empty(batch, tokens, width, dtype=dtype, device=x.device)
    a = torch.empty(batch, tokens + 1, width, dtype=dtype, device=x.device)
    for b, part in _tiles(x):
        torch.sigmoid(gate_a[b, part].to(dtype), out=e[b, part]).mul_(rate).expm1_()
        torch.add(e[b, part], 1, out=a[b, part])
    a[:, -1] = 1
    if resets is not None:
        first = resets.nonzero(as_tuple=True)
        e[first], a[first] = -1, 0
    du = scan(_or_zeros(dh, e), a[:, 1:], _or_zeros(dfinal, e[:, 0]), reverse=True)
    dinitial = a[:, 0] * du[:, 0]

    # e and du make room tile by tile for the gradients of gate_a and x.
    dx, dgate_a, dgate_x = du, e, torch.empty_like(du)
    drate = torch.zeros_like(rate)
    for b, part in _tiles(x):
        factor, grad = a[b, part], du[b, part]
        dlog_a = _previous(h, initial, b, part, dtype).mul_(grad)
        i = torch.sigmoid(gate_x[b, part].to(dtype))
        square = _one_minus_square(e[b, part])
        into_x = grad.mul_(i)
        into_m = torch.mul(into_x, x[b, part], out=dgate_x[b, part])
        slope = (square * 4).clamp_(min=SQRT_GUARD).rsqrt_()
        dlog_a.addcmul_(into_m, slope.mul_(factor), value=-2).mul_(factor)
        if extra is not None:
            dlog_a.add_(extra[b])
        m = square.sqrt_()
        into_x.mul_(m)
        into_m.mul_(m).mul_(i.neg_().add_(1))
        r = torch.sigmoid(gate_a[b, part].to(dtype), out=i)
        dlog_a.mul_(r)
        drate += dlog_a.sum(0)
        torch.mul(dlog_a, r.neg_().add_(1), out=dgate_a[b, part]).mul_(rate)
    da_param = drate * (-DECAY_SCALE * torch.sigmoid(a_param.to(dtype)))
    return dx.to(x.dtype), dgate_a.to(gate_a.dtype), dgate_x.to(gate_x.dtype), da_param.to(a_param.dtype), dinitial


def adjoint(dh: Tensor, gate_a: Tensor, a_param: Tensor, resets: Tensor | None) -> Tensor:
    """dinitial [B, D] where the final state has no gradient: a_0 (dh_0 + a_1 (dh_1 + ...))."""
    dtype = state_dtype(dh, gate_a)
    a = torch.sigmoid(gate_a.to(dtype)).mul_(_rate(a_param, dtype)).exp_()
    if resets is not None:
        a.masked_fill_(resets[..., None], 0)
    return fold((a * dh).flip(1), a.flip(1))[0]


def _recurrence(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(a, u) [B, T, D]: factors and inputs of the scan, a = exp(-8 r softplus(a_param)), u = sqrt(1 - a^2) i x."""
    dtype = state_dtype(x, gate_a, gate_x)
    rate = _rate(a_param, dtype)
    a, u = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    for b, part in _tiles(x):
        e = torch.sigmoid(gate_a[b, part].to(dtype), out=a[b, part]).mul_(rate).expm1_()
        m = _one_minus_square(e).sqrt_()
        torch.sigmoid(gate_x[b, part].to(dtype), out=u[b, part]).mul_(x[b, part]).mul_(m)
        e.add_(1)
    if resets is not None:
        first = resets.nonzero(as_tuple=True)
        a[first] = 0
        u[first] = torch.sigmoid(gate_x[first].to(dtype)) * x[first]
    return a, u


def _rate(a_param: Tensor, dtype: torch.dtype) -> Tensor:
    """[D]: log_a at an open recurrence gate, -8 softplus(a_param)."""
    return softplus(a_param.to(dtype)) * -DECAY_SCALE


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.to(like.dtype)


def _one_minus_square(e: Tensor) -> Tensor:
    """1 - a^2 = -e (2 + e), a new tensor."""
    return (e * -2).addcmul_(e, e, value=-1)


def _previous(h: Tensor, initial: Tensor | None, b: int, part: slice, dtype: torch.dtype) -> Tensor:
    """[tile, D]: h_{t-1} of the tile's tokens, a new tensor."""
    before = torch.empty(part.stop - part.start, h.shape[2], dtype=dtype, device=h.device)
    if part.start > 0:
        before[0] = h[b, part.start - 1]
    elif initial is not None:
        before[0] = initial[b]
    else:
        before[0] = 0
    before[1:] = h[b, part.start : part.stop - 1]
    return before


def _tiles(x: Tensor) -> Iterator[tuple[int, slice]]:
    """(row, span of tokens) covering x [B, T, D]; on an accelerator whole rows, for there launches cost more."""
    batch, tokens, width = x.shape
    step = max(1, TILE // width) if x.device.type == "cpu" else tokens
    for b in range(batch):
        for start in range(0, tokens, step):
            yield b, slice(start, min(start + step, tokens))
