"""Causal and sliding-window softmax attention in PyTorch, block of queries by block of queries.

A block meets only the keys that its window can reach, so time and memory are O(T W) with a window and memory is
O(T BLOCK) without one; T x T never exists. The softmax is in fp32 (fp64 for fp64 inputs). Grouped queries share their
keys by shape, G * C rows of queries to one key head, so keys are never repeated. The backward pass recomputes the
weights from the saved log-sum-exp. A query that keeps no key gives 0 and passes no gradient.

Two choices are for CPUs: scores are in base 2, since PyTorch's exp takes 20 to 100 times longer where the result
underflows and exp2 does not; and the mask is added, which is 10 times faster than masked_fill over heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .scoring import LOG2_E, Scoring

# Queries a block; the best of 32, 64, 128 and 256 overall, at windows of 128 and 512 over 512 and 8192 tokens on a CPU.
BLOCK = 64


def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V] in q's dtype, base-2 log-sum-exp of the scores [B, Hkv, T * G]); see op.py."""
    heads = k.shape[2]
    queries, keys, values = _grouped(q, heads), _by_head(k), _by_head(v)
    batch, _, groups, tokens, _ = queries.shape
    y = values.new_empty(batch, heads, groups, tokens, v.shape[3])
    lse = values.new_empty(batch, heads, groups, tokens)
    for rows, columns in _blocks(tokens, k.shape[1], scoring.window, scoring.key_offset):
        scores = _scores(queries, keys, rows, columns, scoring)
        # A query without keys has a highest score of -inf: shifted by 0 instead, its weights are 0 and not NaN.
        highest = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
        highest.masked_fill_(highest == -torch.inf, 0)
        weights = scores.sub_(highest).exp2_()
        total = weights.sum(-1, keepdim=True)
        out = (weights.flatten(2, 3) @ values[:, :, columns]).view(*weights.shape[:-1], -1)
        torch.div(out, total.masked_fill(total == 0, 1), out=y[..., rows, :])
        # +inf where there was no key, so that the backward pass finds weights of 2^(-inf - inf) = 0.
        lse[..., rows] = torch.where(total == 0, torch.inf, highest + total.log2()).squeeze(-1)
    return y.movedim(3, 1).flatten(2, 3).to(q.dtype).contiguous(), lse.transpose(2, 3).flatten(2).contiguous()


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): with weights p and dp = dy v^T, the scores' gradient is p (dp - sum(dy y))."""
    heads = k.shape[2]
    queries, keys, values, dout = _grouped(q, heads), _by_head(k), _by_head(v), _grouped(dy.to(lse.dtype), heads)
    row_sums = (dout * _grouped(y, heads)).sum(-1)
    lse = lse.unflatten(2, (q.shape[1], -1)).transpose(2, 3)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, columns in _blocks(q.shape[1], k.shape[1], scoring.window, scoring.key_offset):
        scores = _scores(queries, keys, rows, columns, scoring)
        weights = scores.sub_(lse[..., rows].unsqueeze(-1)).exp2_()
        grad = dout[..., rows, :].flatten(2, 3)
        dv[:, :, columns] += weights.flatten(2, 3).transpose(2, 3) @ grad
        dweights = (grad @ values[:, :, columns].transpose(2, 3)).view_as(weights)
        dscores = dweights.sub_(row_sums[..., rows].unsqueeze(-1)).mul_(weights).flatten(2, 3)
        dq[..., rows, :] = (dscores @ keys[:, :, columns]).view(*weights.shape[:-1], -1)
        dk[:, :, columns] += dscores.transpose(2, 3) @ queries[..., rows, :].flatten(2, 3)
    dq = dq.mul_(scoring.scale).permute(0, 3, 1, 2, 4).flatten(2, 3)
    dk.mul_(scoring.scale)
    return (
        dq.to(q.dtype).contiguous(),
        dk.transpose(1, 2).to(k.dtype).contiguous(),
        dv.transpose(1, 2).to(v.dtype).contiguous(),
    )


def compute_dtype(*inputs: Tensor) -> torch.dtype:
    """fp64 where an input is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def _blocks(tokens: int, keys: int, window: int | None, key_offset: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each block: every key that one of its queries may keep lies in the second slice."""
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        last = max(0, min(keys, stop - key_offset))
        first = 0 if window is None else max(0, start - window + 1 - key_offset)
        yield slice(start, stop), slice(min(first, last), last)


def _scores(queries: Tensor, keys: Tensor, rows: slice, columns: slice, scoring: Scoring) -> Tensor:
    """[B, Hkv, G, C, n], scaled for base 2, -inf where a key is not kept."""
    block = queries[..., rows, :]
    scores = (block * (scoring.scale * LOG2_E)).flatten(2, 3) @ keys[:, :, columns].transpose(2, 3)
    query_at = torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
    key_at = torch.arange(columns.start, columns.stop, device=keys.device)[None, :] + scoring.key_offset
    dropped = key_at > query_at
    if scoring.window is not None:
        dropped |= query_at - key_at >= scoring.window
    if scoring.doc_start is not None:
        dropped = (dropped | (key_at < scoring.doc_start[:, rows, None]))[:, None, None]
    mask = torch.zeros(dropped.shape, dtype=scores.dtype, device=scores.device).masked_fill_(dropped, -torch.inf)
    scores = scores.unflatten(2, block.shape[2:4]).add_(mask)
    if scoring.slopes is None:
        return scores
    distance = (query_at - key_at).to(scores.dtype)
    return scores.sub_(scoring.slopes.to(scores.dtype).mul(LOG2_E).view(*scores.shape[1:3], 1, 1) * distance)


def _grouped(q: Tensor, heads: int) -> Tensor:
    """[B, T, H, K] as [B, Hkv, G, T, K] of the computing dtype."""
    return q.to(compute_dtype(q)).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)


def _by_head(k: Tensor) -> Tensor:
    """[B, T, Hkv, K] as [B, Hkv, T, K] of the computing dtype."""
    return k.to(compute_dtype(k)).transpose(1, 2)
