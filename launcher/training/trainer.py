"""The loop: rows in, updates out, until the last step or a request to stop.

One trainer for every way of running: alone in a process for a debugger, or as one rank of many. It is told where it
stands (`Place`), reports what it does, and starts nothing. What a step trains is decided by the schedule and the data
plan; a run that was interrupted goes on with the same rows and the same bits as one that was not.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...data import Batch, Corpus, Cursor, RowLoader, corpus_tokenizer, save_tokenizer
from ...errors import UserError
from ...models import flops_per_token, num_params
from ...parallel import Engine, OptimizerOptions, process_group
from ...parallel.checkpoint import Checkpointer, read_manifest, rng_state, set_rng_state
from ..config import Config, from_mapping, stage_model
from ..run_folder import RunFolder
from ..validate import open_corpora, parallel_dims
from .guard import LossGuard
from .metrics import Meter, MetricsWriter, bits_per_byte
from .mode import Mode
from .process import choose_device, choose_precision, prepare_process
from .resumption import Resumption
from .rows import Validation, make_plan
from .schedule import Step, TrainingSchedule

Report = Callable[[dict[str, Any]], None]

# Micro-batches read ahead of the one that trains.
PREFETCH = 4


@dataclass(frozen=True)
class Place:
    """Where a trainer stands: its rank of `world`, the group's incarnation, and rank 0's "host:port" (empty: alone)."""

    rank: int
    world: int
    incarnation: int
    address: str


@dataclass(frozen=True)
class Sums:
    """What a step trained, over all ranks; `errors` are those of the blocks in a stage that transfers attention."""

    loss: float
    tokens: int
    text_bytes: float
    grad_norm: float
    stop: bool
    errors: tuple[float, ...] = ()


class Trainer:
    """Trains one rank of a run.

    Args:
        config: resolved and validated, vocabulary filled in.
        folder: the run folder, on a disk that every rank sees.
        place: which rank this is.
        report: called with what a person may want to see; only rank 0 reports.
        stop_requested: once set on any rank, every rank saves and leaves after the step in progress.
    """

    def __init__(self, config: Config, folder: str, place: Place, report: Report, stop_requested: threading.Event):
        self.config = config
        self.folder = RunFolder.open(Path(folder))
        self.place = place
        self.stop_requested = stop_requested
        self.is_first = place.rank == 0
        self.report: Report = report if self.is_first else lambda _: None
        self.schedule = TrainingSchedule(config)
        self.guard = LossGuard(config.run.max_loss_ratio)
        self.device = choose_device(config.run.device)
        self.dims = parallel_dims(config, place.world)
        self.replica = place.rank // self.dims.replica_size
        self.last_step: Step | None = None
        self.stage: int | None = None
        self.last_checkpoint: str | None = None

    def run(self, init_from: str | None = None, stop_at: int | None = None) -> str:
        """Trains to the end, or to step `stop_at`; returns "finished" or "stopped".

        Args:
            init_from: the checkpoint folder whose weights begin a new run.
            stop_at: save and leave after this step.
        """
        prepare_process(self.config, self.place.world)
        options = {"rank": self.place.rank, "world_size": self.place.world, "address": self.place.address or None}
        timeout = self.config.run.timeout_seconds
        with ExitStack() as stack:
            stack.enter_context(process_group(**options, device=self.device, timeout_seconds=timeout))
            self._build(stack)
            self._begin(init_from)
            return self._train(min(stop_at or self.schedule.total_steps, self.schedule.total_steps))

    # Building

    def _build(self, stack: ExitStack) -> None:
        """Makes rows and writers; `stack` closes what must be closed."""
        config = self.config
        self.corpora: list[Corpus] = open_corpora(config)
        if self.is_first:
            save_tokenizer(corpus_tokenizer(self.corpora[0]), self.folder.tokenizer)
        self.plan = make_plan(config, self.corpora, self.schedule)
        self.loader = RowLoader(self.plan, pin_memory=self.device.type == "cuda")
        self.validation = Validation(config, self.corpora)
        self.resumption = Resumption(config, self.corpora[0], self.plan, self.schedule, self.dims)
        checkpoint = config.checkpoint
        self.saver = Checkpointer(self.folder.checkpoints, None, checkpoint.keep_last, checkpoint.keep_every)
        stack.callback(self._drop_engine)
        stack.callback(self.saver.close)
        self.meter = Meter(self.device, self.place.world)
        self.writer = MetricsWriter(config, self.folder) if self.is_first else None
        if self.writer:
            stack.callback(self.writer.close)

    def _make_engine(self, mode: Mode, weights: str | None) -> None:
        """Makes the engine that trains what `mode` says, with the checkpoint `weights`' weights, else the seed's."""
        config, optimizer = self.config, self.config.optimizer
        model = mode.make_model(config, self.dims)
        if weights:
            self.resumption.check_tokenizer(weights, mode.load_weights(weights, model, config.run.seed))
        else:
            model.init_weights(config.run.seed)
        options = OptimizerOptions(
            (optimizer.betas[0], optimizer.betas[1]), optimizer.eps, optimizer.weight_decay, optimizer.clip
        )
        precision = choose_precision(config.precision, self.device)
        self.engine = Engine(model, self.dims, options, precision, self.device, config.run.cuda_graphs)
        model.freeze()
        self.mode = mode
        self.saver.serve(self.engine)

    def _drop_engine(self) -> None:
        """Lets go of the engine, if there is one, and of its memory."""
        if hasattr(self, "engine"):
            self.saver.serve(None)
            self.engine.close()
            del self.engine

    def _begin(self, init_from: str | None) -> None:
        """Takes over the newest checkpoint that verifies; without one begins with `init_from`'s weights or the seed's.

        A checkpoint at the end of a stage whose successor trains otherwise gives its weights alone (`_enter`).
        """
        began = time.perf_counter()
        path, warnings = self.saver.find_latest()
        for warning in warnings:
            self.report({"kind": "warning", "text": warning})
        if path is None and warnings:
            raise UserError(
                f"no checkpoint in {self.folder.checkpoints} can be read: {warnings[0]}. Mend the disk, begin a new "
                "run with --run, or remove them to train this one from the start."
            )
        if path is None:
            first = self.schedule.step(1)
            self._make_engine(Mode.of(self.config, first.stage), init_from)
            self._introduce()
            if init_from and self.config.validation.every:
                self._score(0, first.seq_len)
            return
        meta = read_manifest(path).meta
        cursor = self.resumption.check(path, meta)
        self.last_step = self.schedule.step(meta["step"])
        self.last_checkpoint = path.name
        next_step = self.schedule.step(min(meta["step"] + 1, self.schedule.total_steps))
        mode = Mode.of(self.config, next_step.stage)
        if mode == Mode.of(from_mapping(meta["config"]), cursor.stage):
            self._make_engine(mode, None)
            self.saver.load(path)
            self.guard.restore(meta["guard"])
        else:
            self._make_engine(mode, str(path))
        set_rng_state(meta["rng"])
        self._introduce()
        seconds = time.perf_counter() - began
        text = f"resumed from {path.name} in {seconds:.1f} s; the next row is {cursor.row} of stage {cursor.stage}"
        self.report({"kind": "note", "text": f"{text}, step {meta['step'] + 1} of {self.schedule.total_steps}"})

    def _introduce(self) -> None:
        """Says what is about to be trained."""
        if not self.is_first:
            return
        parameters = num_params(self.config.model)
        tokens = sum(stage.rows_before(stage.steps) * stage.seq_len for stage in self.schedule.stages)
        end = Cursor(len(self.config.stages) - 1, self.schedule.stage_rows()[-1])
        epochs = ", ".join(f"{epoch:.2f}" for epoch in self.plan.epochs(end))
        self.report(
            {
                "kind": "note",
                "text": f"{parameters:,} parameters, {self.schedule.total_steps} steps, {tokens:,} tokens "
                f"({epochs} epochs), workers: {self.place.world} on {self.device.type}, {self.engine.precision}, "
                f"ZeRO-{self.dims.zero}",
            }
        )
        for number, stage in enumerate(self.plan.stages):
            chosen = (report for report in self.plan.packing_reports(number) if report.packing == stage.packing)
            self.report({"kind": "note", "text": f"rows of {stage.seq_len}, {next(chosen)}"})

    # The loop

    def _train(self, stop_at: int) -> str:
        """Steps to `stop_at` or a request to stop; returns how it ended."""
        begin = self.last_step.number if self.last_step else 0
        if begin >= self.schedule.total_steps:
            self.report({"kind": "note", "text": "every step is trained already"})
            return "finished"
        if begin >= stop_at:
            self.report({"kind": "note", "text": f"step {stop_at} is trained already; this run stands at {begin}"})
            return "stopped"
        wanted = (
            (step.stage, rows)
            for step in self.schedule.steps(begin, stop_at)
            for rows in step.micro_batches(self.replica, self.dims.data)
        )
        self.meter.restart()
        with self.loader.prefetch(wanted, depth=PREFETCH) as batches:
            for step in self.schedule.steps(begin, stop_at):
                entered = self._enter(step.stage)
                mine = [next(batches) for _ in step.micro_batches(self.replica, self.dims.data)]
                if entered:
                    self._compile(mine)
                sums = self._step(step, mine)
                self._record(step, sums)
                ending = sums.stop or step.number == stop_at
                self._validate(step)
                self._save(step, ending)
                if ending:
                    return "finished" if step.number == self.schedule.total_steps else "stopped"
        raise AssertionError("the last step ends the run")

    def _enter(self, stage: int) -> bool:
        """Gives the model what `stage` changes of it; returns whether the model was not in that stage already.

        Where it trains otherwise than the stage before, it begins as a run of its own would with the checkpoint just
        saved: adapters merged, moments zero. So a run resumed there is the same as one that went on.
        """
        if stage == self.stage:
            return False
        if (mode := Mode.of(self.config, stage)) != self.mode:
            self._drop_engine()
            self._make_engine(mode, str(self.folder.checkpoints / f"{self.last_checkpoint}"))
            self.guard = LossGuard(self.config.run.max_loss_ratio)
            self.meter.restart()
        self.stage = stage
        self.engine.model.use_positions(stage_model(self.config, stage))
        return True

    def _compile(self, batches: list[Batch]) -> None:
        """Compiles the kernels of a step all at once, where its micro-batches would compile one after the other.

        It costs one micro-batch, gone through for the kernels' sake. There are none on CPUs, and few by references.
        """
        if self.device.type != "cuda" or self.config.run.implementation == "reference":
            return
        from ...kernels.precompile import prepare, rehearse

        began = time.perf_counter()
        missing = rehearse(partial(self._rehearse, batches[:1]))
        if missing:
            self.report({"kind": "note", "text": f"compiling {len(missing)} kernels"})
            prepare(missing)
            self.report({"kind": "note", "text": f"compiled in {time.perf_counter() - began:.1f} s"})
        self.meter.restart()

    def _rehearse(self, batches: list[Batch]) -> None:
        """Forward and backward, of which nothing is left; collective."""
        self.engine.rehearse(batches)
        self.mode.block_errors(self.engine, 1.0)

    def _step(self, step: Step, batches: list[Batch]) -> Sums:
        """One update of the weights from one step's rows."""
        tokens, text_bytes, stop = self.engine.sum(
            sum(batch.valid_tokens for batch in batches),
            sum(batch.text_bytes for batch in batches),
            float(self.stop_requested.is_set()),
        )
        (loss_sum,) = self.engine.sum(self.engine.forward_backward(batches, int(tokens)))
        loss = loss_sum / tokens
        errors = self.mode.block_errors(self.engine, tokens)
        rows = self._plan_rows(step)
        self.guard.check(step, rows, loss, None, self.last_checkpoint)
        norm = self.engine.update(step.lr)
        self.guard.check(step, rows, loss, norm, self.last_checkpoint)
        self.guard.accept(loss)
        self.last_step = step
        return Sums(loss, int(tokens), text_bytes, norm, stop > 0, errors)

    def _plan_rows(self, step: Step) -> tuple[int, int]:
        """The first and last row of a step as the data plan numbers them, skipped rows counted."""
        first, last = step.first_row, step.first_row + step.rows - 1
        return self.plan.plan_row(step.stage, first), self.plan.plan_row(step.stage, last)

    def _record(self, step: Step, sums: Sums) -> None:
        """The step's lines in metrics.jsonl and ledger.jsonl, and on the screen."""
        pace = self.meter.measure(step.tokens, flops_per_token(self.config.model, step.seq_len))
        if self.writer is None:
            return
        first, last = self._plan_rows(step)
        self.folder.ledger.append(
            {
                "step": step.number,
                "stage": step.stage,
                "rows": [step.first_row, step.first_row + step.rows],
                "plan_rows": [first, last + 1],
                "incarnation": self.place.incarnation,
            }
        )
        metrics = {
            "step": step.number,
            "rows": step.rows,
            "tokens": sums.tokens,
            "loss": sums.loss,
            "bits_per_byte": None if sums.errors else bits_per_byte(sums.loss * sums.tokens, sums.text_bytes),
            "grad_norm": sums.grad_norm,
            "lr": step.lr,
            **({"transfer_errors": sums.errors, "worst_transfer_error": max(sums.errors)} if sums.errors else {}),
            **pace,
            "incarnation": self.place.incarnation,
        }
        self.writer.write(metrics)
        self.report({"kind": "step", "total_steps": self.schedule.total_steps, **metrics})

    def _ends_stage(self, step: Step) -> bool:
        return step.first_row + step.rows == self.schedule.stage_rows()[step.stage]

    def _ends_mode(self, step: Step) -> bool:
        """Whether the next step trains otherwise than this one."""
        last = step.number == self.schedule.total_steps
        return not last and Mode.of(self.config, self.schedule.step(step.number + 1).stage) != self.mode

    def _validate(self, step: Step) -> None:
        """Scores held-out text where that is due: at the end of a stage too."""
        every = self.config.validation.every
        if every and (step.number % every == 0 or self._ends_stage(step)):
            self._score(step.number, step.seq_len)

    def _score(self, number: int, seq_len: int) -> None:
        """The held-out loss after step `number`, for the records and the screen."""
        if not self.validation.possible:
            return
        loss, nats = self.validation.score(self.engine, seq_len, self.replica, self.dims.data)
        bits = nats / math.log(2) if nats else None
        if self.writer:
            self.writer.validation(number, loss, bits, self.place.incarnation)
        shown = f"{bits:.4f} bits/byte" if bits else f"loss {loss:.4f}"
        self.report({"kind": "note", "text": f"step {number}: held-out {shown}"})
        self.meter.restart()

    def _save(self, step: Step, ending: bool) -> None:
        """Begins a checkpoint when one is due; the last one is waited for."""
        if not ending and step.number % self.config.checkpoint.every and not self._ends_mode(step):
            return
        live = {"guard": self.guard.state(), "rng": rng_state(), "incarnation": self.place.incarnation}
        self.saver.save(step.number, {**self.resumption.describe(step), **live})
        self.last_checkpoint = f"step-{step.number}"
        if ending:
            self.saver.wait()
            self.report({"kind": "note", "text": f"saved {self.last_checkpoint}"})
        self.meter.restart()
