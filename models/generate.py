"""Sampling text, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from ..errors import ConfigError, UserError
from .language_model import LanguageModel


def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
    chunk: int = 2048,
) -> Iterator[int]:
    """Up to `max_new_tokens` token ids that continue the prompt, one at a time; ends before `stop_id`.

    Args:
        model: in the dtype and on the device to sample with.
        prompt_tokens: at least one token; begin with the tokenizer's bos id, as documents do in training.
        max_new_tokens: the most that is generated.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draws among the k likeliest tokens only; 0 for all.
        top_p: draws among the likeliest tokens that together reach this probability; 1 for all.
        seed: of the draws; the same seed and model give the same text on one device.
        stop_id: the token that ends the text, usually the tokenizer's eos id.
        vocab_size: the tokenizer's size where the model's is rounded up; ids above it are never drawn.
        chunk: tokens of the prompt read at once.

    Raises:
        UserError: a value above makes no sense; at the call, before the first token is asked for.
    """
    _check(model, prompt_tokens, temperature, top_k, top_p, seed)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=Generator().manual_seed(seed))
    return _continue(model, prompt_tokens, max_new_tokens, draw, stop_id, vocab_size, chunk)


@torch.no_grad()
def _continue(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    draw: Callable[[Tensor], int],
    stop_id: int | None,
    vocab_size: int | None,
    chunk: int,
) -> Iterator[int]:
    device = model.get_parameter("embedding.weight").device
    logits, carry = model.prefill(torch.tensor([list(prompt_tokens)], device=device), chunk=chunk)
    for _ in range(max_new_tokens):
        token = draw(logits[0, :vocab_size].float().cpu())
        if token == stop_id:
            return
        yield token
        logits, carry = model.step(torch.tensor([token], device=device), carry)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: Generator) -> int:
    """A token id drawn from fp32 logits [V]; `generate` says what the options mean."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0
    if top_k:
        probabilities[top_k:] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _check(
    model: LanguageModel, prompt: Sequence[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    if not prompt:
        raise UserError("the prompt holds no token; begin it with the tokenizer's bos id")
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        worst = min(prompt) if min(prompt) < 0 else max(prompt)
        raise UserError(f"prompt token {worst} is outside the model's vocabulary of {model.config.vocab_size}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature} must be 0 (greedy) or above")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} must be a whole number from 0 to 2^63 - 1")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"top_k={top_k} must be 0 or above and top_p={top_p} above 0 and at most 1")
