"""attention as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

Each pass is one step (opaque.py) to torch.compile and to activation checkpointing. Saved for the backward
pass: the inputs, y and the log-sum-exp of the scores.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..checks import check_segments, check_tensor
from ..dispatch import log_choice, resolve
from ..opaque import opaque
from ..segments import Segments
from . import reference, sdpa
from .scoring import Scoring, statistics_shape

# A block of a wider head exceeds a Hopper GPU's shared memory.
MOST_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    *,
    window: int | None = None,
    key_offset: int = 0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """y [B, T, H, V] of causal softmax attention, whole or windowed, differentiable in q, k and v.

        y_i = sum_j softmax_j(scale q_i . k_j - slope (i - p_j)) v_j   over keys at positions p_j = j + key_offset with
        doc_start_i <= p_j <= i  and  i - p_j < window

    Where every earlier key is kept (no window, ALiBi, halo or second document in a row), "auto" takes cuDNN's kernel
    on GPUs that have it: its backward pass is faster than ours, but its gradients have other bits each time.
    `torch.use_deterministic_algorithms(True)` or implementation="triton" avoids it; all else repeats its bits.

    A query that keeps no key gives 0. Multi-query and grouped-query attention: query head h reads key head
    h // (H / Hkv). The local attention of Griffin, arXiv 2402.19427, section 2.3; the linear biases of ALiBi, arXiv
    2108.12409.

    Args:
        q: [B, T, H, K].
        k: [B, T_k, Hkv, K], with H a multiple of Hkv.
        v: [B, T_k, Hkv, V].
        segments: documents of the queries' piece; None for one run of tokens that continues to the left.
        window: keys a query keeps, itself among them; None for all.
        key_offset: position of the first key in the queries' piece: minus the halo's length.
        scale: factor of the scores, above 0; None for 1 / sqrt(K).
        alibi_slopes: fp32 [H], what a head's score loses per token of distance; None for no bias. A constant: no
            gradient passes.
        implementation: "auto", "reference" or "triton".
    """
    if scale is None:
        scale = float(q.shape[3] ** -0.5)
    _check(q, k, v, segments, window, key_offset, scale, alibi_slopes)
    # Where each row is one document, no key from 0 on lies before it: the kernels need not look.
    if segments is None or (key_offset == 0 and segments.cu_seqlens.shape[0] == segments.batch + 1):
        doc_start = None
    else:
        doc_start = segments.doc_start.view(q.shape[0], q.shape[1])
    return _forward(q, k, v, doc_start, alibi_slopes, window, key_offset, scale, implementation)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None,
    window: int | None,
    key_offset: int,
    scale: float,
    alibi_slopes: Tensor | None,
) -> None:
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
    if not scale > 0:
        raise ValueError(f"scale={scale}, expected a number above 0")
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes, (q.shape[2],), q)
        if alibi_slopes.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"alibi_slopes is {alibi_slopes.dtype}, expected torch.float32")
    check_segments(segments, q)


def _module(implementation: str, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> ModuleType:
    """reference.py, kernel.py or sdpa.py, which hold the same functions."""
    if implementation == "auto" and sdpa.covers(q, k, v, scoring):
        log_choice("attention", q.device.type, q.dtype, implementation, "sdpa")
        return sdpa
    if resolve(implementation, "attention", q.device, q.dtype) == "reference":
        return reference
    widest = max(q.shape[3], v.shape[3])
    if widest > MOST_HEAD_DIM:
        raise ValueError(
            f"head dim {widest}: the Triton kernel takes at most {MOST_HEAD_DIM}; implementation='reference' takes any"
        )
    from . import kernel

    return kernel


@opaque("attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_start: Tensor | None,
    slopes: Tensor | None,
    window: int | None,
    key_offset: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    scoring = Scoring(doc_start, slopes, window, key_offset, scale)
    return _module(implementation, q, k, v, scoring).forward(q, k, v, scoring)


@opaque("attention_backward")
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    slopes: Tensor | None,
    window: int | None,
    key_offset: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    scoring = Scoring(doc_start, slopes, window, key_offset, scale)
    return _module(implementation, q, k, v, scoring).backward(dy, q, k, v, y, lse, scoring)


@_forward.register_fake
def _(q, k, v, doc_start, slopes, window, key_offset, scale, implementation):
    lse = q.new_empty(statistics_shape(q, k), dtype=reference.compute_dtype(q))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@_backward.register_fake
def _(dy, q, k, v, y, lse, doc_start, slopes, window, key_offset, scale, implementation):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, doc_start, slopes, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, doc_start, slopes)


def _gradients(ctx, dy: Tensor, _):
    return *_backward(dy, *ctx.saved_tensors, *ctx.options), *[None] * 6


_forward.register_autograd(_gradients, setup_context=_save)
