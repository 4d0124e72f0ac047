"""Plain causal attention by cuDNN, through PyTorch's scaled_dot_product_attention operators.

On an H100 with 16 heads of 128 in bf16 it takes 1.09 (forward) and 0.85 (both) of our kernels' time at 32768 tokens,
for its backward pass is faster. That adds up dq in no fixed order: other bits each time. Key heads are not copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from .scoring import LOG2_E, Scoring, statistics_shape

# Wider heads are not measured. cuDNN prepares itself for each shape anew, which few tokens do not repay.
MOST_HEAD_DIM = 128
LEAST_TOKENS = 1024


def covers(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether cuDNN computes this, and may: not where deterministic algorithms are asked for."""
    plain = scoring.doc_start is None and scoring.slopes is None and scoring.key_offset == 0
    square = LEAST_TOKENS <= q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3] <= MOST_HEAD_DIM
    every_key = scoring.window is None or scoring.window >= k.shape[1]
    if q.device.type != "cuda" or torch.are_deterministic_algorithms_enabled() or not (plain and square and every_key):
        return False
    query, key, value = _heads_first(q, k, v)
    return can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, q.shape[2] != k.shape[2]))


def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], base-2 log-sum-exp of the scores [B, Hkv, T * G])."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    y, lse, *_ = run(*_heads_first(q, k, v), None, True, is_causal=True, scale=scoring.scale)
    lse = lse.view(q.shape[0], k.shape[2], -1, q.shape[1]).transpose(2, 3).contiguous() * LOG2_E
    return y.transpose(1, 2).contiguous(), lse.view(statistics_shape(q, k))


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    lse = lse.view(q.shape[0], k.shape[2], q.shape[1], -1).transpose(2, 3).contiguous() / LOG2_E
    lse = lse.view(q.shape[0], q.shape[2], q.shape[1], 1)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    lengths = (q.shape[1], k.shape[1])
    grads = run(
        *_heads_first(dy, q, k, v, y), lse, unused, unused, None, None, None, *lengths, 0.0, True, scale=scoring.scale
    )
    dq, dk, dv = (t.transpose(1, 2).contiguous() for t in grads)
    return dq, dk, dv


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, T, H, K] as [B, H, T, K]."""
    return [t.transpose(1, 2) for t in tensors]
