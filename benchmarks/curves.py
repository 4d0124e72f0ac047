"""Loss curves of small models under every axis, against those of one GPU that takes the rows in other orders.

Rounding alone makes curves differ: the band is three times the widest gap between five curves of one GPU, each with
the rows of a step dealt to its micro-batches in another order. A layout's curve lies within it around their mean. An
order of the micro-batches alone may change no bit: in fp32 the sum of four bf16 gradients is nearly always exact.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from longscan.durable import write_durably
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, make_model
from longscan.parallel.plan import Load

from . import record as recording
from .ranks import Place
from .steps import batch_of, compile_step

VOCABULARY, MICRO_BATCHES, RATE = 512, 4, 2e-3
# The widest gap is taken so many times.
BAND = 3


@dataclass(frozen=True)
class Scale:
    """Presets with the blocks that are kept of each, rows, steps, curves of one GPU, and the precision."""

    families: dict[str, int]
    rows: int
    tokens: int
    steps: int
    orders: int
    precision: str


FULL = Scale(
    {"griffin-small": 3, "hawk-small": 2, "based-small": 4, "alibi-small": 2, "linearized-small": 2},
    rows=2,
    tokens=512,
    steps=50,
    orders=5,
    precision="bf16",
)
TINY = Scale({"griffin-tiny": 3}, rows=1, tokens=16, steps=3, orders=2, precision="fp32")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of families."""
    parser.add_argument("--families", nargs="+", default=[], help="curves: presets to train; by default all")


def scale_of(tiny: bool, families: Sequence[str] = ()) -> Scale:
    """The scale, of those families if any are named."""
    scale = TINY if tiny else FULL
    return replace(scale, families={name: scale.families[name] for name in families or scale.families})


def layouts(size: int) -> dict[str, ParallelDims]:
    """Each axis alone over `size` ranks."""
    return {
        f"context={size}": ParallelDims(context=size, zero=0),
        f"tensor={size}": ParallelDims(tensor=size, sequence_parallel=True, zero=0),
        f"pipeline={size}": ParallelDims(pipeline=size, zero=0),
        f"data={size} zero=1": ParallelDims(data=size, zero=1),
    }


def train_all(place: Place, scale: Scale) -> None:
    """Trains every family under every layout, records how far curves lie apart, and saves them."""
    for family in scale.families:
        mine = range(place.rank, scale.orders, place.size)
        with place.alone():
            curves = {order: curve(place, scale, load_of(scale, family, ParallelDims(zero=0)), order) for order in mine}
        (place.folder / f"{family}-{place.rank}.json").write_text(json.dumps(list(curves.values())))
        found: dict[str, list[list[float]]] = {}
        for layout, dims in layouts(place.size).items():
            with place.together(f"{family} {layout}"):
                found[layout] = [curve(place, scale, load_of(scale, family, dims))]
                dist.barrier()
        if place.rank == 0:
            files = sorted(place.folder.glob(f"{family}-*.json"))
            found["one GPU"] = [c for file in files for c in json.loads(file.read_text())]
            note(place, family, found)
            save(place, family, found)


def load_of(scale: Scale, family: str, dims: ParallelDims) -> Load:
    """The first blocks of a family's preset, over a small vocabulary."""
    changes = {"layers": scale.families[family], "vocab_size": VOCABULARY}
    model = config_from_mapping({**load_preset(family), **changes})
    return Load(model, dims, scale.tokens, scale.rows, MICRO_BATCHES, scale.precision)


def curve(place: Place, scale: Scale, load: Load, order: int = 0) -> list[float]:
    """The mean loss of each step, its rows dealt to the micro-batches in an order of their own; as they come for 0."""
    model = make_model(load.model, load.dims)
    model.init_weights(0)
    engine = Engine(model, load.dims, OptimizerOptions(), load.precision, place.device)
    replica = place.rank // load.dims.replica_size if load.dims.data > 1 else 0
    losses, total = [], MICRO_BATCHES * scale.rows * scale.tokens
    for step in range(scale.steps):
        rows = tokens_of(scale.rows * MICRO_BATCHES, scale.tokens + 1, step)
        if order:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(order * scale.steps + step))]
        batches = [batch_of(load, tokens) for tokens in rows.split(scale.rows)][replica :: load.dims.data]
        if step == 0:
            compile_step(engine, batches[0])
        loss = engine.forward_backward(batches, total)
        losses.append(engine.sum(loss)[0] / total)
        engine.update(RATE * min(1.0, (step + 1) / 10))
    engine.close()
    return losses


@functools.cache
def tokens_of(rows: int, length: int, step: int) -> Tensor:
    """The tokens [rows, length] of a step: four of five follow from the one before, by a fixed rule."""
    follower = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    free = torch.rand(rows, length, generator=generator) < 0.2
    for place in range(1, length):
        tokens[:, place] = torch.where(free[:, place], tokens[:, place], follower[tokens[:, place - 1]])
    return tokens


def note(place: Place, family: str, curves: dict[str, list[list[float]]]) -> None:
    """Records the farthest that each layout's curve lies from the mean of one GPU's, and the band."""
    alone = torch.tensor(curves["one GPU"], dtype=torch.float64)
    band = BAND * (alone.amax(0) - alone.amin(0)).max().item()
    work = f"{family}, {alone.shape[1]} steps of {MICRO_BATCHES} micro-batches"
    place.note(work, "last loss, one GPU", alone[:, -1].mean().item(), "nats")
    for layout in layouts(place.size):
        found = torch.tensor(curves[layout], dtype=torch.float64)
        apart = (found - alone.mean(0)).abs().max().item()
        place.note(work, f"farthest from one GPU's losses, {layout}", apart, "nats", band)


def save(place: Place, family: str, found: dict[str, list[list[float]]]) -> None:
    """Writes the family's curves beside the results; those of other families stay."""
    device = (
        torch.cuda.get_device_name().replace("NVIDIA", "").split()[0].lower() if place.device.type == "cuda" else "cpu"
    )
    file = Path(recording.RESULTS, f"curves-{device}.json")
    saved = json.loads(file.read_text()) if file.exists() else {}
    saved[family] = {layout: [[round(loss, 5) for loss in losses] for losses in runs] for layout, runs in found.items()}
    write_durably(file, (json.dumps(saved) + "\n").encode())
