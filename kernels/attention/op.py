"""attention as a differentiable op: checks, dispatch, autograd. The maths is in reference.py.

Each pass is one custom operator, opaque to torch.compile and to activation checkpointing. Saved for the backward
pass: the inputs, y and the log-sum-exp of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_segments, check_tensor
from ..dispatch import resolve
from ..segments import Segments
from . import reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    *,
    window: int | None = None,
    key_offset: int = 0,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """y [B, T, H, V] of causal softmax attention, whole or windowed, differentiable in q, k and v.

        y_i = sum_j softmax_j(scale q_i . k_j) v_j   over keys at positions p_j = j + key_offset with
        doc_start_i <= p_j <= i  and  i - p_j < window

    A query that keeps no key gives 0. Multi-query and grouped-query attention: query head h reads key head
    h // (H / Hkv). The local attention of Griffin, arXiv 2402.19427, section 2.3.

    Args:
        q: [B, T, H, K].
        k: [B, T_k, Hkv, K], with H a multiple of Hkv.
        v: [B, T_k, Hkv, V].
        segments: documents of the queries' piece; None for one run of tokens that continues to the left.
        window: keys a query keeps, itself among them; None for all.
        key_offset: position of the first key in the queries' piece: minus the halo's length.
        scale: factor of the scores; None for 1 / sqrt(K).
        implementation: "auto", "reference" or "triton".
    """
    _check(q, k, v, segments, window, key_offset)
    resolve(implementation, "attention", q.device, q.dtype)
    doc_start = None if segments is None else segments.doc_start.view(q.shape[0], q.shape[1])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _forward(q, k, v, doc_start, window, key_offset, scale)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, window: int | None, key_offset: int) -> None:
    check_tensor("q", q, (None, None, None, None))
    check_tensor("k", k, (q.shape[0], None, None, q.shape[3]), q)
    check_tensor("v", v, (*k.shape[:3], None), q)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected one dtype")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window}, expected at least 1 (the token itself) or None")
    if key_offset > 0:
        raise ValueError(f"key_offset={key_offset}, expected minus the number of keys left of the piece")
    check_segments(segments, q)


@torch.library.custom_op("longscan::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, window: int | None, key_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    return reference.forward(q, k, v, doc_start, window, key_offset, scale)


@torch.library.custom_op("longscan::attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    window: int | None,
    key_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(dy, q, k, v, y, lse, doc_start, window, key_offset, scale)


@_forward.register_fake
def _(q, k, v, doc_start, window, key_offset, scale):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty((batch, k.shape[2], heads // k.shape[2], tokens), dtype=reference.compute_dtype(q))
    return q.new_empty((batch, tokens, heads, v.shape[3])), lse


@_backward.register_fake
def _(dy, q, k, v, y, lse, doc_start, window, key_offset, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, doc_start, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, doc_start)


def _gradients(ctx, dy: Tensor, _):
    return *_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
