import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from tiny_model import STAGES, TinyModel, deal, make_batch, step_batches, train, train_plainly

from longscan.errors import ConfigError
from longscan.models import LanguageModel
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, load_weights

OPTIONS = OptimizerOptions(clip=0.4, weight_decay=0.3)
STEPS = range(4)
CASES = [(1, "0"), (1, "1"), (1, "3"), *((2, stage) for stage in STAGES), *((3, stage) for stage in "0123")]


def state(engine):
    return {(f.name, f.start): f.data.clone() for f in engine.fragments()}


def weights_of(engine):
    """The parameters, which stage 3 must gather."""
    parameters = dict(engine.model.named_parameters())
    with gathered(parameters) if engine.dims.zero == 3 else nullcontext():
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def gathered(parameters):
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters(list(parameters.values()))


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def train_in_every_layout(folder):
    """One process's part of training at dp 1, 2 and 3; groups and engines are made anew in the same processes."""
    rank, found = int(os.environ["RANK"]), {}
    for data, stage in CASES:
        if rank >= data:
            continue
        with process_group(rank=rank, world_size=data, store=f"{folder}/store-{data}-{stage}"):
            engine = Engine(TinyModel(), ParallelDims(data=data, **STAGES[stage]), OPTIONS)
            seen = train(engine, STEPS, rank, data)
            found[f"{data}-{stage}"] = {
                "seen": seen,
                "weights": {name: weight.tolist() for name, weight in weights_of(engine).items()},
                "poisoned": take_a_poisoned_step(engine, rank, data),
                "owned": sum(f.data.numel() for f in engine.fragments()),
                "built": os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]),
            }
            engine.close()
    return found


def take_a_poisoned_step(engine, rank, data):
    """One rank's loss is infinite: what every rank sees of it, and whether anything of it stays."""
    before, steps = state(engine), engine.steps
    weights = weights_of(engine)
    batches = step_batches(11)
    if rank == data - 1:
        hidden = engine.model.hidden
        engine.model.hidden = lambda *inputs: hidden(*inputs) * float("inf")
    engine.forward_backward(deal(batches, rank, data), 50)
    engine.model.__dict__.pop("hidden", None)
    norm = engine.update(0.1)
    kept = same(before, state(engine)) and engine.steps == steps
    kept = kept and same(weights, weights_of(engine))
    (healthy,) = [norm for _, norm in train(engine, [12], rank, data)]
    return {"finite": norm < float("inf"), "kept": kept, "skipped": engine.skipped, "healthy": healthy}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "extensions").mkdir()
    env = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "DS_ACCELERATOR": "cpu"}
    return run_distributed(train_in_every_layout, 3, folder, join=False, env=env, preload=["deepspeed"])


@pytest.fixture(scope="module")
def plain():
    model = TinyModel()
    return train_plainly(model, OPTIONS, STEPS), dict(model.named_parameters())


@pytest.mark.parametrize(("data", "stage"), CASES)
def test_every_layout_trains_like_plain_adamw(layouts, plain, data, stage):
    seen, weights = plain
    norms = [norm for _, norm in seen]
    assert min(norms) < OPTIONS.clip < max(norms), "the test must see steps with and without clipping"
    for rank in range(data):
        found = layouts[rank][f"{data}-{stage}"]
        torch.testing.assert_close(torch.tensor(found["seen"]), torch.tensor(seen), rtol=0, atol=2e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(torch.tensor(found["weights"][name]), weight.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("data", "stage"), CASES)
def test_ranks_agree_bit_for_bit(layouts, data, stage):
    first = layouts[0][f"{data}-{stage}"]
    for rank in range(1, data):
        other = layouts[rank][f"{data}-{stage}"]
        assert (other["seen"], other["weights"]) == (first["seen"], first["weights"])


@pytest.mark.parametrize(("data", "stage"), CASES)
def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(layouts, data, stage):
    for rank in range(data):
        poisoned = layouts[rank][f"{data}-{stage}"]["poisoned"]
        assert not poisoned["finite"]
        assert poisoned["kept"]
        assert poisoned["skipped"] == 1
        assert 0 < poisoned["healthy"] < float("inf")


@pytest.mark.parametrize(("data", "stage"), CASES)
def test_zero_owns_each_element_once_and_zero_0_everywhere(layouts, data, stage):
    elements = 3 * sum(p.numel() for p in TinyModel().parameters())
    owned = sum(layouts[rank][f"{data}-{stage}"]["owned"] for rank in range(data))
    assert owned == elements * (1 if STAGES[stage]["zero"] else data)


def test_nothing_is_compiled(layouts):
    assert all(case["built"] == [] for rank in layouts for case in rank.values())


@pytest.fixture(params=STAGES)
def dims(request):
    with process_group():
        yield ParallelDims(**STAGES[request.param])


def test_a_dummy_changes_not_one_bit(dims):
    states = []
    for dummies in (0, 2):
        engine = Engine(TinyModel(), dims, OPTIONS)
        batches = step_batches(0) + [make_batch(3, dummy=True)] * dummies
        loss_sum = engine.forward_backward(batches, 60)
        states.append((float(loss_sum), engine.update(0.01), state(engine)))
        engine.close()
    (loss_a, norm_a, state_a), (loss_b, norm_b, state_b) = states
    assert (loss_a, norm_a) == (loss_b, norm_b)
    assert same(state_a, state_b)


def test_norms_and_biases_do_not_decay(dims):
    model = TinyModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, dims, OPTIONS)
    engine.forward_backward([make_batch(0, dummy=True)], 1)
    assert engine.update(0.5) == 0
    engine.close()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name in model.no_weight_decay() else 1 - 0.5 * OPTIONS.weight_decay
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_bf16_keeps_the_exact_weights_it_was_given_as_masters(dims):
    exact = {f"weight/{name}": p.detach().clone() for name, p in TinyModel().named_parameters()}
    model = TinyModel()
    engine = Engine(model, dims, OPTIONS, precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for fragment in engine.fragments():
        if fragment.name in exact:
            assert torch.equal(fragment.data, exact[fragment.name].flatten())
    reference = train_plainly(TinyModel(), OPTIONS, STEPS)
    torch.testing.assert_close(torch.tensor(train(engine, STEPS, 0, 1)), torch.tensor(reference), rtol=5e-3, atol=5e-3)
    masters = {f.name: f.data for f in engine.fragments()}
    engine.close()
    for name, parameter in model.named_parameters():
        rounded = masters[f"weight/{name}"].to(torch.bfloat16)
        assert torch.equal(parameter.flatten(), rounded)
        assert not torch.equal(rounded.float(), masters[f"weight/{name}"]), "masters must hold more than bf16 does"


def test_bf16_adds_gradients_up_in_fp32(dims):
    engine, batch = Engine(TinyModel(), dims, OptimizerOptions(clip=0), precision="bf16"), make_batch(1)
    norms = []
    for small in (0, 8):
        engine.forward_backward([batch], 10)
        # In bf16 a six hundredth of a number changes nothing when it is added.
        engine.forward_backward([batch] * small, 10 * 600)
        norms.append(engine.update(0.0))
    assert norms[1] / norms[0] == pytest.approx(1 + 8 / 600, abs=1e-3)
    engine.close()


def test_bf16_refuses_a_gradient_that_is_not_finite(dims):
    engine = Engine(TinyModel(), dims, OPTIONS, precision="bf16")
    train(engine, STEPS, 0, 1)
    found = take_a_poisoned_step(engine, 0, 1)
    assert (found["finite"], found["kept"], found["skipped"]) == (False, True, 1)
    assert 0 < found["healthy"] < float("inf")
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_discarded_step_leaves_nothing(dims, precision):
    states = []
    for discard in (False, True):
        engine = Engine(TinyModel(), dims, OPTIONS, precision)
        if discard:
            engine.forward_backward(step_batches(5), 60)
            engine.discard()
        train(engine, STEPS, 0, 1)
        states.append(state(engine))
        engine.close()
    assert same(*states)


def test_evaluation_gives_the_training_loss_and_changes_nothing(dims):
    engine = Engine(TinyModel(), dims, OPTIONS)
    before = state(engine)
    evaluated = engine.evaluate(step_batches(0))
    assert same(before, state(engine))
    assert evaluated == engine.forward_backward(step_batches(0), 1)
    assert evaluated.dtype == torch.float64
    engine.close()


def test_a_griffin_trains_alike_in_all_stages_and_its_weights_load(tmp_path):
    mapping = load_preset("griffin-tiny") | {"vocab_size": 64}
    seen, path = [], None
    with process_group():
        for stage in range(4):
            model = LanguageModel(config_from_mapping(mapping))
            model.init_weights(3)
            engine = Engine(model, ParallelDims(zero=stage), OPTIONS)
            seen.append(torch.tensor(train(engine, range(3), 0, 1)))
            checkpointer = Checkpointer(tmp_path, engine)
            checkpointer.save(stage, {})
            path = checkpointer.wait()
            checkpointer.close()
            engine.close()
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=2e-5)
    fresh = LanguageModel(config_from_mapping(mapping))
    load_weights(path, fresh)
    for (name, loaded), trained in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, trained), name


def test_an_update_needs_a_micro_batch(dims):
    engine = Engine(TinyModel(), dims, OPTIONS)
    with pytest.raises(AssertionError, match="without a micro-batch"):
        engine.update(0.1)
    engine.close()


def test_a_bad_precision_or_world_is_refused():
    with pytest.raises(ConfigError, match="'fp8'; choose one of fp32, bf16"):
        Engine(TinyModel(), ParallelDims(zero=0), OPTIONS, precision="fp8")
    with pytest.raises(ConfigError, match="= 2 ranks, but 1 are to be started"):
        Engine(TinyModel(), ParallelDims(data=2, zero=0), OPTIONS)


def test_deepspeed_is_imported_only_when_a_stage_needs_it():
    code = (
        "import sys, longscan.parallel, longscan.parallel.checkpoint;"
        "heavy = {'deepspeed', 'megatron', 'ray', 'omegaconf'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.home())


@pytest.mark.parametrize("zero", [1, 3])
def test_deepspeeds_groups_wait_as_long_as_the_others(zero):
    with process_group(timeout_seconds=7):
        engine = Engine(TinyModel(), ParallelDims(zero=zero), OPTIONS)
        backends = [
            group._get_backend(torch.device("cpu")) for group in torch.distributed.distributed_c10d._world.pg_map
        ]
        assert {backend.options._timeout.total_seconds() for backend in backends} == {7.0}
        engine.close()
