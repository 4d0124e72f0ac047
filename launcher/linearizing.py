"""`longscan linearize`: a Llama of transformers, or a transformer's run folder, into its trained linearized twin.

The teacher becomes a run folder of its own beside the run, the twin an ordinary run that begins with its weights.
Invariant: what can be wrong with teacher, configuration and corpus is said before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data import Batch, Corpus
from ..errors import ConfigError
from ..models import LanguageModel
from ..parallel.checkpoint import read_manifest
from ..parallel.checkpoint.storage import MappedFiles
from ..parallel.loss import LossModule
from .config import Config, checkpoint_config
from .converting import SHARD_BYTES, Importing, check_linearizable, direction, same_bits, twin_of, whole_tensor
from .elastic.supervisor import Outcome, train
from .merging import merge
from .run_folder import RunFolder, standing, write_new
from .trained import find_checkpoint, open_trained
from .training.rows import Validation
from .training.schedule import TrainingSchedule
from .validate import check_run


@dataclass(frozen=True)
class StageScore:
    """What a stage reached.

    Attributes:
        stage: its number; -1 for the twin before training.
        step: its last step.
        seq_len: tokens of its rows and of the held-out rows.
        teacher, twin: bits a byte of held-out text at the end of the stage; None where it was not scored.
        first_errors, last_errors: the blocks' transfer errors at its first and last step; empty in other stages.
    """

    stage: int
    objective: str
    trains: str
    step: int
    seq_len: int
    teacher: float | None
    twin: float | None
    first_errors: list[float]
    last_errors: list[float]

    def row(self) -> list[str]:
        """Its line of the table."""
        what = "before training" if self.stage < 0 else f"{self.objective}, {self.trains}".replace("_", " ")
        bits = [f"{bits:.4f}" if bits else "-" for bits in (self.teacher, self.twin)]
        errors = [_told(self.first_errors), _told(self.last_errors)]
        return [str(max(self.stage, 0)), what, f"{self.step:,}", f"{self.seq_len:,}", *bits, *errors]


@dataclass(frozen=True)
class Linearized:
    """How the run ended, and what its stages reached; `merged` is the twin without adapters, once finished."""

    status: str
    run: str
    teacher: str
    merged: str | None
    stages: list[StageScore]

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)

    def show(self, console: Console) -> None:
        """Prints a line a stage."""
        table = Table(box=None, pad_edge=False)
        heads = (
            "stage",
            "objective",
            "step",
            "tokens in a row",
            "teacher",
            "twin",
            "error at first",
            "at last (worst)",
        )
        for number, head in enumerate(heads):
            table.add_column(head, justify="left" if number == 1 else "right")
        for stage in self.stages:
            table.add_row(*stage.row())
        console.print("Held-out bits a byte, and how far the blocks' attention is from the teacher's.", soft_wrap=True)
        console.print(table)
        if self.merged:
            console.print(f"the twin, adapters merged: {self.merged}", markup=False, soft_wrap=True)


def linearize(
    source: Path,
    run: Path,
    config: str,
    overrides: Sequence[str],
    tokenizer: str | None = None,
    stop_at: int | None = None,
) -> Linearized:
    """Trains the linearized twin of the model at `source` in the run folder `run`, or resumes that.

    Args:
        source: a Llama of transformers (config.json and safetensors), or the run folder of a transformer.
        run: where the twin is trained; the teacher goes to `run`-teacher, the twin merged to `run`-merged.
        config: the stages and all else: a preset, a YAML file or a run folder. Its model is replaced by the twin.
        overrides: `key=value`, of the model too.
        tokenizer: "bytes" or a tokenizer.json, for a source that holds none.
        stop_at: save and leave after this step.

    Raises:
        ConfigError: a model that is no such transformer, or a corpus, configuration or folder that does not fit.
        UserError: files that do not fit, or a run that failed.
    """
    teacher = Teacher(source, tokenizer, Path(f"{run}-teacher"))
    resolved = twin_of(teacher.model, config, overrides)
    resolved.run.folder = str(run)
    checked, corpora = check_run(resolved)
    teacher.check_corpus(corpora[0])
    check_folders(run, teacher.folder)
    teacher.write()
    outcome = train(checked, init_from=str(teacher.folder), stop_at=stop_at)
    return report(outcome, checked, corpora, teacher.folder)


class Teacher:
    """The transformer that is linearized; making one checks it, `write` makes it a run folder where it is none."""

    def __init__(self, source: Path, tokenizer: str | None, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.importing: Importing | None = None
        if direction(source) == "longscan":
            self.importing = Importing(source, tokenizer)
            check_linearizable(self.importing)
            self.model = self.importing.model
            self.fingerprint = self.importing.tokenizer.info.fingerprint
            return
        if tokenizer:
            raise ConfigError(f"--tokenizer is {tokenizer!r}, but {source} has its own; leave it out")
        found, checkpoint = find_checkpoint(source)
        self.folder, meta = found.path, read_manifest(checkpoint).meta
        self.model, self.fingerprint = checkpoint_config(meta).model, meta["tokenizer"]

    def check_corpus(self, corpus: Corpus) -> None:
        """Raises ConfigError where the corpus's ids mean something else than the teacher's."""
        if corpus.tokenizer.fingerprint != self.fingerprint:
            raise ConfigError(
                f"{corpus.location} was prepared with tokenizer {corpus.tokenizer.fingerprint} "
                f"({corpus.tokenizer.vocab_size} tokens), but {self.source} has {self.fingerprint}; prepare it with "
                "the tokenizer of that model: longscan prepare ... --tokenizer FILE"
            )

    def write(self) -> None:
        """Converts the source, unless an earlier start did."""
        if self.importing is None:
            return
        if not self.folder.exists():
            self.importing.write(self.folder, SHARD_BYTES)
            return
        meta = read_manifest(find_checkpoint(self.folder)[1]).meta
        there = (checkpoint_config(meta).model, meta["tokenizer"])
        if "converted" not in meta or there != (self.model, self.fingerprint) or not self._last_block_is_there():
            raise ConfigError(f"{self.folder} is there and is not {self.source} converted; name another --run")

    def _last_block_is_there(self) -> bool:
        """Whether `folder` has the source's last block, bit for bit: a model trained otherwise differs there."""
        assert self.importing is not None
        checkpoint = find_checkpoint(self.folder)[1]
        manifest, files = read_manifest(checkpoint), MappedFiles(checkpoint)
        last = f"blocks.{self.model.layers - 1}."
        return all(
            same_bits(whole_tensor(manifest, files, f"weight/{name}"), tensor)
            for link in self.importing.links
            if link.ours[0].startswith(last)
            for name, tensor in zip(link.ours, self.importing.read(link), strict=True)
        )


def check_folders(run: Path, teacher: Path) -> None:
    """Raises ConfigError where `run` holds something that is not a run begun from `teacher`."""
    folder = RunFolder(run)
    if folder.exists and not teacher.exists():
        raise ConfigError(f"{run} holds a run that was not begun from {teacher}; name another folder with --run")
    if not folder.exists and run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"{run} exists and is no run folder; name another with --run")


def report(outcome: Outcome, config: Config, corpora: Sequence[Corpus], teacher: Path) -> Linearized:
    """What the run reached; a finished one is scored beside its teacher, merged, and the table kept in evals/."""
    folder = str(outcome.folder)
    if outcome.status != "finished":
        return Linearized(outcome.status, folder, str(teacher), None, stage_scores(outcome.folder, config, {}))
    merged = Path(f"{folder}-merged")
    if not merged.exists():
        merge(outcome.folder, merged)
    stages = stage_scores(outcome.folder, config, teacher_bits(teacher, config, corpora))
    found = Linearized(outcome.status, folder, str(teacher), str(merged), stages)
    file = RunFolder(outcome.folder).evals / f"linearized-{max(stage.step for stage in stages)}.json"
    if not file.exists():
        write_new(file, json.dumps(found.to_json(), indent=2) + "\n")
    return found


def stage_scores(run: Path, config: Config, taught: dict[int, float]) -> list[StageScore]:
    """One a stage that ended, after one of the twin before training; `taught` is the teacher's score by length."""
    folder, schedule = RunFolder(run), TrainingSchedule(config)
    metrics = {record["step"]: record for record in folder.metrics.standing()}
    validated = standing(record for record in folder.events.read() if record["event"] == "validated")
    twin = {record["step"]: record["heldout_bits_per_byte"] for record in validated}
    ends = [(-1, 0, 0)] + [(n, s.first_step + 1, s.first_step + s.steps) for n, s in enumerate(schedule.stages)]
    last = max(metrics, default=0)
    return [
        StageScore(
            stage=number,
            objective=config.stages[max(number, 0)].objective,
            trains=config.stages[max(number, 0)].trains,
            step=end,
            seq_len=(length := config.stages[max(number, 0)].seq_len),
            teacher=taught.get(length),
            twin=twin.get(end),
            first_errors=metrics.get(first, {}).get("transfer_errors", []),
            last_errors=metrics.get(end, {}).get("transfer_errors", []),
        )
        for number, first, end in ends
        if end <= last
    ]


def teacher_bits(teacher: Path, config: Config, corpora: Sequence[Corpus]) -> dict[int, float]:
    """The teacher's bits a byte on the held-out rows of each length that the run is scored at."""
    validation = Validation(config, corpora)
    if not config.validation.every or not validation.possible:
        return {}
    judge = _Judge(open_trained(teacher, config.run.device).model)
    lengths = sorted({stage.seq_len for stage in config.stages})
    scores: Any = ((length, validation.score(judge, length, 0, 1)[1]) for length in lengths)  # type: ignore[arg-type]
    return {length: nats / math.log(2) for length, nats in scores if nats}


class _Judge:
    """What `Validation` asks of an engine, of a model alone in a process."""

    def __init__(self, model: LanguageModel) -> None:
        self._loss = LossModule(model).eval()
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """The summed loss."""
        return torch.stack([self._loss(_on(batch, self._device)).double() for batch in batches]).sum()

    def sum(self, *values: float | Tensor) -> list[float]:
        """The values, there being no others."""
        return [float(value) for value in values]


def _on(batch: Batch, device: torch.device) -> Batch:
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


def _told(errors: list[float]) -> str:
    """The mean of the blocks' errors, and the worst of them."""
    return f"{sum(errors) / len(errors):.4f} ({max(errors):.4f})" if errors else "-"
