"""Attention transfer and adapters in every kind of layout: losses, trained and frozen weights as in one process."""

import dataclasses
import os

import pytest
import torch
from distributed import run_distributed
from matrix import LAYOUTS, OPTIONS, RATE, TOLERANCES, batches_of, config_of, logical, worst
from safetensors.torch import load_file, save_file

from longscan.models import LanguageModel
from longscan.models.adapter import Adapter, merge_adapters
from longscan.models.config import LoRAConfig
from longscan.models.linearize import AttentionTransfer, frozen_parameters
from longscan.models.parameters import normal
from longscan.parallel import Engine, ParallelDims, make_model, process_group

STEPS = 4
# What is trained, layout by layout, in one process group as by the stages of a run. Key heads are two, so that four
# tensor ranks share them.
LAYOUTS_TRAINED = {
    "tp2": ["mixers"],
    "cp3": ["mixers"],
    "tp4": ["lora"],
    "tp2-sp-cp2": ["mixers", "lora"],
    "tp2-sp-recomputed": ["lora"],
    "pp2-cp2-selective": ["lora"],
    "pp2": ["mixers"],
    "pp2-interleaved": ["mixers"],
    "pp2-tp2-sp": ["mixers"],
    "pp2-cp2": ["mixers"],
    "pp2-zero1": ["mixers"],
    "pp2-interleaved-dp2": ["mixers"],
    "dp2-zero1-offloaded": ["mixers", "lora"],
    "dp2-zero2": ["lora"],
    "dp2-zero3": ["mixers", "lora"],
    "dp2-tp2-sp-zero3": ["lora"],
}
# Trained in bf16 as well, for what it leaves alone.
ROUNDED = {"tp4", "pp2-zero1", "dp2-zero2", "dp2-zero3"}
CASES = [f"{layout} {trains}" for layout, stages in LAYOUTS_TRAINED.items() for trains in stages]


def config():
    found = config_of("linearized")
    mixer = dataclasses.replace(found.linearized_attention, kv_heads=2, feature_map="learned", feature_dim=4)
    linears = ["query", "key", "value", "output", "gate", "up", "down"]
    lora = LoRAConfig(3, 6.0, linears)
    return dataclasses.replace(found, layers=4, tie_embeddings=True, linearized_attention=mixer, lora=lora)


def train(trains, dims, options, precision="fp32"):
    """{name: tensor} of each step's loss and block errors, of the weights at the end, and of them merged.

    fp32 is fp64 without ZeRO. Frozen weights keep their bits, in masters too, and all others change.
    """
    model = make_model(config(), dims, kind=AttentionTransfer if trains == "mixers" else LanguageModel, **options)
    for module in model.modules():
        if isinstance(module, Adapter) and trains == "lora":
            module.specs["up"] = normal(0.1, decay=False)
    model.init_weights(3)
    model = model.float() if dims.zero or precision == "bf16" else model.double()
    model.frozen = frozen_parameters(model, trains)
    engine = Engine(model, dims, OPTIONS, precision)
    model.freeze()
    before = masters(engine)
    replica = torch.distributed.get_rank() // dims.replica_size if torch.distributed.is_initialized() else 0
    found = {}
    for step in range(STEPS):
        batches = batches_of(step, packed=True)
        tokens = sum(batch.valid_tokens for batch in batches)
        (loss,) = engine.sum(engine.forward_backward(batches[replica :: dims.data], tokens))
        found[f"{step}/loss"] = torch.tensor(loss / tokens, dtype=torch.float64)
        if trains == "mixers":
            errors = engine.sum(*(model.reset_errors() * (dims.context * dims.pipeline)).unbind())
            found[f"{step}/errors"] = torch.tensor(errors, dtype=torch.float64) / tokens
        found[f"{step}/norm"] = torch.tensor(engine.update(RATE), dtype=torch.float64)
    kept = {place[0] for place, data in masters(engine).items() if torch.equal(data, before[place])}
    assert kept == model.frozen & {place[0] for place in before}
    engine.close()
    found |= {f"weights/{name}": logical(model, name, p.detach()) for name, p in model.named_parameters()}
    if trains == "lora":
        merge_adapters(model)
        found |= {f"merged/{name}": logical(model, name, p.detach()) for name, p in model.named_parameters()}
    return found


def masters(engine):
    """What this rank holds of the weights, by parameter and place."""
    weights = ((f.name.partition("/"), f) for f in engine.fragments())
    return {(name, f.start): f.data.clone() for (kind, _, name), f in weights if kind == "weight"}


def compare(folder, layouts):
    """This rank's worst error and its tensor in each case it takes part in."""
    rank, found = int(os.environ["RANK"]), {}
    for layout, stages in layouts.items():
        dims, options = LAYOUTS[layout]
        if rank >= dims.world_size:
            continue
        place = {"rank": rank, "world_size": dims.world_size, "store": f"{folder}/store-{layout}"}
        with process_group(**place, timeout_seconds=60):
            for trains in stages:
                trained = train(trains, dims, options)
                found[f"{layout} {trains}"] = worst(trained, load_file(f"{folder}/{trains}.safetensors"))
                if layout in ROUNDED:
                    train(trains, dims, options, "bf16")
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linearize")
    for trains in ("mixers", "lora"):
        save_file(train(trains, ParallelDims(zero=0), {}), folder / f"{trains}.safetensors")
    preload, env = ["longscan.parallel.tensor", "longscan.parallel.pipeline", "deepspeed"], {"DS_ACCELERATOR": "cpu"}
    return run_distributed(compare, 4, folder, LAYOUTS_TRAINED, join=False, timeout=200.0, preload=preload, env=env)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
def test_it_trains_like_one_process(ranks, case):
    errors = [found[case] for found in ranks if case in found]
    dims, _ = LAYOUTS[case.split()[0]]
    assert len(errors) == dims.world_size
    assert max(errors)[0] <= TOLERANCES[dims.zero], errors
