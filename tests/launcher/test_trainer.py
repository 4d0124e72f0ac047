"""A run, whole or interrupted, inline: the same rows, losses, weights and lines; and what stops it."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longscan.errors import ConfigError, UserError
from longscan.kernels import precompile
from longscan.launcher.elastic.supervisor import train
from longscan.launcher.run_folder import RunFolder
from longscan.launcher.training import trainer as trainer_module
from longscan.parallel import checkpoint

# What differs between two runs that did the same.
PACE = {"tokens_per_second", "step_seconds", "model_flops_per_second", "memory_bytes", "incarnation"}


def lines(folder, name: str) -> list[dict]:
    records = getattr(RunFolder.open(folder), name).standing()
    return [{key: value for key, value in record.items() if key not in PACE} for record in records]


def weights(folder, step: int) -> dict[str, bytes]:
    path = Path(folder) / "checkpoints" / f"step-{step}"
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run, with its folder."""
    from longscan.launcher.config import resolve
    from longscan.launcher.validate import check_run

    folder = tmp_path_factory.mktemp("whole") / "run"
    overrides = [f"data.corpora=[{corpus}]", f"run.folder={folder}", "run.threads=1", "run.device=cpu"]
    outcome = train(check_run(resolve("griffin-tiny", overrides))[0])
    assert outcome.status == "finished"
    return folder


@pytest.mark.parametrize("stops", [[7], [10], [3, 4, 13]], ids=str)
def test_an_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(whole, tiny, stops):
    config = tiny()
    for stop in stops:
        assert train(config, stop_at=stop).status == "stopped"
    assert train(config).status == "finished"
    folder = config.run.folder
    assert lines(folder, "metrics") == lines(whole, "metrics")
    assert lines(folder, "ledger") == lines(whole, "ledger")
    assert weights(folder, 20) == weights(whole, 20)
    assert {record["incarnation"] for record in RunFolder.open(folder).ledger.read()} == set(range(1, len(stops) + 2))


def test_a_run_killed_between_checkpoints_repeats_its_steps_with_the_same_rows(whole, tiny, monkeypatch):
    config = tiny()
    original = trainer_module.Trainer._step

    def die(self, step, batches):
        if step.number == 16:
            raise KeyboardInterrupt
        return original(self, step, batches)

    monkeypatch.setattr(trainer_module.Trainer, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    ledger = RunFolder.open(config.run.folder).ledger.read()
    again = [record for record in ledger if 11 <= record["step"] <= 15]
    assert len(again) == 10, "steps 11 to 15 were trained twice, from the checkpoint of step 10"
    assert lines(config.run.folder, "ledger") == lines(whole, "ledger")
    assert lines(config.run.folder, "metrics") == lines(whole, "metrics")


def test_rows_follow_each_other_without_gap_or_repeat(whole):
    ledger = lines(whole, "ledger")
    assert [record["rows"][0] for record in ledger] == [0] + [record["rows"][1] for record in ledger[:-1]]


def test_metrics_hold_what_the_run_folder_promises(whole):
    first = RunFolder.open(whole).metrics.read()[0]
    promised = "step rows tokens loss bits_per_byte tokens_per_second mfu memory_bytes grad_norm lr incarnation"
    assert set(promised.split()) <= set(first)
    assert first["tokens"] == 1024 and first["rows"] == 16


def test_the_loss_falls(whole):
    losses = [record["loss"] for record in lines(whole, "metrics")]
    assert losses[-1] < 0.7 * losses[0]


def test_a_damaged_newest_checkpoint_is_passed_over(whole, tiny, capsys):
    config = tiny()
    train(config, stop_at=15)
    file = next((Path(config.run.folder) / "checkpoints" / "step-15").glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    train(config)
    shown = capsys.readouterr().err
    assert "step-15 is passed over" in shown and "resumed from step-10" in shown
    assert lines(config.run.folder, "metrics") == lines(whole, "metrics")


def test_a_finished_run_says_so(whole, corpus, capsys):
    from longscan.launcher.config import load

    config = load(RunFolder.open(whole).config_file)
    assert train(config).status == "finished"
    assert "trained already" in capsys.readouterr().err


def test_stopping_at_a_step_that_is_past_trains_nothing(tiny, capsys):
    train(tiny(), stop_at=4)
    assert train(tiny(), stop_at=2).status == "stopped"
    assert "step 2 is trained already; this run stands at 4" in capsys.readouterr().err
    assert len(lines(tiny().run.folder, "ledger")) == 4


def test_a_run_none_of_whose_checkpoints_is_whole_is_not_begun_again(tiny):
    train(tiny(), stop_at=2)
    damaged = Path(tiny().run.folder) / "checkpoints" / "step-2" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match="no checkpoint in .* can be read: .*remove them to train this one"):
        train(tiny())
    assert len(lines(tiny().run.folder, "ledger")) == 2 and damaged.exists()


def test_fresh_refuses_an_existing_run(whole):
    from longscan.launcher.config import load

    with pytest.raises(ConfigError, match="already holds a run"):
        train(load(RunFolder.open(whole).config_file), fresh=True)


def test_training_longer_resumes_and_other_rows_are_refused(tiny):
    train(tiny(), stop_at=10)
    with pytest.raises(ConfigError, match="seed"):
        train(tiny("data.seed=1"))
    with pytest.raises(ConfigError, match="row 160 of stage 0 after step 10; with this batch size it would be row 320"):
        train(tiny("batch.tokens=2048"))
    with pytest.raises(ConfigError, match="of another model: model.layers: 3 -> 6"):
        train(tiny("model.layers=6"))
    assert [file.name for file in Path(tiny().run.folder).glob("config*.yaml")] == ["config.yaml"]
    assert train(tiny("stages.0.tokens=24576")).status == "finished"
    assert len(lines(tiny().run.folder, "ledger")) == 24


def test_init_from_takes_the_weights_and_nothing_else(whole, tiny):
    config = tiny("optimizer.lr=1e-12", "schedule.warmup_steps=0", run="new")
    train(config, init_from=str(whole), stop_at=1)
    first = lines(config.run.folder, "metrics")[0]
    assert first["loss"] < lines(whole, "metrics")[10]["loss"]
    assert first["step"] == 1 and lines(config.run.folder, "ledger")[0]["rows"] == [0, 16]
    assert train(config, init_from=str(whole), stop_at=2).status == "stopped"
    assert [record["rows"] for record in lines(config.run.folder, "ledger")] == [[0, 16], [16, 32]]
    with pytest.raises(ConfigError, match="would be ignored"):
        train(config, init_from=str(whole / "checkpoints" / "step-20"))


def test_two_stages_continue_one_stream(tiny):
    config = tiny("stages=[{seq_len: 64, tokens: 4096}, {seq_len: 128, tokens: 4096, micro_rows: 2}]")
    train(config, stop_at=5)
    train(config)
    ledger = lines(config.run.folder, "ledger")
    assert [record["stage"] for record in ledger] == [0] * 4 + [1] * 4
    assert ledger[4]["rows"] == [0, 8]


def test_a_rehearsed_run_is_the_run_without(whole, tiny, monkeypatch):
    losses = []

    def rehearse(self, batches):
        original = self.engine.model.hidden
        with monkeypatch.context() as patch:
            patch.setattr(self.engine.model, "hidden", lambda *inputs: original(*inputs) * torch.nan)
            losses.append(self.engine.evaluate(batches[:1]).item())
            self._rehearse(batches[:1])

    monkeypatch.setattr(trainer_module.Trainer, "_compile", rehearse)
    config = tiny()
    assert train(config, stop_at=4).status == "stopped"
    assert train(config).status == "finished"
    assert len(losses) == 2 and all(map(math.isnan, losses)), "at the start and where it goes on"
    for name in ("metrics", "ledger"):
        assert lines(config.run.folder, name) == lines(whole, name)
    assert weights(config.run.folder, 20) == weights(whole, 20)


def test_kernels_are_compiled_before_a_stage_on_a_gpu_and_said_so(monkeypatch):
    told, work, compiled = [], [], []
    monkeypatch.setattr(precompile, "rehearse", lambda rehearsal: work.append(rehearsal) or ["one", "two"])
    monkeypatch.setattr(precompile, "prepare", compiled.append)
    trainer = object.__new__(trainer_module.Trainer)
    trainer.report, trainer.meter = told.append, SimpleNamespace(restart=lambda: None)
    trainer._rehearse = lambda batches: batches
    for device, implementation in (("cpu", "auto"), ("cuda", "reference"), ("cuda", "auto")):
        trainer.device = torch.device(device)
        trainer.config = SimpleNamespace(run=SimpleNamespace(implementation=implementation))
        assert compiled == []
        trainer._compile(["first", "second"])
    assert [rehearsal() for rehearsal in work] == [["first"]]
    assert compiled == [["one", "two"]]
    assert [note["text"].split(" 0.")[0] for note in told] == ["compiling 2 kernels", "compiled in"]


@pytest.mark.parametrize("what", ["nan", "explode"])
def test_a_bad_loss_stops_before_the_weights_change(tiny, monkeypatch, what):
    config = tiny("stages.0.tokens=40960", "data.skipped_rows=['0:3-4']")
    original = trainer_module.Engine.forward_backward

    def spoil(self, batches, global_tokens):
        loss = original(self, batches, global_tokens)
        if self.steps == 25:
            return loss * (torch.nan if what == "nan" else 10)
        return loss

    monkeypatch.setattr(trainer_module.Engine, "forward_backward", spoil)
    with pytest.raises(UserError) as raised:
        train(config)
    for part in ("step 26", "Rows 402 to 417 of stage 0", "step-20", "data.skipped_rows=[0:402-417]"):
        assert part in str(raised.value)
    monkeypatch.undo()
    assert [record["step"] for record in lines(config.run.folder, "ledger")] == list(range(1, 26))
    assert train(config).status == "finished"


def test_a_full_disk_ends_clearly_and_keeps_the_older_checkpoint(tiny, monkeypatch):
    config = tiny()
    train(config, stop_at=10)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longscan.parallel.checkpoint.storage._write_file", full)
    with pytest.raises(UserError, match="No space left on device.*older checkpoints are intact"):
        train(config)
    monkeypatch.undo()
    path, warnings = checkpoint.find_latest(Path(config.run.folder) / "checkpoints")
    assert path is not None and path.name == "step-10" and not warnings
    assert not list((Path(config.run.folder) / "checkpoints").glob("*.tmp*"))


def test_deterministic_mode_refuses_what_it_cannot_honour(tiny):
    with pytest.raises(ConfigError, match=r"run\.threads"):
        train(tiny("run.deterministic=true", "run.threads=0"))


def test_a_run_says_what_it_trains_and_what_packing_does(tiny, capsys):
    train(tiny("data.packing=best_fit"), stop_at=1)
    shown = capsys.readouterr().err
    assert "53,920 parameters, 20 steps" in shown
    assert "rows of 64, best_fit: 100.0% of positions are useful" in shown


def test_an_implementation_that_cannot_run_is_refused(tiny):
    with pytest.raises(ConfigError, match="Triton needs a GPU"):
        tiny("run.implementation=triton")


def test_deterministic_mode_runs(tiny, whole):
    try:
        config = tiny("run.deterministic=true")
        assert train(config, stop_at=3).status == "stopped"
    finally:
        torch.use_deterministic_algorithms(False)
    assert lines(config.run.folder, "metrics") == lines(whole, "metrics")[:3]


def test_checkpoints_are_pruned(tiny):
    config = tiny("checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=8")
    train(config)
    assert checkpoint.list_steps(Path(config.run.folder) / "checkpoints") == [8, 16, 18, 20]


def test_another_tokenizers_checkpoint_is_refused(tiny, whole):
    config = tiny()
    copy = Path(config.run.folder)
    shutil.copytree(whole, copy)
    manifest = copy / "checkpoints" / "step-20" / "manifest.json"
    text = manifest.read_text()
    assert json.loads(text)
    for older in checkpoint.list_steps(copy / "checkpoints")[:-1]:
        shutil.rmtree(copy / "checkpoints" / f"step-{older}")
    from longscan.launcher.training.resumption import Resumption

    meta = checkpoint.read_manifest(manifest.parent).meta
    resumption = object.__new__(Resumption)
    from longscan.data import open_corpus

    resumption.corpus = open_corpus(config.data.corpora[0].path)
    resumption.check_tokenizer("here", meta)
    with pytest.raises(ConfigError, match="was trained with tokenizer other"):
        resumption.check_tokenizer("here", {**meta, "tokenizer": "other"})
