"""The MLP's gate in one pass over memory each way: Liger's kernels, on CUDA, for everything but fp64.

By rule and never by attempt: where `runs` says so and liger-kernel is missing, importing it raises.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def runs(x: Tensor) -> bool:
    """Whether `gated` is to be used for x; torch.compile fuses the plain one with what is around it."""
    return x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`act(gate) * up`, where act is "gelu" (tanh approximation) or "silu".

    The backward pass writes both gradients over gate and up: it runs once, and nothing else may have kept them.
    """
    return _functions()[activation].apply(gate, up)


@functools.cache
def _functions() -> dict[str, Any]:
    """Liger's autograd functions.

    To learn whether there is an NPU, and whether PEFT is installed, Liger imports transformers and peft, and with them
    scipy, pandas and scikit-learn: up to 8 s. Neither concerns these functions, so it is told that there are none.
    """
    asked = [name for name in ("peft", "transformers") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(asked))  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    finally:
        for name in asked:
            del sys.modules[name]
    return {"gelu": LigerGELUMulFunction, "silu": LigerSiLUMulFunction}
