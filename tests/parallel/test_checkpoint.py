import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from stored import stored
from tiny_model import TinyModel, train

from longscan.errors import UserError
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.checkpoint import (
    Checkpointer,
    find_latest,
    list_steps,
    load_weights,
    prune,
    read_manifest,
    rng_state,
    set_rng_state,
    step_folder,
    verify,
)
from longscan.parallel.checkpoint import manifest as manifest_module
from longscan.parallel.checkpoint import storage as storage_module

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
OPTIONS = OptimizerOptions(clip=0.4, weight_decay=0.3)
META = {"config": {"lr": 0.1}, "cursor": [0, 12], "nothing": None}
SAVED = {"zero-1": (2, 1), "zero-0": (3, 0)}
LOADED = [("zero-1", 1, 0), ("zero-1", 1, 1), ("zero-1", 2, 1), ("zero-1", 3, 1), ("zero-1", 4, 1), ("zero-0", 2, 1)]


def fragments(engine):
    """This rank's state as JSON, which keeps fp32 exactly."""
    return [[f.name, f.start, f.data.tolist()] for f in engine.fragments()]


def whole(shapes, ranks):
    """The logical tensors put together from every rank's fragments."""
    tensors = {name: torch.full(shape, float("nan")).flatten() for name, shape in shapes.items()}
    for name, start, values in (fragment for rank in ranks for fragment in rank):
        tensors[name][start : start + len(values)] = torch.tensor(values, dtype=torch.float32)
    return {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}


def in_layout(folder, name, data, zero, act):
    """`act(engine, checkpointer, rank)` in a group of `data` of the processes; None in the others."""
    rank = int(os.environ["RANK"])
    if rank >= data:
        return None
    with process_group(rank=rank, world_size=data, store=f"{folder}/store-{name}"):
        engine = Engine(TinyModel(seed=len(name)), ParallelDims(data=data, zero=zero), OPTIONS)
        checkpointer = Checkpointer(f"{folder}/{name.split('.')[0]}", engine)
        try:
            return act(engine, checkpointer, rank, data)
        finally:
            checkpointer.close()
            engine.close()


def save_and_load_in_every_layout(folder):
    """Trains, saves while training goes on, and loads what was saved into every other layout."""
    found = {}
    for name, (data, zero) in SAVED.items():
        found[name] = in_layout(folder, name, data, zero, train_and_save)
        found[f"{name} unsaved"] = in_layout(folder, f"{name}.unsaved", data, zero, train_only)
    for name, data, zero in LOADED:
        case = f"{name}.{data}-{zero}"
        found[case] = in_layout(folder, case, data, zero, load_and_train)
    found["full disk"] = in_layout(folder, "full", 2, 1, save_onto_a_full_disk)
    found["damaged"] = in_layout(folder, "damaged", 3, 1, look_for_the_latest)
    return found


def train_and_save(engine, checkpointer, rank, data):
    set_seed(engine)
    train(engine, range(3), rank, data)
    checkpointer.save(3, META)
    at_save = fragments(engine)
    after = train(engine, range(3, 6), rank, data)
    assert checkpointer.wait() == checkpointer.folder / "step-3"
    return {"at save": at_save, "after": after, "end": fragments(engine)}


def train_only(engine, checkpointer, rank, data):
    set_seed(engine)
    train(engine, range(3), rank, data)
    return {"after": train(engine, range(3, 6), rank, data), "end": fragments(engine)}


def set_seed(engine):
    """Makes the weights those of seed 0 whatever model the engine was given."""
    weights = dict(TinyModel(seed=0).named_parameters())
    for fragment in engine.fragments():
        kind, _, name = fragment.name.partition("/")
        if kind == "weight":
            flat = weights[name].detach().flatten()
            fragment.data.copy_(flat[fragment.start : fragment.start + fragment.data.numel()])
    engine.publish()


def load_and_train(engine, checkpointer, rank, data):
    path, warnings = checkpointer.find_latest()
    assert not warnings
    manifest = checkpointer.load(path)
    loaded = fragments(engine)
    live = {name: p.tolist() for name, p in engine.model.named_parameters()}
    seen = {"meta": manifest.meta, "updates": engine.steps, "loaded": loaded, "live": live}
    return seen | {"after": train(engine, range(3, 6), rank, data), "end": fragments(engine)}


def look_for_the_latest(engine, checkpointer, rank, data):
    """Each rank reads a file of its own; where one is damaged all ranks turn to the step before."""
    for step in (1, 2):
        checkpointer.save(step, META)
    path = checkpointer.wait()
    read, checksum_of = [], manifest_module.checksum_of
    manifest_module.checksum_of = lambda file: read.append(file.name) or checksum_of(file)
    whole = str(checkpointer.find_latest()[0].name)
    dist.barrier()
    if rank == 0:
        flip(path / "rank-00002.safetensors", 3000)
    dist.barrier()
    found, warnings = checkpointer.find_latest()
    manifest_module.checksum_of = checksum_of
    return {"whole": whole, "found": found.name, "warnings": warnings, "read": read}


def save_onto_a_full_disk(engine, checkpointer, rank, data):
    """The second save fails on rank 1 alone, with an error of the operating system."""
    checkpointer.save(1, META)
    checkpointer.wait()
    train(engine, range(1), rank, data)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    checkpointer.save(2, META)
    try:
        message = checkpointer.wait()
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    left = sorted(os.listdir(checkpointer.folder))
    checkpointer.save(3, META)
    return {"message": str(message), "left": left, "then": str(checkpointer.wait())}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    preload, env = ["deepspeed"], {"DS_ACCELERATOR": "cpu"}
    return folder, run_distributed(save_and_load_in_every_layout, 4, folder, join=False, preload=preload, env=env)


@pytest.fixture(scope="module")
def shapes():
    named = TinyModel().named_parameters()
    return {f"{kind}/{n}": tuple(p.shape) for n, p in named for kind in ("weight", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("name", SAVED)
def test_files_hold_the_state_of_the_moment_of_the_save(layouts, shapes, name):
    folder, ranks = layouts
    expected = whole(shapes, [ranks[r][name]["at save"] for r in range(SAVED[name][0])])
    found = stored(folder / name / "step-3")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", SAVED)
def test_a_save_in_the_background_does_not_disturb_training(layouts, name):
    _, ranks = layouts
    for rank in range(SAVED[name][0]):
        undisturbed = ranks[rank][f"{name} unsaved"]
        assert ranks[rank][name]["after"] == undisturbed["after"]
        assert ranks[rank][name]["end"] == undisturbed["end"]


@pytest.mark.parametrize("name", SAVED)
def test_ranks_share_the_writing_and_no_element_is_written_twice(layouts, name):
    folder, _ = layouts
    manifest = read_manifest(folder / name / "step-3")
    assert len(manifest.files) == SAVED[name][0]
    elements = sum(chunk.box.volume for file in manifest.files for chunk in file.chunks)
    assert elements == 3 * sum(p.numel() for p in TinyModel().parameters())


@pytest.mark.parametrize(("name", "data", "zero"), LOADED)
def test_every_layout_loads_it_bit_for_bit_and_goes_on(layouts, shapes, name, data, zero):
    folder, ranks = layouts
    loaded = [ranks[rank][f"{name}.{data}-{zero}"] for rank in range(data)]
    expected, found = stored(folder / name / "step-3"), whole(shapes, [rank["loaded"] for rank in loaded])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for rank in loaded:
        assert (rank["meta"], rank["updates"]) == (META, 3)
        for parameter, values in rank["live"].items():
            assert torch.equal(torch.tensor(values), expected[f"weight/{parameter}"])
        uninterrupted = ranks[0][name]["after"]
        torch.testing.assert_close(torch.tensor(rank["after"]), torch.tensor(uninterrupted), rtol=0, atol=2e-5)
    if (data, zero) == SAVED[name]:
        assert [rank["after"] for rank in loaded] == [ranks[r][name]["after"] for r in range(data)]
        assert [rank["end"] for rank in loaded] == [ranks[r][name]["end"] for r in range(data)]


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_leaves_the_older(layouts):
    _, ranks = layouts
    for rank in range(2):
        found = ranks[rank]["full disk"]
        assert "step 2 was not saved" in found["message"]
        assert "rank 1 failed with 'File too large'" in found["message"]
        assert "older checkpoints are intact" in found["message"]
        assert found["left"] == ["step-1"]
        assert found["then"].endswith("step-3")


def test_ranks_share_the_reading_and_agree_on_what_is_damaged(layouts):
    _, ranks = layouts
    for rank in range(3):
        found = ranks[rank]["damaged"]
        assert (found["whole"], found["found"]) == ("step-2", "step-1")
        assert found["read"] == [f"rank-{rank:05d}.safetensors"] * 3
        (warning,) = found["warnings"]
        assert "step-2 is passed over" in warning and "rank-00002.safetensors is damaged" in warning


@pytest.fixture
def saved(tmp_path):
    """Steps 1 to 3 of a run in one process, without a process group."""
    engine = Engine(TinyModel(), ParallelDims(zero=0), OPTIONS)
    checkpointer = Checkpointer(tmp_path, engine)
    for step in (1, 2, 3):
        train(engine, [step], 0, 1)
        checkpointer.save(step, {"step": step})
    checkpointer.close()
    return tmp_path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def data_file(folder, step):
    return folder / f"step-{step}" / "rank-00000.safetensors"


def damage(kind, folder):
    if kind == "flipped bit":
        flip(data_file(folder, 3), 5000)
    elif kind == "truncated":
        os.truncate(data_file(folder, 3), 5000)
    elif kind == "missing file":
        data_file(folder, 3).unlink()
    elif kind == "flipped manifest":
        text = (folder / "step-3" / "manifest.json").read_text()
        (folder / "step-3" / "manifest.json").write_text(text.replace('"updates":3', '"updates":4'))
    elif kind == "torn manifest":
        os.truncate(folder / "step-3" / "manifest.json", 100)
    elif kind == "no manifest":
        (folder / "step-3" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("flipped bit", "rank-00000.safetensors is damaged: its checksum"),
        ("truncated", "rank-00000.safetensors is damaged: it has 5000 bytes"),
        ("missing file", "cannot read .*rank-00000.safetensors"),
        ("flipped manifest", "manifest.json is damaged"),
        ("torn manifest", "manifest.json is damaged"),
        ("no manifest", "it has no manifest.json"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(saved, kind, named):
    assert find_latest(saved) == (saved / "step-3", [])
    damage(kind, saved)
    with pytest.raises(UserError, match=named):
        verify(saved / "step-3")
    path, warnings = find_latest(saved)
    assert path == saved / "step-2"
    assert len(warnings) == 1 and "step-3 is passed over" in warnings[0]


def test_no_checkpoint_is_no_error(tmp_path):
    assert find_latest(tmp_path) == (None, [])
    assert find_latest(tmp_path / "missing") == (None, [])


def test_a_step_saved_again_replaces_the_damaged_one(saved):
    damage("flipped bit", saved)
    engine = Engine(TinyModel(seed=4), ParallelDims(zero=0), OPTIONS)
    checkpointer = Checkpointer(saved, engine)
    checkpointer.load(saved / "step-2")
    train(engine, [3], 0, 1)
    checkpointer.save(3, {"again": True})
    checkpointer.close()
    assert verify(saved / "step-3").meta == {"again": True}
    assert sorted(os.listdir(saved)) == ["step-1", "step-2", "step-3"]


def test_weights_alone_load_without_a_process_group(saved):
    for dtype in (torch.float32, torch.bfloat16):
        model = TinyModel(seed=9).to(dtype)
        assert load_weights(saved / "step-3", model).step == 3
        expected = stored(saved / "step-3")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.detach(), expected[f"weight/{name}"].to(dtype))


class Wider(TinyModel):
    def __init__(self):
        super().__init__(width=8)


class Longer(TinyModel):
    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Parameter(torch.zeros(2))


class Shorter(TinyModel):
    def __init__(self):
        super().__init__()
        del self.cube


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Wider, r"scale is \[7\] there and \[8\] here"),
        (Longer, r"it has no extra \[2\]"),
        (Shorter, "its cube is not in this one"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, other, message):
    with pytest.raises(UserError, match=f"of another model: {message}.*configuration it was saved with"):
        load_weights(saved / "step-3", other())
    engine = Engine(other(), ParallelDims(zero=0), OPTIONS)
    with pytest.raises(UserError, match=message):
        Checkpointer(saved, engine).load(saved / "step-3")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint: it has no manifest.json"):
        load_weights(tmp_path, TinyModel())


@pytest.mark.parametrize("stage", ["open", "finish", "fsync"])
def test_no_space_left_is_told_in_one_sentence(saved, monkeypatch, stage):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = {
        "open": (storage_module, "_blocks"),
        "finish": (storage_module, "write_manifest"),
        "fsync": (storage_module.os, "fsync"),
    }
    monkeypatch.setattr(*target[stage], full)
    engine = Engine(TinyModel(), ParallelDims(zero=0), OPTIONS)
    checkpointer = Checkpointer(saved, engine)
    checkpointer.save(4, {})
    with pytest.raises(UserError, match="step 4 was not saved .* 'No space left on device'.*make room"):
        checkpointer.wait()
    assert sorted(os.listdir(saved)) == ["step-1", "step-2", "step-3"]
    assert find_latest(saved) == (saved / "step-3", [])


def test_killed_in_the_middle_of_a_save_it_leaves_no_checkpoint(tmp_path):
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from tiny_model import TinyModel
        from longscan.parallel import Engine, OptimizerOptions, ParallelDims
        from longscan.parallel.checkpoint import Checkpointer, storage
        checkpointer = Checkpointer({str(tmp_path)!r}, Engine(TinyModel(), ParallelDims(zero=0), OptimizerOptions()))
        checkpointer.save(1, {{}})
        checkpointer.wait()
        storage.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpointer.save(2, {{}})
        checkpointer.wait()
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the unfinished folder must be there to be ignored"
    assert list_steps(tmp_path) == [1]
    assert find_latest(tmp_path) == (tmp_path / "step-1", [])
    prune(tmp_path, keep_last=0)
    assert os.listdir(tmp_path) == ["step-1"]


def make_steps(folder, source, steps):
    for step in steps:
        shutil.copytree(source / "step-3", step_folder(folder, step))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "damaged", "kept"),
    [
        (2, 0, [], [50, 60]),
        (1, 20, [], [20, 40, 60]),
        (0, 0, [], [10, 20, 30, 40, 50, 60]),
        (2, 0, [50, 60], [40, 50, 60]),
        (9, 0, [], [10, 20, 30, 40, 50, 60]),
    ],
)
def test_prune_keeps_the_last_the_nth_and_the_newest_that_is_whole(
    saved, tmp_path_factory, keep_last, keep_every, damaged, kept
):
    folder = tmp_path_factory.mktemp("prune")
    make_steps(folder, saved, range(10, 61, 10))
    (folder / "step-70.tmp-0123456789ab").mkdir()
    (folder / "notes").mkdir()
    for step in damaged:
        flip(data_file(folder, step), 4000)
    removed = prune(folder, keep_last, keep_every)
    assert list_steps(folder) == kept
    assert removed == [step for step in range(10, 61, 10) if step not in kept]
    assert sorted(p.name for p in folder.iterdir() if not p.name[5:].isdigit()) == ["notes"]


def test_the_checkpointer_prunes_after_each_save(tmp_path):
    engine = Engine(TinyModel(), ParallelDims(zero=0), OPTIONS)
    checkpointer = Checkpointer(tmp_path, engine, keep_last=2, keep_every=3)
    for step in range(1, 8):
        checkpointer.save(step, {})
    checkpointer.close()
    assert list_steps(tmp_path) == [3, 6, 7]


def test_meta_is_strict_json(tmp_path):
    checkpointer = Checkpointer(tmp_path, Engine(TinyModel(), ParallelDims(zero=0), OPTIONS))
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpointer.save(1, {"loss": float("nan")})
    meta = {"floats": [0.1, 1e-300, 1 / 3], 7: "a key that JSON makes a string", 10: "é", "big": 2**70}
    checkpointer.save(1, meta)
    checkpointer.close()
    assert verify(tmp_path / "step-1").meta == json.loads(json.dumps(meta))


def test_nothing_on_disk_is_a_pickle(saved):
    for path in (saved / "step-3").iterdir():
        assert path.name == "manifest.json" or path.suffix == ".safetensors"
    json.loads((saved / "step-3" / "manifest.json").read_text())


def test_random_generators_go_on_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()
    state = json.loads(json.dumps(rng_state(), allow_nan=False))
    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first
