"""Language models on one device: a block pattern over mixers, given as data.

Not training, and no ranks: layers that a layout divides come from an injected Backend, and what lies outside a piece
of a sequence from a SequenceContext. One invariant: a model computes the same function whether it reads a sequence
whole, in pieces joined by their Carry, or token by token.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import (
    AttentionConfig,
    LinearizedAttentionConfig,
    LocalAttentionConfig,
    MLPConfig,
    ModelConfig,
    RGLRUConfig,
    ShortConvConfig,
    TaylorAttentionConfig,
    config_from_mapping,
    flops_per_token,
    load_preset,
    num_params,
    preset_names,
    validate,
)

if TYPE_CHECKING:
    from .backend import Backend, LocalBackend
    from .generate import generate
    from .language_model import LanguageModel, Part
    from .sequence import Carry, LocalContext, SequenceContext

# What needs torch comes when it is first asked for: a configuration is read and refused seconds sooner without it.
_NEED_TORCH = {
    "Backend": "backend",
    "Carry": "sequence",
    "LanguageModel": "language_model",
    "LocalBackend": "backend",
    "LocalContext": "sequence",
    "Part": "language_model",
    "SequenceContext": "sequence",
    "generate": "generate",
}

__all__ = [
    "AttentionConfig",
    "Backend",
    "Carry",
    "LanguageModel",
    "LinearizedAttentionConfig",
    "LocalAttentionConfig",
    "LocalBackend",
    "LocalContext",
    "MLPConfig",
    "ModelConfig",
    "Part",
    "RGLRUConfig",
    "SequenceContext",
    "ShortConvConfig",
    "TaylorAttentionConfig",
    "config_from_mapping",
    "flops_per_token",
    "generate",
    "load_preset",
    "num_params",
    "preset_names",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        globals()[name] = getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
