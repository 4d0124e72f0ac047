"""The sequence ops: functions on tensors, one folder each, with a reference and where it pays a Triton kernel.

No module holds parameters and none knows of ranks. The invariant: whatever piece of a sequence an op is given, with
the state, tail or keys left of it and its Segments, the result is the one the whole sequence gives there.
"""

from .attention import attention
from .block_diagonal import gate_projections
from .cross_entropy import linear_cross_entropy, loss_from_pieces, vocabulary_pieces
from .linear_attention import linear_attention, linear_attention_step, linear_attention_summarize
from .linear_scan import linear_scan, linear_scan_summarize
from .rg_lru import rg_lru, rg_lru_summarize
from .rms_norm import rms_norm
from .rotary import rotary
from .segments import Segments
from .short_conv import short_conv
from .taylor_attention import taylor_attention, taylor_attention_step, taylor_attention_summarize

__all__ = [
    "Segments",
    "attention",
    "gate_projections",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_summarize",
    "linear_cross_entropy",
    "linear_scan",
    "linear_scan_summarize",
    "loss_from_pieces",
    "rg_lru",
    "rg_lru_summarize",
    "rms_norm",
    "rotary",
    "short_conv",
    "taylor_attention",
    "taylor_attention_step",
    "taylor_attention_summarize",
    "vocabulary_pieces",
]
