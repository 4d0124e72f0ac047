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
from pathlib import Path
from typing import Any

from ...data import Batch, Corpus, Cursor, RowLoader, corpus_tokenizer, save_tokenizer
from ...errors import UserError
from ...models import flops_per_token, num_params
from ...parallel import Engine, OptimizerOptions, make_model, process_group
from ...parallel.checkpoint import Checkpointer, load_weights, rng_state, set_rng_state
from ..config import Config
from ..run_folder import RunFolder
from ..validate import open_corpora, parallel_dims
from .guard import LossGuard
from .metrics import Meter, MetricsWriter, bits_per_byte
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
    """What a step trained, over all ranks."""

    loss: float
    tokens: int
    text_bytes: float
    grad_norm: float
    stop: bool


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
            self._build(init_from, stack)
            self._resume()
            return self._train(min(stop_at or self.schedule.total_steps, self.schedule.total_steps))

    # Building

    def _build(self, init_from: str | None, stack: ExitStack) -> None:
        """Makes rows, model, engine and writers; `stack` closes what must be closed."""
        config = self.config
        self.corpora: list[Corpus] = open_corpora(config)
        if self.is_first:
            save_tokenizer(corpus_tokenizer(self.corpora[0]), self.folder.tokenizer)
        self.plan = make_plan(config, self.corpora, self.schedule)
        self.loader = RowLoader(self.plan, pin_memory=self.device.type == "cuda")
        self.validation = Validation(config, self.corpora)
        self.resumption = Resumption(config, self.corpora[0], self.plan, self.schedule, self.dims)
        self.engine = self._make_engine(init_from)
        stack.callback(self.engine.close)
        self.saver = Checkpointer(
            self.folder.checkpoints, self.engine, config.checkpoint.keep_last, config.checkpoint.keep_every
        )
        stack.callback(self.saver.close)
        self.meter = Meter(self.device, self.place.world)
        self.writer = MetricsWriter(config, self.folder) if self.is_first else None
        if self.writer:
            stack.callback(self.writer.close)

    def _make_engine(self, init_from: str | None) -> Engine:
        config, optimizer = self.config, self.config.optimizer
        kernels, recomputed = config.run.implementation, config.run.activation_checkpoint
        model = make_model(config.model, self.dims, implementation=kernels, activation_checkpoint=recomputed)
        if init_from:
            self.resumption.check_tokenizer(init_from, load_weights(init_from, model).meta)
        else:
            model.init_weights(config.run.seed)
        options = OptimizerOptions(
            (optimizer.betas[0], optimizer.betas[1]), optimizer.eps, optimizer.weight_decay, optimizer.clip
        )
        return Engine(model, self.dims, options, choose_precision(config.precision, self.device), self.device)

    def _resume(self) -> None:
        """Takes over the newest checkpoint that verifies, if there is one."""
        began = time.perf_counter()
        path, warnings = self.saver.find_latest()
        for warning in warnings:
            self.report({"kind": "warning", "text": warning})
        if path is None and warnings:
            raise UserError(
                f"no checkpoint in {self.folder.checkpoints} can be read: {warnings[0]}. Mend the disk, begin a new "
                "run with --run, or remove them to train this one from the start."
            )
        self._introduce()
        if path is None:
            return
        meta = self.saver.load(path).meta
        cursor = self.resumption.check(path, meta)
        self.guard.restore(meta["guard"])
        set_rng_state(meta["rng"])
        self.last_step = self.schedule.step(meta["step"])
        self.last_checkpoint = path.name
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
                mine = [next(batches) for _ in step.micro_batches(self.replica, self.dims.data)]
                sums = self._step(step, mine)
                self._record(step, sums)
                ending = sums.stop or step.number == stop_at
                self._validate(step, ending)
                self._save(step, ending)
                if ending:
                    return "finished" if step.number == self.schedule.total_steps else "stopped"
        raise AssertionError("the last step ends the run")

    def _step(self, step: Step, batches: list[Batch]) -> Sums:
        """One update of the weights from one step's rows."""
        tokens, text_bytes, stop = self.engine.sum(
            sum(batch.valid_tokens for batch in batches),
            sum(batch.text_bytes for batch in batches),
            float(self.stop_requested.is_set()),
        )
        (loss_sum,) = self.engine.sum(self.engine.forward_backward(batches, int(tokens)))
        loss = loss_sum / tokens
        rows = self._plan_rows(step)
        self.guard.check(step, rows, loss, None, self.last_checkpoint)
        norm = self.engine.update(step.lr)
        self.guard.check(step, rows, loss, norm, self.last_checkpoint)
        self.guard.accept(loss)
        self.last_step = step
        return Sums(loss, int(tokens), text_bytes, norm, stop > 0)

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
            "bits_per_byte": bits_per_byte(sums.loss * sums.tokens, sums.text_bytes),
            "grad_norm": sums.grad_norm,
            "lr": step.lr,
            **pace,
            "incarnation": self.place.incarnation,
        }
        self.writer.write(metrics)
        self.report({"kind": "step", "total_steps": self.schedule.total_steps, **metrics})

    def _validate(self, step: Step, ending: bool) -> None:
        every = self.config.validation.every
        finished = ending and step.number == self.schedule.total_steps
        if not every or not self.validation.possible or not (step.number % every == 0 or finished):
            return
        loss, nats = self.validation.score(self.engine, step.seq_len, self.replica, self.dims.data)
        bits = nats / math.log(2) if nats else None
        if self.writer:
            self.writer.validation(step.number, loss, bits, self.place.incarnation)
        shown = f"{bits:.4f} bits/byte" if bits else f"loss {loss:.4f}"
        self.report({"kind": "note", "text": f"step {step.number}: held-out {shown}"})
        self.meter.restart()

    def _save(self, step: Step, ending: bool) -> None:
        """Begins a checkpoint when one is due; the last one is waited for."""
        if not ending and step.number % self.config.checkpoint.every:
            return
        live = {"guard": self.guard.state(), "rng": rng_state(), "incarnation": self.place.incarnation}
        self.saver.save(step.number, {**self.resumption.describe(step), **live})
        self.last_checkpoint = f"step-{step.number}"
        if ending:
            self.saver.wait()
            self.report({"kind": "note", "text": f"saved {self.last_checkpoint}"})
        self.meter.restart()
