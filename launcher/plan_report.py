"""What `longscan plan` prints: a layout, the bytes of its ranks, whether a GPU has them, and what would help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..models import config as models
from ..models.block import ACTIVATION_CHECKPOINTS
from ..parallel.plan import GIB, Cluster, Load, Plan, Remedy, Step, as_mapping, find_gpu, simulate
from .config import Config, resolve
from .schema import problems_of
from .validate import open_corpora, parallel_dims, replica_size, stage_micro_rows

# The vocabulary where neither the configuration nor a corpus tells it.
USUAL_VOCABULARY = 32000
# Ranks that are listed one by one.
LISTED = 16


@dataclass(frozen=True)
class PlanReport:
    """A plan, the step it is simulated to take (None where precision has no rates), and what had to be assumed."""

    plan: Plan
    step: Step | None
    notes: tuple[str, ...]

    @staticmethod
    def of(source: str, overrides: Sequence[str], gpus: int | None, gpu: str) -> PlanReport:
        """The plan of the stage of `source` whose micro-batch takes most memory."""
        config, notes = resolved(source, overrides)
        cluster = Cluster(find_gpu(gpu))
        loads = [load_of(config, index, gpus) for index in range(len(config.stages))]
        plan = max((Plan(load, cluster) for load in loads), key=lambda plan: plan.largest)
        step = simulate(plan.load, cluster) if plan.load.precision == "bf16" else None
        return PlanReport(plan, step, tuple(notes))

    def to_json(self) -> dict[str, Any]:
        """Layout, ranks, bytes by pipeline rank, activations and exchanges by mixer, remedies, the simulated step."""
        plan, load = self.plan, self.plan.load
        return {
            "gpu": plan.cluster.gpu.name,
            "usable_bytes": plan.cluster.gpu.usable,
            "fits": plan.fits,
            **shape_of(load),
            "parameters": models.num_params(load.model),
            "ranks": [dataclasses.asdict(place) for place in plan.places()],
            "stages": [
                {"layers": [layer for run in plan.layers(stage) for layer in run], **as_mapping(held)}
                for stage, held in enumerate(plan.stages)
            ],
            "block_bytes_per_token": plan.block_bytes_per_token(),
            "exchanged_bytes": plan.exchanged(),
            "remedies": [_remedy_json(remedy) for remedy in plan.remedies()],
            "step": self.step and step_json(self.step),
            "notes": list(self.notes),
        }

    def show(self, console: Console) -> None:
        """Prints the layout, the bytes of a rank of each pipeline stage, and whether they are there."""
        plan, load = self.plan, self.plan.load
        console.print(f"{models.num_params(load.model):,} parameters, {_title(load)}", soft_wrap=True)
        for note in self.notes:
            console.print(note, style="yellow", soft_wrap=True, markup=False)
        console.print(_places_table(plan))
        console.print(_bytes_table(plan))
        console.print(_blocks_table(plan))
        if self.step:
            parts = sorted(self.step.terms.items(), key=lambda term: -term[1])[:3]
            most = ", ".join(f"{name} {seconds / self.step.seconds:.0%}" for name, seconds in parts)
            speed = f"{self.step.seconds:.3g} s a step, {self.step.rate:,.0f} tokens/s, MFU {self.step.mfu:.2f}"
            console.print(f"simulated: {speed}; {most}", soft_wrap=True)
        _show_verdict(console, plan)


def resolved(source: str, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration with a vocabulary, and what was assumed; corpora need not be named to plan."""
    config = resolve(source, overrides)
    problems = list(problems_of(config))
    if problems:
        raise ConfigError("; ".join(problems))
    if not config.stages:
        raise ConfigError("stages is empty; give at least one, say stages=[{seq_len: 512, tokens: 10M}]")
    models.validate(config.model)
    if config.model.vocab_size:
        return config, []
    notes = []
    size = USUAL_VOCABULARY
    if config.data.corpora and all(entry.path for entry in config.data.corpora):
        size = math.ceil(open_corpora(config)[0].tokenizer.vocab_size / 64) * 64
    else:
        notes.append(f"no corpus is named: a vocabulary of {size:,} is assumed; model.vocab_size=N sets it")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size)), notes


def load_of(config: Config, index: int, gpus: int | None) -> Load:
    """What a stage of the configuration trains on `gpus` GPUs, by default as many as it asks for."""
    size = replica_size(config)
    gpus = gpus or config.run.workers or max(1, config.parallel.data) * size
    data = config.parallel.data or max(1, gpus // size)
    dims = dataclasses.replace(parallel_dims(config, gpus), data=data)
    stage = config.stages[index]
    dims.validate(gpus, config.model, [each.seq_len for each in config.stages])
    micro_rows = stage_micro_rows(config, stage)
    rows = max(1, config.batch.tokens // stage.seq_len)
    batches = math.ceil(rows / micro_rows / data)
    precision = "bf16" if config.precision == "auto" else config.precision
    run = config.run
    return Load(
        config.model,
        dims,
        stage.seq_len,
        micro_rows,
        batches,
        precision,
        run.activation_checkpoint,
        cuda_graphs=run.cuda_graphs,
    )


def _title(load: Load) -> str:
    dims = load.dims
    axes = " x ".join(f"{axis} {getattr(dims, axis)}" for axis in ("data", "context", "tensor", "pipeline"))
    rows = f"{load.micro_rows} row{'s' * (load.micro_rows > 1)} of {load.seq_len:,} tokens"
    batches = f"{load.micro_batches} micro-batch{'es' * (load.micro_batches > 1)} a step"
    return f"{dims.world_size} GPUs: {axes}, ZeRO-{dims.zero}, {load.precision}; {batches} of {rows}"


def shape_of(load: Load) -> dict[str, Any]:
    """The layout and what it trains, for JSON."""
    return {
        "layout": dataclasses.asdict(load.dims),
        "gpus": load.dims.world_size,
        "seq_len": load.seq_len,
        "micro_rows": load.micro_rows,
        "micro_batches": load.micro_batches,
        "precision": load.precision,
        "activation_checkpoint": load.checkpointing,
    }


def step_json(step: Step) -> dict[str, Any]:
    """The simulated step, for JSON."""
    rounded = {name: float(f"{seconds:.4g}") for name, seconds in step.terms.items()}
    return {"seconds": step.seconds, "tokens_per_second": step.rate, "mfu": step.mfu, "terms": rounded}


def _remedy_json(remedy: Remedy) -> dict[str, Any]:
    return {"changes": list(remedy.changes), "bytes": remedy.total, "tokens_per_second": remedy.rate}


def make_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _places_table(plan: Plan) -> Table:
    """Each rank's coordinates and layers; of many ranks the first replica's first."""
    table = make_table("rank", "data", "pipeline", "context", "tensor", "layers")
    places = plan.places()
    for place in places[:LISTED]:
        layers = ", ".join(f"{run[0]}-{run[-1]}" for run in plan.layers(place.pipeline))
        table.add_row(*map(str, (place.rank, place.data, place.pipeline, place.context, place.tensor)), layers)
    if len(places) > LISTED:
        table.add_row(f"... {len(places) - LISTED} more")
    return table


def _bytes_table(plan: Plan) -> Table:
    """GiB of a rank, a column for each pipeline stage."""
    stages = plan.stages
    names = ["GiB a GPU"] if len(stages) == 1 else [f"stage {index}" for index in range(len(stages))]
    table = make_table("", *names)
    for key in ("parameters", "gradients", "optimizer", "activations"):
        table.add_row(key, *(_gib(getattr(held, key)) for held in stages))
    largest = " / ".join(dict.fromkeys(held.temporary_name for held in stages))
    table.add_row(f"largest temporary ({largest})", *(_gib(held.temporary) for held in stages))
    table.add_row("total", *(_gib(held.total) for held in stages), style="bold")
    if any(held.host for held in stages):
        table.add_row("in host memory", *(_gib(held.host) for held in stages))
    return table


def _blocks_table(plan: Plan) -> Table:
    """Bytes a block keeps of each token by checkpointing, and those it gives to other ranks a micro-batch."""
    exchanged = plan.exchanged()
    table = make_table(
        "bytes a token kept by a block", *ACTIVATION_CHECKPOINTS, *(("carry", "halo") if exchanged else ())
    )
    for name, kept in plan.block_bytes_per_token().items():
        table.add_row(
            name,
            *(f"{kept[mode]:,.0f}" for mode in ACTIVATION_CHECKPOINTS),
            *(f"{amount:,}" for amount in exchanged.get(name, {}).values()),
        )
    return table


def _show_verdict(console: Console, plan: Plan) -> None:
    gpu = plan.cluster.gpu
    room = f"{_gib(plan.largest)} of {_gib(gpu.usable)} GiB, what a {gpu.name} leaves of {_gib(gpu.memory)}"
    console.print(f"{'fits' if plan.fits else 'does not fit'}: {room}", style="green" if plan.fits else "red")
    remedies = plan.remedies()
    if not plan.fits and not remedies:
        console.print("nothing near makes it fit; take shorter rows or a smaller model")
    for remedy in remedies:
        speed = f", {remedy.rate:,.0f} tokens/s simulated" if remedy.rate else ""
        changes = " and ".join(remedy.changes)
        console.print(f"  with {changes}: {_gib(remedy.total)} GiB{speed}", markup=False, soft_wrap=True)


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.2f}"
