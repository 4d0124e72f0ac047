"""`longscan linearize`: from a small Llama to a merged twin; stopped anywhere it ends with the same bits."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from longscan.data import HeldoutRows, open_corpus
from longscan.data.batch import IGNORED_LABEL
from longscan.errors import ConfigError, UserError
from longscan.kernels import Segments
from longscan.launcher import cli
from longscan.launcher.config import resolve
from longscan.launcher.converting import convert, whole_tensor
from longscan.launcher.elastic.supervisor import train
from longscan.launcher.evals.extrapolate import evaluate
from longscan.launcher.linearizing import Teacher, linearize
from longscan.launcher.run_folder import RunFolder
from longscan.launcher.trained import open_trained
from longscan.launcher.training.mode import Mode
from longscan.launcher.validate import check_run, validate
from longscan.models import LanguageModel
from longscan.models.linearize import frozen_parameters
from longscan.parallel import checkpoint as checkpoints
from longscan.parallel.checkpoint.storage import MappedFiles

WIDTH, LAYERS, VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 2, 264, 48, 4, 2, 8
OPTIONS = [
    "run.threads=1",
    "run.device=cpu",
    "logging.tensorboard=false",
    "model.linearized_attention.group=8",
    "model.linearized_attention.conv_taps=5",
]
# Steps 1-8 transfer attention, 9-12 train adapters, 13-16 everything.
STAGE_ENDS = [8, 12, 16]


def llama(folder: Path, **changes) -> Path:
    """A random Llama as transformers saves one, with a byte for each token and some ids for special ones."""
    said = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": HIDDEN,
        "hidden_act": "silu",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(said | changes))
    generator = torch.Generator().manual_seed(0)
    save_file({name: weight(shape, generator) for name, shape in shapes().items()}, folder / "model.safetensors")
    return folder


def weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[1] ** -0.5


def shapes() -> dict[str, tuple[int, ...]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(LAYERS):
        own = {
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
            "self_attn.q_proj": (queries, WIDTH),
            "self_attn.k_proj": (keys, WIDTH),
            "self_attn.v_proj": (keys, WIDTH),
            "self_attn.o_proj": (WIDTH, queries),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return found


def start(source: Path, run: Path, corpus: Path, *overrides: str, **options):
    given = [f"data.corpora=[{corpus}]", *OPTIONS, *overrides]
    return linearize(source, run, "linearize-tiny", given, tokenizer=options.pop("tokenizer", "bytes"), **options)


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, moments too."""
    folder = run / "checkpoints" / f"step-{step}"
    manifest, files = checkpoints.read_manifest(folder), MappedFiles(folder)
    return {name: whole_tensor(manifest, files, name) for name in manifest.tensors}


def changed(run: Path, before: int, after: int) -> set[str]:
    old, new = checkpoint(run, before), checkpoint(run, after)
    weights = {name.removeprefix("weight/") for name in new if name.startswith("weight/")}
    return {name for name in weights if not torch.equal(old[f"weight/{name}"], new[f"weight/{name}"])}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run that kept each checkpoint, and what it reported."""
    folder = tmp_path_factory.mktemp("linearize")
    found = start(llama(folder / "llama"), folder / "run", corpus, "checkpoint.keep_last=100")
    return folder / "run", found


def test_the_report(whole):
    run, found = whole
    assert found.status == "finished"
    assert [stage.step for stage in found.stages] == [0, *STAGE_ENDS]
    assert [stage.seq_len for stage in found.stages] == [64, 64, 64, 128]
    assert all(stage.teacher and stage.twin for stage in found.stages)
    before, transfer, adapters, everything = found.stages
    first, last = sum(transfer.first_errors), sum(transfer.last_errors)
    assert len(transfer.last_errors) == LAYERS and last < 0.8 * first
    assert not adapters.last_errors and not everything.last_errors
    assert everything.twin < adapters.twin < transfer.twin
    assert json.loads((run / "evals" / "linearized-16.json").read_text()) == found.to_json()
    assert dataclasses.asdict(before)["stage"] == -1


def test_the_teachers_score_is_its_loss_on_held_out_rows(whole, corpus):
    run, found = whole
    model, rows = open_trained(Path(f"{run}-teacher")).model, HeldoutRows(open_corpus(corpus), 64)
    batches = [rows.read([number]) for number in range(4)]
    nats = 0.0
    for batch in batches:
        logits = model(batch.inputs, Segments(batch.cu_seqlens, batch.continues, batch.doc_start)).flatten(0, 1)
        nats += cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum").item()
    bits = nats / math.log(2) / sum(batch.text_bytes for batch in batches)
    assert found.stages[0].teacher == pytest.approx(bits, rel=1e-6)
    assert found.stages[0].teacher != found.stages[0].twin


def test_each_stage_changes_what_it_trains_and_nothing_else(whole):
    run, _ = whole
    model = open_trained(run / "checkpoints" / "step-16").model
    names = {name for name, _ in model.named_parameters()}
    assert changed(run, 3, 8) == names - frozen_parameters(model, "mixers")
    assert changed(run, 9, 12) == names - frozen_parameters(model, "lora")
    assert changed(run, 15, 16) == names - frozen_parameters(model, "all")


def test_adapters_are_merged_when_their_stage_is_over(whole):
    run, _ = whole
    before, after = checkpoint(run, 12), checkpoint(run, 15)
    ups = [name for name in before if name.endswith("adapter.up") and name.startswith("weight/")]
    assert len(ups) == 4 * LAYERS
    assert all(before[name].any() for name in ups) and not any(after[name].any() for name in ups)
    merged, kept = (open_trained(Path(f"{run}{end}")).model for end in ("-merged", ""))
    assert not merged.config.lora.rank
    tokens = torch.arange(48)[None]
    segments = Segments.from_lengths([[48]])
    torch.testing.assert_close(merged(tokens, segments), kept(tokens, segments))


@pytest.mark.parametrize("stops", [[5, 8, 10, 14]], ids=str)
def test_stopped_inside_and_between_stages_it_ends_with_the_same_bits(whole, corpus, tmp_path, stops):
    run, _ = whole
    source = llama(tmp_path / "llama")
    for stop in stops:
        found = start(source, tmp_path / "run", corpus, stop_at=stop)
        assert found.status == "stopped" and found.merged is None
    assert start(source, tmp_path / "run", corpus).status == "finished"
    expected, resumed = checkpoint(run, 16), checkpoint(tmp_path / "run", 16)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.fixture(scope="module")
def converted(whole):
    """What `longscan convert --linearized` makes of the Llama of `whole`."""
    run, _ = whole
    target = run.with_name("converted")
    options = [option for option in OPTIONS if option.startswith("model.")]
    convert(run.with_name("llama"), target, tokenizer="bytes", linearized=True, overrides=options)
    return target


def test_a_converted_twin_is_the_one_that_training_begins_with(whole, converted):
    run, _ = whole
    config = resolve(str(run))
    begun = LanguageModel(config.model)
    Mode.of(config, 0).load_weights(str(Path(f"{run}-teacher") / "checkpoints" / "step-0"), begun, config.run.seed)
    twin = open_trained(converted, "cpu").model
    assert config.model.lora.rank and not twin.config.lora.rank
    tokens, segments = torch.arange(96)[None] % VOCABULARY, Segments.from_lengths([[41, 55]])
    assert torch.equal(twin(tokens, segments), begun(tokens, segments))
    teacher = open_trained(Path(f"{run}-teacher"), "cpu").model
    assert not torch.allclose(twin(tokens, segments), teacher(tokens, segments), atol=1e-3)


def test_a_converted_twin_trains_as_one_that_linearize_made(whole, converted, tmp_path):
    run, _ = whole
    config, _ = check_run(resolve(str(run), [f"run.folder={tmp_path / 'run'}"]))
    assert train(config, init_from=str(converted), stop_at=9).status == "stopped"
    found, expected = checkpoint(tmp_path / "run", 9), checkpoint(run, 9)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_converted_twin_is_evaluated(converted, corpus, tmp_path):
    result, _ = evaluate(converted, "64,128", str(corpus), "512", tmp_path / "evals", "cpu")
    assert all(math.isfinite(row["bits_per_byte"]) for row in result.to_json()["lengths"])


def test_a_merged_twin_is_a_run_folder_like_any_other(whole, tmp_path):
    run, _ = whole
    trained = open_trained(Path(f"{run}-merged"))
    assert "".join(trained.sample("word", 5, temperature=0.0, top_p=1.0, top_k=0, seed=0)) is not None
    with pytest.raises(ConfigError, match="llama: it has no linearized_attention"):
        convert(Path(f"{run}-merged"), tmp_path / "back")


def test_a_transformer_trained_with_adapters_converts_with_them_merged(corpus, tmp_path):
    source = llama(tmp_path / "llama")
    convert(source, tmp_path / "teacher", tokenizer="bytes")
    stages = "stages=[{seq_len: 64, tokens: 2048, trains: lora}]"
    given = [f"data.corpora=[{corpus}]", *OPTIONS[:3], stages, "model.lora.rank=2", f"run.folder={tmp_path / 'run'}"]
    fixed = ["batch.tokens=1024", "schedule.warmup_steps=0", "run.launcher=inline"]
    config, _ = check_run(resolve(str(tmp_path / "teacher"), [*given, *fixed]))
    train(config, init_from=str(tmp_path / "teacher"))
    convert(tmp_path / "run", tmp_path / "back")
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in shapes() if "self_attn" in name}
    convert(tmp_path / "back", tmp_path / "again", tokenizer="bytes")
    tokens, segments = torch.arange(48)[None], Segments.from_lengths([[48]])
    found, expected = (open_trained(tmp_path / name).model(tokens, segments) for name in ("again", "run"))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pipeline_takes_every_stage_as_one_process_does(whole, tmp_path, corpus):
    run, _ = whole
    layout = ["run.launcher=ray", "run.workers=2", "parallel.pipeline=2"]
    source = llama(tmp_path / "llama")
    assert start(source, tmp_path / "run", corpus, *layout, stop_at=5).status == "stopped"
    assert start(source, tmp_path / "run", corpus, *layout).status == "finished"
    expected, found = (RunFolder.open(folder).metrics.standing() for folder in (run, tmp_path / "run"))
    assert len(found) == len(expected) == 16
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one.get("transfer_errors", []) == pytest.approx(other.get("transfer_errors", []), rel=1e-4)


# Bad input


def without(*names: str):
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if name not in names}, folder / "model.safetensors")

    return spoil


def another_family(folder: Path) -> None:
    said = {"model_type": "recurrent_gemma", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}
    said |= {"num_hidden_layers": 1, "intermediate_size": 96, "num_key_value_heads": 1, "attention_window_size": 8}
    (folder / "config.json").write_text(json.dumps(said))


BAD = {
    "missing tensor": (without("lm_head.weight"), {}, UserError, "lm_head.weight .* is missing"),
    "another family": (another_family, {}, UserError, "model.layers|recurrent_gemma"),
    "no tokenizer": (None, {"tokenizer": None}, ConfigError, "has no tokenizer.json"),
    "no folder": (shutil.rmtree, {}, ConfigError, "is no folder"),
    "unknown key": (None, {"more": ["model.linearised=1"]}, ConfigError, "unknown key model.linearised"),
    "wrong value": (None, {"more": ["model.linearized_attention.group=0"]}, ConfigError, "group=0 must be at least 1"),
    "teacher's shape": (None, {"more": ["model.width=64"]}, ConfigError, r"is \[16, 32\] in the model to linearize"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_said_before_anything_is_written(corpus, tmp_path, what):
    spoil, options, error, message = BAD[what]
    source = llama(tmp_path / "llama")
    if spoil:
        spoil(source)
    with pytest.raises(error, match=message):
        start(source, tmp_path / "run", corpus, *options.get("more", []), tokenizer=options.get("tokenizer", "bytes"))
    assert {path.name for path in tmp_path.iterdir()} <= {"llama"}


def test_a_corpus_of_another_tokenizer(corpus, tmp_path):
    from tokenizers import Tokenizer, models

    words = {f"t{number}": number for number in range(260)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(tmp_path / "tokenizer.json"))
    source = llama(tmp_path / "llama", bos_token_id=1, eos_token_id=2)
    with pytest.raises(ConfigError, match="prepared with tokenizer"):
        start(source, tmp_path / "run", corpus, tokenizer=str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "run-teacher").exists()


def test_folders_that_exist(corpus, tmp_path):
    source = llama(tmp_path / "llama")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no run folder"):
        start(source, tmp_path / "run", corpus)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="was not begun from"):
        start(source, tmp_path / "run", corpus)
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "run"}


def test_a_teacher_of_other_weights(corpus, tmp_path):
    source = llama(tmp_path / "llama")
    convert(source, tmp_path / "run-teacher", tokenizer="bytes")
    teacher = Teacher(source, "bytes", tmp_path / "run-teacher")
    teacher.write()
    weights = load_file(source / "model.safetensors")
    weights[f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConfigError, match="is there and is not .* converted"):
        start(source, tmp_path / "run", corpus)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{objective: attention_transfer}]", "needs stages.0.trains=mixers, not all"),
        ("[{trains: all}, {objective: attention_transfer, trains: mixers}]", "attention_transfer after another"),
        ("[{trains: lora}]", "model.lora.rank is 0"),
        ("[{trains: everything}]", "one of all, mixers, lora"),
    ],
)
def test_stages_that_make_no_sense(stages, message):
    sized = stages.replace("{", "{seq_len: 64, tokens: 4096, ")
    config = resolve("griffin-tiny", ["model.preset=linearized-tiny", f"stages={sized}", "data.corpora=[x]"])
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_only_linearized_attention_has_mixers_to_train():
    config = resolve("griffin-tiny", ["data.corpora=[x]", "stages.0.trains=mixers"])
    with pytest.raises(ConfigError, match=r"needs model.pattern=\[linearized_attention\]"):
        validate(config)


def test_the_command(corpus, tmp_path, capsys):
    source = llama(tmp_path / "llama")
    arguments = ["linearize", source, f"data.corpora=[{corpus}]", *OPTIONS, "--config", "linearize-tiny"]
    arguments += ["--tokenizer", "bytes", "--run", tmp_path / "run", "--stop-at", 2, "--json"]
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    said = json.loads(capsys.readouterr().out)
    assert exit.value.code == 0 and said["status"] == "stopped" and said["merged"] is None
    assert RunFolder.open(tmp_path / "run").metrics.standing()[-1]["step"] == 2


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_on_a_gpu(corpus, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = start(llama(tmp_path / "llama"), tmp_path / "run", corpus, "run.device=cuda")
    _, transfer, adapters, everything = found.stages
    assert sum(transfer.last_errors) < 0.8 * sum(transfer.first_errors)
    assert everything.twin < adapters.twin < transfer.twin
    assert open_trained(tmp_path / "run").device.type == "cuda"
