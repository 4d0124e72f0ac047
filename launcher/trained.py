"""A trained model, opened from its run folder for evaluation and sampling, in one process without ranks.

It never writes. Invariant: weights, configuration and tokenizer are those of one checkpoint that verified.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import Corpus, Tokenizer, open_corpus, open_tokenizer
from ..errors import ConfigError, UserError
from ..models import LanguageModel
from ..models import generate as generate_tokens
from ..parallel import checkpoint as checkpoints
from .config import Config, checkpoint_config
from .run_folder import RunFolder
from .training.process import choose_device


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights, its tokenizer and where they came from."""

    model: LanguageModel
    config: Config
    tokenizer: Tokenizer
    folder: RunFolder
    checkpoint: Path

    @property
    def step(self) -> int:
        """The step after which the checkpoint was taken."""
        return int(self.checkpoint.name.removeprefix("step-"))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def open_corpus(self, path: str | None = None) -> Corpus:
        """The corpus at `path`, else the one it was trained on; ConfigError where another tokenizer prepared it."""
        opened = open_corpus(path or self.config.data.corpora[0].path)
        if opened.tokenizer.fingerprint != self.tokenizer.info.fingerprint:
            raise ConfigError(
                f"{opened.location} was prepared with tokenizer {opened.tokenizer.fingerprint}, but the model of "
                f"{self.folder.path} was trained with {self.tokenizer.info.fingerprint}; name the corpus it was "
                "trained on, or one prepared with its tokenizer."
            )
        return opened

    def sample(
        self, prompt: str, tokens: int, *, temperature: float, top_p: float, top_k: int, seed: int
    ) -> Iterator[str]:
        """Yields the text that continues `prompt`, piece by piece, ending where the model ends the document."""
        info = self.tokenizer.info
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the prompt is not UTF-8 (character {error.start}); give text.") from error
        ids = [info.bos_id, *self.tokenizer.encode(prompt).tolist()]
        sampled = generate_tokens(
            self.model,
            ids,
            tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_id=info.eos_id,
            vocab_size=info.vocab_size,
        )
        return decode_stream(self.tokenizer, sampled)


def open_trained(path: Path, device: str = "auto") -> TrainedModel:
    """The model of the run folder or checkpoint at `path`; its corpus need not be there.

    A run folder gives its newest checkpoint that verifies. Weights are fp32 on a CPU, in the run's precision on a GPU.
    """
    folder, chosen = find_checkpoint(Path(path))
    meta = checkpoints.read_manifest(chosen).meta
    config = checkpoint_config(meta)
    tokenizer = open_tokenizer(folder.tokenizer)
    if tokenizer.info.fingerprint != meta["tokenizer"]:
        raise ConfigError(
            f"{folder.tokenizer} holds {tokenizer.info.fingerprint}, but {chosen} was trained with "
            f"{meta['tokenizer']}; put that one back."
        )
    where = choose_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" and config.precision != "fp32" else torch.float32
    model = LanguageModel(config.model, implementation=config.run.implementation).to(where, dtype)
    checkpoints.load_weights(chosen, model)
    return TrainedModel(model.eval().requires_grad_(False), config, tokenizer, folder, chosen)


def decode_stream(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yields the text of `ids` as it grows; a character still split between tokens waits for its rest.

    Each token is decoded after a few before it, since a tokenizer may write a token otherwise at a text's beginning.
    """
    if tokenizer.info.kind == "bytes":
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if text := decoder.decode(bytes([token]) if token < 256 else b""):
                yield text
        yield decoder.decode(b"", final=True)
        return
    context: list[int] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        before, after = tokenizer.decode(context), tokenizer.decode(context + pending)
        if not after.endswith("\ufffd"):
            yield after[len(before) :]
            context, pending = (context + pending)[-8:], []
    if pending:
        yield tokenizer.decode(context + pending)[len(tokenizer.decode(context)) :]


def find_checkpoint(path: Path) -> tuple[RunFolder, Path]:
    """The run folder and checkpoint that `path` names."""
    path = path.resolve()
    if path.name.startswith("step-") and path.parent.name == "checkpoints":
        checkpoints.verify(path)
        return RunFolder.open(path.parent.parent), path
    folder = RunFolder.open(path)
    found, warnings = checkpoints.find_latest(folder.checkpoints)
    if found is None:
        reason = f" ({warnings[0]})" if warnings else ""
        raise UserError(f"{folder.path} holds no checkpoint that can be read{reason}; train it first.")
    return folder, Path(found)
