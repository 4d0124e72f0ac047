"""A checkpoint of any layout loads into any other: each element bit for bit, and the next step is the same."""

import itertools
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from distributed import run_distributed
from matrix import OPTIONS, RATE, batch_of, model_of
from stored import stored

from longscan.data.batch import IGNORED_LABEL
from longscan.parallel import Engine, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, read_manifest

LAYOUTS = {
    "one": ParallelDims(zero=0),
    "pp2-dp2-zero1": ParallelDims(data=2, pipeline=2, zero=1),
    "pp2-tp2": ParallelDims(tensor=2, pipeline=2, zero=0),
    "cp3-zero3": ParallelDims(context=3, zero=3),
    "tp2-sp-cp2-zero1": ParallelDims(context=2, tensor=2, zero=1, sequence_parallel=True),
    "dp2-cp2-zero3-offloaded": ParallelDims(data=2, context=2, zero=3, offload_optimizer=True),
    "dp2-tp2-zero3": ParallelDims(data=2, tensor=2, zero=3),
    "dp3-zero2": ParallelDims(data=3, zero=2),
}
ALL = list(itertools.product(LAYOUTS, LAYOUTS))
CHAIN = [*itertools.pairwise(LAYOUTS), *((name, name) for name in LAYOUTS)]
# fp32 sums of another order: of the tensor's norm.
TOLERANCE = 2e-5


def chain(folder):
    """Each layout loads what the one before it saved, saves that, takes a step, and loads what it saved."""
    found, before = {}, None
    for name in LAYOUTS:
        with inside(folder, name, "chain") as engine:
            if engine:
                found |= pass_on(engine, folder, before, name)
        before = name
    return found


def matrix(folder):
    """After the chain each layout loads what each saved."""
    found = chain(folder)
    for name in LAYOUTS:
        with inside(folder, name, "matrix") as engine:
            if engine:
                found |= {f"{source} > {name}": load_and_step(engine, f"{folder}/{source}") for source in LAYOUTS}
    return found


@contextmanager
def inside(folder, name, act):
    """An engine of the layout, None where this rank has no part in it."""
    dims, rank = LAYOUTS[name], int(os.environ["RANK"])
    if rank >= dims.world_size:
        yield None
        return
    store = f"{folder}/{act}-{name}"
    with process_group(rank=rank, world_size=dims.world_size, store=store, timeout_seconds=60):
        engine = Engine(model_of("griffin", dims).float(), dims, OPTIONS)
        yield engine
        engine.close()


def pass_on(engine, folder, source, name):
    """What came of loading from `source`, which is None for the first, and of loading what was saved here."""
    saver, found = Checkpointer(f"{folder}/{name}", engine), {}
    if source:
        found[f"{source} > {name}"] = load_and_step(engine, f"{folder}/{source}", saver)
    else:
        take_step(engine, 0)
        take_step(engine, 1)
        saver.save(2, {})
        save_third(saver, take_step(engine, 2))
    saver.close()
    return found | {f"{name} > {name}": load_and_step(engine, f"{folder}/{name}")}


def save_third(saver, numbers):
    saver.save(3, dict(zip(("loss", "norm"), numbers, strict=True)))


def take_step(engine, step):
    """(loss, norm) of three micro-batches, dealt to the replicas with dummies."""
    dims, rank = engine.dims, int(os.environ["RANK"])
    batches = [batch_of([[7, 10, 7], [24]], 10 * step + index) for index in range(3)]
    tokens = sum(batch.valid_tokens for batch in batches)
    dummy = replace(batches[0], labels=torch.full_like(batches[0].labels, IGNORED_LABEL))
    share = [batches[i] if i < 3 else dummy for i in range(rank // dims.replica_size, -(-3 // dims.data) * dims.data)]
    (loss,) = engine.sum(engine.forward_backward(share[:: dims.data], tokens))
    return loss / tokens, engine.update(RATE)


def load_and_step(engine, folder, saver=None):
    """What this rank finds: is all it owns as it was saved, and how far is its third step from the source's."""
    source = Checkpointer(folder, engine)
    path, warnings = source.find_latest()
    third = read_manifest(path).meta
    updates = source.load(path.parent / "step-2").updates
    source.close()
    before = errors(engine, stored(path.parent / "step-2"))
    if saver:
        saver.save(2, {})
    loss, norm = take_step(engine, 2)
    if saver:
        save_third(saver, (loss, norm))
    after = errors(engine, stored(path))
    after |= {"loss": abs(loss - third["loss"]) / third["loss"], "norm": abs(norm - third["norm"]) / third["norm"]}
    return {
        "warnings": warnings,
        "updates": updates,
        "elements": sum(fragment.data.numel() for fragment in engine.fragments()),
        "before": max(before.values()),
        "after": max((error, name) for name, error in after.items()),
    }


def errors(engine, expected):
    """By how much each tensor that this rank has a fragment of differs there, relative to the tensor's norm."""
    found = {}
    for fragment in engine.fragments():
        whole = expected[fragment.name]
        box = whole[tuple(slice(o, o + s) for o, s in zip(fragment.offsets, fragment.sizes, strict=True))]
        difference = box.flatten().narrow(0, fragment.start, fragment.data.numel()) - fragment.data
        size = torch.linalg.vector_norm(whole).item() or 1.0
        found[fragment.name] = max(found.get(fragment.name, 0), torch.linalg.vector_norm(difference).item() / size)
    return found


def run(function, folder, timeout):
    preload, env = ["longscan.parallel.tensor", "deepspeed"], {"DS_ACCELERATOR": "cpu"}
    return run_distributed(function, 4, folder, join=False, timeout=timeout, preload=preload, env=env)


def check(ranks, saved, loaded):
    found = [rank[f"{saved} > {loaded}"] for rank in ranks if f"{saved} > {loaded}" in rank]
    assert len(found) == LAYOUTS[loaded].world_size
    elements = sum(parameter.numel() for parameter in model_of("griffin", LAYOUTS["one"]).parameters())
    assert sum(rank["elements"] for rank in found) >= 3 * elements
    for rank in found:
        assert (rank["warnings"], rank["updates"]) == ([], 2)
        assert rank["before"] == 0
        assert rank["after"][0] <= (0 if saved == loaded else TOLERANCE), rank["after"]


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    return run(chain, tmp_path_factory.mktemp("chain"), 100.0)


@pytest.mark.parametrize(("saved", "loaded"), CHAIN)
def test_what_a_layout_saved_another_loads(chained, saved, loaded):
    check(chained, saved, loaded)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_layout_loads_what_each_saved(tmp_path):
    ranks = run(matrix, tmp_path, 380.0)
    for saved, loaded in ALL:
        check(ranks, saved, loaded)
