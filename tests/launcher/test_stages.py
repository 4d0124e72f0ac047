"""A length curriculum: one run over rows that grow, one stream of documents, each stage with its own positions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.kernels import Segments
from longscan.launcher.config import load, resolve, stage_model
from longscan.launcher.converting import convert
from longscan.launcher.elastic.supervisor import train
from longscan.launcher.run_folder import RunFolder
from longscan.launcher.trained import open_trained
from longscan.launcher.training.rows import make_plan
from longscan.launcher.training.schedule import TrainingSchedule
from longscan.launcher.validate import open_corpora
from longscan.models import LanguageModel

GROWING = "stages=[{seq_len: 32, tokens: 3072}, {seq_len: 128, tokens: 3072, lr_scale: 0.5, rope_base: 500}, \
{seq_len: 512, tokens: 3072, lr_scale: 0.3, rope_base: 9000, alibi_scale: 0.25, micro_rows: 1}]"


@pytest.fixture(params=["griffin", "alibi"])
def curriculum(tiny, request):
    """Makes the curriculum, 3 steps a stage, over a model with RoPE or with ALiBi."""

    def make(run: str):
        config = tiny(GROWING.replace(", alibi_scale: 0.25", ""), run=run)
        if request.param == "griffin":
            return config
        model = resolve("griffin-tiny", ["model={preset: alibi-tiny}"]).model
        stages = [replace(stage, rope_base=0.0, alibi_scale=n / 4) for n, stage in enumerate(config.stages)]
        return replace(config, model=replace(model, vocab_size=config.model.vocab_size), stages=stages)

    return make


def losses(config) -> list[float]:
    return [record["loss"] for record in RunFolder.open(Path(config.run.folder)).metrics.standing() if "loss" in record]


def state_of(config, step: int) -> bytes:
    files = sorted((Path(config.run.folder) / f"checkpoints/step-{step}").glob("*.safetensors"))
    return b"".join(file.read_bytes() for file in files)


def test_stopped_inside_and_between_stages_it_is_the_same_run(curriculum):
    whole, stopped = curriculum("whole"), curriculum("stopped")
    assert train(whole).status == "finished"
    for step in (2, 6, 8):
        assert train(stopped, stop_at=step).status == "stopped"
    assert train(stopped).status == "finished"
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 9
    assert state_of(stopped, 9) == state_of(whole, 9) != b""


def test_a_checkpoint_is_opened_with_the_positions_of_its_stage(curriculum):
    config = curriculum("run")
    for stage, step in enumerate((2, 6, 9)):
        train(config, stop_at=step)
        trained = open_trained(Path(config.run.folder), "cpu")
        expected = stage_model(config, stage)
        assert trained.model.config == trained.config.model == expected
        assert stage == 0 or expected != config.model
        model = LanguageModel(expected)
        model.load_state_dict(trained.model.state_dict())
        tokens = torch.arange(200).view(1, -1)
        assert torch.equal(trained.model(tokens, Segments.whole(1, 200)), model(tokens, Segments.whole(1, 200)))
    saved = load(RunFolder.open(Path(config.run.folder)).config_file)
    assert (saved.model, saved.stages) == (config.model, config.stages)


def test_a_converted_run_has_the_base_of_its_stage(tiny, tmp_path):
    stages = "stages=[{seq_len: 32, tokens: 2048}, {seq_len: 64, tokens: 2048, rope_base: 700}]"
    base = tiny(stages, "schedule.warmup_steps=0")
    model = resolve("griffin-tiny", ["model={preset: llama-tiny}"]).model
    config = replace(base, model=replace(model, vocab_size=base.model.vocab_size))
    for stop, theta in ((2, 10000.0), (4, 700.0)):
        train(config, stop_at=stop)
        convert(Path(config.run.folder), tmp_path / f"exported-{stop}")
        written = json.loads((tmp_path / f"exported-{stop}/config.json").read_text())
        assert written["rope_parameters"]["rope_theta"] == theta


def test_the_stages_share_one_stream_without_loss_or_repeat(tiny):
    """No position is trained twice, and those that the order of the rows leaves behind come in the last stage."""
    config = tiny(GROWING.replace(", alibi_scale: 0.25", ""))
    schedule = TrainingSchedule(config)
    plan = make_plan(config, open_corpora(config), schedule)
    trained, later = schedule.stage_rows(), 600

    def positions(stage: int, rows: range) -> list[np.ndarray]:
        pieces = [plan.row(stage, row).pieces for row in rows]
        return [np.arange(a, a + n) for each in pieces for a, n in zip(each.position, each.length, strict=True)]

    used = np.concatenate([part for stage, rows in enumerate(trained) for part in positions(stage, range(rows))])
    assert len(used) == len(np.unique(used)) == 9 * config.batch.tokens
    rest = np.concatenate(positions(2, range(trained[2], trained[2] + later)))
    assert not np.intersect1d(used, rest).size
    assert np.array_equal(np.setdiff1d(np.arange(used.max()), used), np.intersect1d(np.arange(used.max()), rest))


@pytest.mark.parametrize("name", ["griffin-1.3b", "based-1.4b"])
def test_shipped_curricula_grow_to_32k_with_a_constant_batch(name):
    config = resolve(name)
    lengths = [stage.seq_len for stage in config.stages]
    assert lengths == sorted(set(lengths)) and lengths[-1] == 32768
    steps = TrainingSchedule(config).steps(after=config.batch.ramp_steps)
    assert {step.tokens for step in steps} == {config.batch.tokens}
