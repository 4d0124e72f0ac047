"""Small models of transformers with random weights, and their own logits in fp32 and in fp64."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
from transformers.models.bloom import modeling_bloom  # noqa: E402
from transformers.models.recurrent_gemma import modeling_recurrent_gemma  # noqa: E402

VOCAB = 64


def griffin(**changes):
    """RecurrentGemma: 5 blocks, heads of 8, a window of 8."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 5,
        "intermediate_size": 96,
        "attention_window_size": 8,
    }
    return transformers.RecurrentGemmaConfig(**{**fields, **changes})


def llama(**changes):
    """Llama: 2 blocks, 4 heads over 2 of keys."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 40,
    }
    return transformers.LlamaConfig(**{**fields, **changes})


def bloom(**changes):
    """BLOOM: 2 blocks of 4 heads."""
    return transformers.BloomConfig(**{"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4, "n_layer": 2, **changes})


def save(config, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Saves a model of `config` whose every parameter is random, norms included, and returns the folder."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            is_scale = name.endswith(("norm.weight", "ln_f.weight")) and config.model_type != "recurrent_gemma"
            middle = 1.0 if is_scale else 0.0
            parameter.copy_(middle + scale * noise)
    model.save_pretrained(folder, **options)
    return folder


def logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Transformers' own logits [B, T, V]."""
    if dtype == torch.float32:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return _logits(model, tokens)
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    with wide_floats():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        return _logits(model, tokens)


def _logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


@contextmanager
def wide_floats():
    """Transformers casts norms, softmax, angles and scans to fp32 whatever the model is; here fp32 is fp64."""
    scan = modeling_recurrent_gemma.RecurrentGemmaRglru._rnn_scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(scan, "__defaults__", (torch.float64,))
        # BLOOM's gelu writes sqrt(2 / pi) with eight digits.
        patch.setattr(modeling_bloom, "bloom_gelu_forward", partial(F.gelu, approximate="tanh"))
        yield
