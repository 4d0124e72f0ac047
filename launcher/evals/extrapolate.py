"""How far a model extrapolates: bits per byte of the same held-out text, read in rows of growing length.

Protocol. Held-out documents are cut into pieces of the longest length. At each length L the pieces are cut into rows
of L tokens that do not overlap; every row begins with nothing before it. So each token is scored once at every length
and only the context it sees changes. Longer rows help in two ways: fewer tokens stand at the beginning of a row, where
any model is poor, and late tokens see further back. The last quarter of each row is given beside the whole, since it
holds no such beginnings: a model that really uses distance improves there too.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ...data import Corpus
from ...errors import ConfigError
from ...kernels import Segments
from ...models import LanguageModel
from ...models.config import num_params
from ..schema import count_of
from ..trained import TrainedModel, open_trained
from ..training.rows import make_cache
from .baselines import score_baselines
from .heldout import HeldoutText, choose_text
from .report import Bucket, Extrapolation, LengthScore, results_folder, save

# Tokens of one forward pass (at least one row), and logits held at once: they bound the memory.
TOKENS_AT_ONCE = 8192
LOGITS_AT_ONCE = 1 << 24
LN2 = 0.6931471805599453


def evaluate(
    run: Path, lengths: str, corpus: str | None, tokens: str, output: Path | None, device: str = "auto"
) -> tuple[Extrapolation, list[Path]]:
    """The extrapolation of the model in `run`, and the .json and .png it was written to.

    Args:
        run: a run folder or a checkpoint.
        lengths: as on the command line, "256,512,1Ki".
        corpus: which corpus's held-out split to score; None takes the run's first.
        tokens: how many tokens to score at each length, as on the command line.
        output: folder for the results; None takes the run's evals folder.
        device: auto, cpu or cuda.
    """
    wanted = parse_lengths(lengths)
    budget = count_of(tokens, "--tokens")
    if budget < 1:
        raise ConfigError(f"--tokens is {tokens}; give how many held-out tokens to score, say 64Ki.")
    trained = open_trained(run, device)
    opened = trained.open_corpus(corpus)
    target = results_folder(output or trained.folder.evals)
    result = extrapolate(trained, opened, wanted, budget)
    return result, save(result, target)


def parse_lengths(text: str) -> list[int]:
    """The lengths in rising order; each must divide the longest, so that all cut the same text."""
    lengths = sorted({count_of(part, "--lengths") for part in text.split(",") if part.strip()})
    if not lengths or lengths[0] < 1:
        raise ConfigError(f"--lengths is {text!r}; write row lengths in tokens, say 512,1024,2048.")
    odd = [length for length in lengths if lengths[-1] % length]
    if odd:
        raise ConfigError(f"--lengths holds {odd[0]}, which does not divide the longest, {lengths[-1]}; leave it out.")
    return lengths


def extrapolate(trained: TrainedModel, corpus: Corpus, lengths: list[int], tokens: int) -> Extrapolation:
    """The scores at each length and of the baselines, on about `tokens` tokens of the corpus's held-out text."""
    cache = make_cache(trained.config)
    text = choose_text(corpus, trained.tokenizer, lengths[-1], tokens, cache)
    return Extrapolation(
        run=str(trained.folder.path),
        step=trained.step,
        parameters=num_params(trained.config.model),
        corpus=corpus.location,
        device=str(trained.device),
        trained_lengths=sorted({stage.seq_len for stage in trained.config.stages}),
        text=text.kind,
        tokens=text.tokens,
        text_bytes=text.text_bytes,
        lengths=[score(trained.model, text, length) for length in lengths],
        baselines=score_baselines(corpus, trained.tokenizer, text.bytes_scored, cache),
    )


def score(model: LanguageModel, text: HeldoutText, length: int) -> LengthScore:
    """The score of the text cut into rows of `length` tokens."""
    began = time.perf_counter()
    device = next(model.parameters()).device
    inputs = torch.from_numpy(text.inputs.reshape(-1, length))
    labels = torch.from_numpy(text.labels.reshape(-1, length))
    nats = torch.zeros(length, dtype=torch.float64)
    rows = max(1, TOKENS_AT_ONCE // length)
    for some_inputs, some_labels in zip(inputs.split(rows), labels.split(rows), strict=True):
        nats += token_nats(model, some_inputs.to(device), some_labels.to(device)).double().sum(0).cpu()
    bits = nats / LN2
    bytes_a_position = text.text_bytes / length

    def rate(begin: int, end: int) -> float:
        return float(bits[begin:end].sum()) / (bytes_a_position * (end - begin))

    return LengthScore(
        length=length,
        rows=len(inputs),
        bits_per_byte=rate(0, length),
        last_quarter=rate(length * 3 // 4, length),
        buckets=[Bucket(begin, end, rate(begin, end)) for begin, end in bucket_bounds(length)],
        seconds=time.perf_counter() - began,
    )


@torch.no_grad()
def token_nats(model: LanguageModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """The cost in nats, fp32 [B, T], of each label [B, T]; each row begins a document."""
    hidden = model.hidden(inputs, Segments.whole(*inputs.shape, device=inputs.device)).flatten(0, 1)
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    pieces = zip(hidden.split(at_once), labels.flatten().split(at_once), strict=True)
    costs = [functional.cross_entropy(model.head(h).float(), label, reduction="none") for h, label in pieces]
    return torch.cat(costs).view(labels.shape)


def bucket_bounds(length: int, first: int = 64) -> list[tuple[int, int]]:
    """Position buckets [0, 64), [64, 128), [128, 256), ... up to `length`, each as long as all before it."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] * 2 or first))
    return list(zip(bounds, bounds[1:], strict=False))
