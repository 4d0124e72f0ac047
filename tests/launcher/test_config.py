"""The configuration: what is accepted, what is refused and in which words, and that its surface stays as it is."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longscan.errors import ConfigError
from longscan.launcher.config import (
    Config,
    config_keys,
    differences,
    flatten,
    from_mapping,
    load,
    preset_names,
    resolve,
    to_yaml,
    with_vocabulary,
)
from longscan.launcher.schema import FACTORS, count_of
from longscan.launcher.validate import check_run, replica_size, stage_micro_rows, validate, worker_count

FROZEN_KEYS = """
model.preset model.vocab_size model.width model.layers model.pattern
model.mlp.hidden model.mlp.gated model.mlp.activation model.mlp.bias
model.rg_lru.width model.rg_lru.gate_blocks model.rg_lru.conv_taps model.rg_lru.decay_init model.rg_lru.decay_range
model.rg_lru.bias
model.local_attention.heads model.local_attention.head_dim model.local_attention.kv_heads model.local_attention.position
model.local_attention.rope_fraction model.local_attention.rope_base model.local_attention.alibi_scale
model.local_attention.qkv_bias
model.local_attention.output_bias model.local_attention.window
model.attention.heads model.attention.head_dim model.attention.kv_heads model.attention.position
model.attention.rope_fraction model.attention.rope_base model.attention.alibi_scale
model.attention.qkv_bias model.attention.output_bias
model.taylor_attention.heads model.taylor_attention.head_dim model.taylor_attention.feature_dim
model.taylor_attention.scale model.taylor_attention.normalize
model.short_conv.width model.short_conv.taps model.short_conv.bias
model.linearized_attention.heads model.linearized_attention.head_dim model.linearized_attention.kv_heads
model.linearized_attention.position model.linearized_attention.rope_fraction model.linearized_attention.rope_base
model.linearized_attention.alibi_scale
model.linearized_attention.qkv_bias model.linearized_attention.output_bias model.linearized_attention.group
model.linearized_attention.local model.linearized_attention.feature_map model.linearized_attention.feature_dim
model.linearized_attention.normalize model.linearized_attention.conv_taps
model.lora.rank model.lora.alpha model.lora.linears
model.norm model.norm_eps model.embedding_norm model.tie_embeddings model.embedding_scale model.position_embedding
model.logit_soft_cap
data.corpora data.corpora[].path data.corpora[].weight data.packing data.shuffle_window data.seed data.skipped_rows
data.cache data.cache_gib data.verify
stages stages[].seq_len stages[].tokens stages[].lr_scale stages[].micro_rows stages[].packing stages[].weights
stages[].rope_base stages[].alibi_scale stages[].objective stages[].trains
batch.tokens batch.micro_rows batch.ramp_from batch.ramp_steps
optimizer.lr optimizer.betas optimizer.eps optimizer.weight_decay optimizer.clip
schedule.warmup_steps schedule.kind schedule.final_ratio schedule.decay_share
parallel.data parallel.context parallel.tensor parallel.pipeline parallel.zero parallel.sequence_parallel
parallel.copy_engines parallel.offload_optimizer
parallel.interleave parallel.stage_layers
precision
checkpoint.every checkpoint.keep_last checkpoint.keep_every
validation.every validation.rows
logging.every logging.tensorboard logging.wandb
run.folder run.seed run.launcher run.workers run.device run.threads run.deterministic run.implementation
run.activation_checkpoint run.compile run.cuda_graphs run.timeout_seconds run.max_loss_ratio
"""


FIXED = [
    "data.corpora=[a]",
    "stages=[{seq_len: 512, tokens: 4M}]",
    "batch={tokens: 8192, micro_rows: 8}",
    "optimizer.lr=4e-3",
    "schedule.warmup_steps=40",
    "checkpoint={every: 100, keep_every: 0}",
]


def demo(*overrides: str) -> Config:
    """The demo's model over values that the tests below know, whatever the preset becomes."""
    return resolve("griffin-demo", [*FIXED, *overrides])


def refused(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_keys_are_these_and_each_has_a_meaning():
    assert [key.name for key in config_keys()] == FROZEN_KEYS.split()
    assert [key.name for key in config_keys() if not key.meaning] == []


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_comes_back_from_its_yaml(name, tmp_path):
    config = resolve(name, ["data.corpora=[a]"])
    validate(config, workers=1)
    assert config.run.folder == f"runs/{name}"
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load(file) == config
    assert resolve(str(file)) == config
    assert resolve(str(tmp_path)) == config
    assert from_mapping(dataclasses.asdict(config)) == config


def test_no_omegaconf_type_is_left():
    def types(value):
        yield type(value)
        if dataclasses.is_dataclass(value):
            value = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
        for item in value if isinstance(value, list) else []:
            yield from types(item)

    assert {kind.__module__.split(".")[0] for kind in types(demo())} == {"builtins", "longscan"}


def test_layers_go_defaults_then_file_then_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {lr: 2e-3, eps: 1e-6}\nstages: [{seq_len: 512, tokens: 1.5B}]\n")
    config = resolve(str(file), ["optimizer.lr=5e-4", "stages.0.lr_scale=0.5"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip) == (5e-4, 1e-6, 1.0)
    assert (config.stages[0].tokens, config.stages[0].lr_scale) == (1_500_000_000, 0.5)
    assert config.run.folder == "runs/mine"


def test_a_model_preset_lies_under_the_keys_beside_it():
    config = demo("model.preset=griffin-tiny", "model.rg_lru.gate_blocks=2")
    assert (config.model.width, config.model.rg_lru.width, config.model.rg_lru.gate_blocks) == (32, 48, 2)
    assert demo("model.width=256").model.layers == demo().model.layers


def test_corpora_may_be_paths_alone():
    for text in ("[a, b]", "[{path: a}, {path: b}]"):
        assert [c.path for c in resolve("griffin-demo", [f"data.corpora={text}"]).data.corpora] == ["a", "b"]
    assert resolve("griffin-demo", ["data.corpora=a"]).data.corpora[0].weight == 1.0


def test_interpolation_is_resolved():
    assert demo("run.seed=7", "data.seed=${run.seed}").data.seed == 7
    assert demo("data.seed=${run.seed}").data.seed == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
        ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer"),
        ("stages.0.seqlen=3", "did you mean stages.0.seq_len?"),
        ("data.corpora=[{pth: x}]", "unknown key data.corpora.0.pth; did you mean data.corpora.0.path?"),
        ("model.rg_lru.widht=3", "did you mean model.rg_lru.width?"),
        ("qqqqq=1", "longscan config --keys"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; it must be a number"),
        ("optimizer.lr=true", "optimizer.lr is True; it must be a number"),
        ("optimizer.lr=null", "optimizer.lr is None"),
        ("batch.tokens=1.5", "batch.tokens is 1.5; it must be a whole number"),
        ("batch.tokens=1.0001K", "batch.tokens is '1.0001K'"),
        ("batch.tokens=-.inf", "batch.tokens is -inf"),
        ("run.deterministic=1", "run.deterministic is 1; it must be true or false"),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9; it must be a list"),
        ("optimizer.betas=[a, b]", "optimizer.betas.0 is 'a'; it must be a number"),
        ("batch=3", "batch is 3; it must hold keys and values"),
        ("stages.7.tokens=1", "cannot set stages.7.tokens to '1'"),
        ("optimizer.lr=[1", "cannot set optimizer.lr"),
        ("optimizer.lr=${run.sed}", "run.sed"),
        ("model.preset=griffin-tinny", "griffin-tinny"),
        ("nonsense", "'nonsense' is not an override"),
        ("a b=3", "is not an override"),
    ],
)
def test_a_bad_override_is_refused_with_key_value_and_remedy(override, message):
    assert message in refused(resolve, "griffin-demo", [override])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("griffin-dem", "did you mean griffin-demo?"),
        ("nowhere.yaml", "there is no configuration file nowhere.yaml"),
        ("LIST", "holds a list"),
        ("BROKEN", "is not valid YAML"),
        ("BINARY", "is not valid YAML"),
        ("FOLDER", "holds no run"),
    ],
)
def test_a_bad_source_is_refused(source, message, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: {")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    known = {name.upper(): str(tmp_path / f"{name}.yaml") for name in ("list", "broken", "binary")}
    assert message in refused(resolve, {**known, "FOLDER": str(tmp_path)}.get(source, source))


@given(st.integers(0, 10**6), st.sampled_from(sorted(FACTORS)))
def test_suffixed_counts_are_exact(number, suffix):
    assert count_of(f"{number}{suffix}", "n") == number * FACTORS[suffix]


@pytest.mark.parametrize(("text", "count"), [("1.5B", 1_500_000_000), ("1_000", 1000), ("32Ki", 32768), (1e9, 10**9)])
def test_counts_as_people_write_them(text, count):
    assert count_of(text, "n") == count


@pytest.mark.parametrize("text", ["", "K", "1.5", "1k", "0x10", "1 2", "inf", "nan", "1e400"])
def test_what_is_no_count_is_refused(text):
    refused(count_of, text, "n")


RULES = [
    ("batch.tokens=1000", "batch.tokens is 1000, not a multiple of stages.0.seq_len 512; take 512 or 1024"),
    ("batch.tokens=100", "take 512"),
    ("batch.micro_rows=5", "has 16 rows (batch.tokens 8192 / seq_len 512), not a multiple of batch.micro_rows 5"),
    ("stages.0.micro_rows=3", "not a multiple of stages.0.micro_rows 3"),
    ("stages.0.tokens=1K", "stages.0.tokens is 1000, less than one step"),
    ("stages.0.weights=[1, 2]", "stages.0.weights holds 2 numbers for 1 corpora"),
    ("stages.0.weights=[0]", "stages.0.weights is [0.0]"),
    ("stages.0.rope_base=1", "stages.0.rope_base is 1; it must be above 1, or 0 for the model's"),
    ("stages.0.rope_base=-1", "stages.0.rope_base is -1.0; it must be at least 0"),
    ("stages.0.alibi_scale=0.5", "model.pattern (rg_lru, rg_lru, local_attention) has no ALiBi; leave it out"),
    ("stages=[]", "stages is empty"),
    ("data.corpora=[]", "data.corpora is empty; run `longscan prepare`"),
    ("data.corpora=[{weight: 1}]", "data.corpora.0.path is empty"),
    ("data.packing=best", "data.packing is 'best'; it must be one of concat, best_fit"),
    ("data.skipped_rows=['5']", "write stage:first-last"),
    ("data.skipped_rows=['1:3-4']", "there are 1 stages"),
    ("data.skipped_rows=['0:4-3']", "first <= last"),
    ("optimizer.lr=0", "optimizer.lr is 0.0; it must be above 0"),
    ("optimizer.lr=.nan", "optimizer.lr is nan; it must be a finite number"),
    ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas is [0.9, 1.0]"),
    ("schedule.warmup_steps=4000", "schedule.warmup_steps is 4000, but the run has about"),
    ("schedule.final_ratio=2", "schedule.final_ratio is 2.0; it must be at most 1"),
    ("batch.ramp_from=4096", "set both or neither"),
    ("batch.ramp_steps=3", "set both or neither"),
    ("parallel={pipeline: 2, zero: 2}", "parallel.zero is 2 with parallel.pipeline 2"),
    ("parallel={pipeline: 2, stage_layers: [1]}", "parallel.stage_layers is [1]"),
    ("parallel.zero=4", "parallel.zero is 4"),
    ("run.max_loss_ratio=0.5", "run.max_loss_ratio is 0.5; it must be above 1"),
    ("checkpoint.keep_every=150", "checkpoint.keep_every is 150, not a multiple of checkpoint.every 100"),
    ("model.layers=0", "model.layers=0"),
]


@pytest.mark.parametrize(("override", "message"), RULES)
def test_what_makes_no_sense_together_is_refused_with_the_values(override, message):
    assert message in refused(validate, demo(override), 2)


@pytest.mark.parametrize("preset", ["alibi-tiny", "hawk-tiny", "sinusoidal-tiny"])
def test_a_rope_base_without_rope_is_refused(preset):
    config = resolve("griffin-tiny", ["data.corpora=[a]", f"model={{preset: {preset}}}", "stages.0.rope_base=5e5"])
    assert "stages.0.rope_base is 500000, but nothing in model.pattern (" in refused(validate, config, 1)


def test_every_problem_is_told_at_once():
    text = refused(validate, demo("batch.tokens=1000", "stages.0.weights=[1, 2]", "model.layers=0"), 1)
    assert text.startswith("3 problems in the configuration:")
    assert [line for line in text.splitlines() if line.startswith("  - ")].__len__() == 3


@pytest.mark.parametrize(
    ("overrides", "workers", "message"),
    [
        (["parallel.data=3"], 2, "takes 3 workers, not 2; set parallel.data to 2 or 0"),
        (["parallel.tensor=2"], 3, "3 workers cannot be split into replicas of 2"),
        (["run.launcher=inline", "run.workers=2"], None, "use run.launcher=ray"),
    ],
)
def test_a_world_that_does_not_divide_is_refused(overrides, workers, message):
    assert message in refused(validate, demo(*overrides), workers)


def test_how_many_workers():
    assert worker_count(demo("run.workers=3")) == 3
    assert worker_count(demo("run.workers=0", "parallel.data=4")) == 4
    assert worker_count(demo("run.workers=0", "run.launcher=inline")) == 1
    assert worker_count(demo("run.workers=0", "run.device=cpu")) == 1
    assert replica_size(demo("parallel.tensor=2", "parallel.context=3")) == 6


def test_micro_rows_of_a_stage():
    config = demo(
        "batch.micro_rows=8", "stages=[{seq_len: 512, tokens: 1M}, {seq_len: 4096, tokens: 1M, micro_rows: 1}]"
    )
    assert [stage_micro_rows(config, stage) for stage in config.stages] == [8, 1]


def test_the_vocabulary_is_the_tokenizers_rounded_up():
    assert with_vocabulary(demo(), 257).model.vocab_size == 320
    assert with_vocabulary(demo(), 320).model.vocab_size == 320
    assert with_vocabulary(demo("model.vocab_size=300"), 257).model.vocab_size == 300
    assert "model.vocab_size is 100" in refused(with_vocabulary, demo("model.vocab_size=100"), 257)
    assert demo().model.vocab_size == 0


def test_check_run_opens_the_corpora_and_fills_in_what_they_say(corpus):
    config, corpora = check_run(resolve("griffin-tiny", [f"data.corpora=[{corpus}]"]))
    assert (config.model.vocab_size, config.run.workers, len(corpora)) == (320, 1, 1)


def test_corpora_are_named_from_the_root_whatever_folder_workers_start_in(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    config, _ = check_run(resolve("griffin-tiny", [f"data.corpora={corpus.name}", "run.device=cpu"]))
    assert [entry.path for entry in config.data.corpora] == [str(corpus)]


def test_corpora_of_other_tokenizers_missing_or_too_short_are_refused(corpus, tmp_path):
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"].update(fingerprint="else")
    (other / "manifest.json").write_text(json.dumps(manifest))
    two = resolve("griffin-tiny", [f"data.corpora=[{corpus}, {other}]"])
    assert "different tokenizers" in refused(check_run, two)
    long = ["stages=[{seq_len: 1Mi, tokens: 4Mi}]", "batch.tokens=1Mi", "batch.micro_rows=1", "schedule.warmup_steps=1"]
    assert "less than one row of 1048576" in refused(
        check_run, resolve("griffin-tiny", [f"data.corpora={corpus}", *long])
    )
    assert "nowhere" in refused(check_run, resolve("griffin-tiny", ["data.corpora=nowhere"]))


def test_differences_name_key_old_and_new():
    assert differences(demo(), demo()) == []
    changes = differences(demo(), demo("optimizer.lr=1e-5", "data.corpora=[a, b]"))
    assert "optimizer.lr: 0.004 -> 1e-05" in changes
    assert "data.corpora.1.path: absent -> b" in changes


def test_yaml_spells_out_every_key():
    spelt = set(flatten(yaml.safe_load(to_yaml(demo()))))
    named = {key.replace("[]", ".0") for key in FROZEN_KEYS.split()} - {"model.preset", "data.corpora", "stages"}
    assert named == spelt
    assert math.isclose(yaml.safe_load(to_yaml(demo()))["optimizer"]["eps"], 1e-8)
