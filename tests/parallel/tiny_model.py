"""A small language model with LanguageModel's face, its data, and plain torch's way of training it."""

from types import SimpleNamespace

import torch
from torch import nn

from longscan.data.batch import IGNORED_LABEL, Batch
from longscan.kernels.segments import Segments
from longscan.models import LocalBackend
from longscan.parallel import deepspeed_setup

VOCAB, WIDTH, TOKENS = 33, 7, 12
STAGES = {
    "0": {"zero": 0},
    "1": {"zero": 1},
    "2": {"zero": 2},
    "3": {"zero": 3},
    "1 offloaded": {"zero": 1, "offload_optimizer": True},
    "2 offloaded": {"zero": 2, "offload_optimizer": True},
    "3 offloaded": {"zero": 3, "offload_optimizer": True},
}
# Of TinyModel's parameters stage 3 shards four, and keeps two whole.
deepspeed_setup.KEPT_WHOLE = 20


class TinyModel(nn.Module):
    """Embedding, a gated running mean, a tied head: odd sizes everywhere, so that no shard boundary is convenient."""

    def __init__(self, seed: int = 0, width: int = WIDTH, vocab: int = VOCAB):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab)
        self.backend = LocalBackend()
        self.embed = nn.Embedding(vocab, width)
        self.up = nn.Linear(width, 3 * width + 1)
        self.down = nn.Linear(3 * width + 1, width)
        self.scale = nn.Parameter(torch.zeros(width))
        self.cube = nn.Parameter(torch.zeros(3, 5, width))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def hidden(self, tokens, segments, contexts=None):
        x = self.embed(tokens) + self.cube.mean((0, 1))
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        x = x.cumsum(1) / steps[:, None]
        return (x + self.down(torch.tanh(self.up(x)))) * (1 + self.scale)

    def head(self, hidden):
        return hidden @ self.embed.weight.T

    def cross_entropy(self, hidden, labels, z_loss=0.0, **options):
        assert z_loss == 0
        logits = self.head(hidden).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", **options)

    def forward(self, tokens, segments):
        return self.head(self.hidden(tokens, segments))

    def logical_shapes(self):
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def no_weight_decay(self):
        return {"scale", "up.bias", "down.bias"}


def make_batch(seed: int, rows: int = 2, dummy: bool = False, vocab: int = VOCAB) -> Batch:
    """Rows of random tokens, a random part of the labels masked; all of them in a dummy."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(vocab, (rows, TOKENS), generator=generator)
    labels = torch.randint(vocab, (rows, TOKENS), generator=generator)
    masked = torch.rand(rows, TOKENS, generator=generator) < 0.3
    labels[masked | dummy] = IGNORED_LABEL
    segments = Segments.whole(rows, TOKENS)
    ids = () if dummy else tuple((0, seed * 100 + row) for row in range(rows))
    return Batch(inputs, labels, segments.cu_seqlens, segments.continues, segments.doc_start, ids, 0.0)


def step_batches(step: int) -> list[Batch]:
    """Five micro-batches of one step; neither 2, 3 nor 4 ranks share them evenly."""
    return [make_batch(1000 * step + index, rows=1 + index % 3) for index in range(5)]


def deal(batches: list[Batch], rank: int, world_size: int) -> list[Batch]:
    """This rank's share, filled with dummies to the same count on every rank."""
    share = batches[rank::world_size]
    return share + [make_batch(7, dummy=True)] * (-(-len(batches) // world_size) - len(share))


def train(engine, steps, rank: int, world_size: int, rate: float = 1e-2) -> list[tuple[float, float]]:
    """(global mean loss, gradient norm) of each step."""
    seen = []
    for step in steps:
        batches = step_batches(step)
        tokens = sum(batch.valid_tokens for batch in batches)
        (loss,) = engine.sum(engine.forward_backward(deal(batches, rank, world_size), tokens))
        seen.append((loss / tokens, engine.update(rate * (1 + step) / 5)))
    return seen


def train_plainly(model, options, steps, rate: float = 1e-2) -> list[tuple[float, float]]:
    """The same with torch.optim.AdamW over the parameters as they are, one process, one backward a step."""
    exempt = model.no_weight_decay()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in exempt], "weight_decay": options.weight_decay},
            {"params": [p for n, p in named.items() if n in exempt], "weight_decay": 0.0},
        ],
        betas=options.betas,
        eps=options.eps,
    )
    seen = []
    for step in steps:
        losses, tokens = [], 0
        for batch in step_batches(step):
            logits = model(batch.inputs, None)
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"))
            tokens += batch.valid_tokens
        loss = sum(losses) / tokens
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + step) / 5
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    return seen
