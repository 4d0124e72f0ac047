"""`longscan convert`: the same function and the same bytes both ways, and nothing written where something is wrong."""

import json
import math
import pkgutil
import shlex
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "convert"))
published = pytest.importorskip("published", reason="transformers is not installed")
from longscan.errors import ConfigError, UserError  # noqa: E402
from longscan.kernels import Segments  # noqa: E402
from longscan.launcher import cli  # noqa: E402
from longscan.launcher.config import resolve  # noqa: E402
from longscan.launcher.converting import convert, same_bits, whole_tensor  # noqa: E402
from longscan.launcher.elastic.supervisor import train  # noqa: E402
from longscan.launcher.trained import open_trained  # noqa: E402
from longscan.launcher.validate import check_run, validate  # noqa: E402
from longscan.models.convert import Entry, write_file  # noqa: E402
from longscan.parallel import checkpoint as checkpoints  # noqa: E402
from longscan.parallel.checkpoint.boxes import Box  # noqa: E402
from longscan.parallel.checkpoint.manifest import Chunk, DataFile, Manifest  # noqa: E402
from longscan.parallel.checkpoint.storage import MappedFiles  # noqa: E402

TOKENS = torch.randint(0, published.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
SHORT = [
    "stages=[{seq_len: 32, tokens: 128}]",
    "batch.tokens=64",
    "batch.micro_rows=1",
    "schedule.warmup_steps=1",
    "validation.every=0",
    "run.launcher=inline",
]
SOURCES = {
    "griffin": published.griffin,
    "hawk": lambda: published.griffin(block_types=["recurrent"], num_hidden_layers=2),
    "llama": published.llama,
    "bloom": published.bloom,
    "llama-tied-biases": lambda: published.llama(tie_word_embeddings=True, mlp_bias=True),
}


def write_tokenizer(folder: Path, size: int = published.VOCAB) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def source(tmp_path):
    """Makes a model of transformers with a tokenizer."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **options) -> Path:
        folder = published.save(SOURCES[name](), tmp_path / "source", dtype, **options)
        write_tokenizer(folder)
        (folder / "LICENSE").write_text("a license")
        return folder

    return make


def logits_of_run(path: Path) -> torch.Tensor:
    return open_trained(path, "cpu").model(TOKENS, Segments.whole(*TOKENS.shape))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_round_trip_returns_the_same_bytes(source, tmp_path, name, dtype):
    folder = source(name, dtype)
    there = convert(folder, tmp_path / "run")
    back = convert(tmp_path / "run", tmp_path / "back")
    assert (there.to, back.to, there.rounded, back.rounded) == ("longscan", "huggingface", 0, 0)
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "LICENSE"):
        assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes(), file
    again = convert(tmp_path / "back", tmp_path / "run2")
    assert again.rounded == 0
    names = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for file in (file for file in names if file.suffix == ".safetensors" or file.name == "config.yaml"):
        assert (tmp_path / "run2" / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["griffin", "llama"])
def test_a_converted_model_is_a_run_that_opens(source, tmp_path, name):
    folder = source(name)
    convert(folder, tmp_path / "run")
    checkpoints.verify(tmp_path / "run" / "checkpoints" / "step-0")
    trained = open_trained(tmp_path / "run", "cpu")
    assert close(logits_of_run(tmp_path / "run"), published.logits(folder, TOKENS))
    info = trained.tokenizer.info
    said = json.loads((folder / "config.json").read_text())
    assert (info.bos_id, info.eos_id) == (said["bos_token_id"], said["eos_token_id"])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "longscan generate run" in card
    command = next(shlex.split(line) for line in card.splitlines() if line.startswith("longscan train"))
    assert "stages=[{seq_len: 8192, tokens: 1B}]" in command
    assert "parameters | " in card


def test_sharded_files_both_ways(source, tmp_path):
    folder = source("griffin", max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    convert(folder, tmp_path / "run", shard_bytes=8000)
    assert len(list((tmp_path / "run" / "checkpoints" / "step-0").glob("rank-*.safetensors"))) > 2
    convert(tmp_path / "run", tmp_path / "back", shard_bytes=8000)
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 8000 for file in files)
    whole = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert torch.equal(published.logits(tmp_path / "back", TOKENS), published.logits(folder, TOKENS))


def test_names_without_the_base_prefix_and_a_head_that_repeats_the_embedding(source, tmp_path):
    folder = source("llama-tied-biases")
    tensors = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    expected = published.logits(folder, TOKENS)
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "run")
    assert close(logits_of_run(tmp_path / "run"), expected)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight"):
        convert(folder, tmp_path / "other")


def test_fp64_comes_back_too(source, tmp_path):
    folder = source("griffin", torch.float64)
    assert convert(folder, tmp_path / "run").rounded > 0
    assert convert(tmp_path / "run", tmp_path / "back").rounded == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_dtype_and_what_is_rounded(source, tmp_path):
    folder = source("llama")
    convert(folder, tmp_path / "run")
    report = convert(tmp_path / "run", tmp_path / "half", dtype="bf16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert report.rounded == len(tensors)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 0.1  # in fp32 (0.1 - 1) + 1 is not 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert convert(folder, tmp_path / "rounded").rounded == 1
    assert convert(tmp_path / "rounded", tmp_path / "back").rounded == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    found = load_file(tmp_path / "rounded" / "huggingface" / "model.safetensors")
    assert found.keys() == {"model.norm.weight"}


def test_bytes_are_compared_and_not_numbers(source, tmp_path):
    folder = source("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = -0.0  # (-0 - 1) + 1 is 0
    tensors["lm_head.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert convert(folder, tmp_path / "run").rounded == 1
    assert convert(tmp_path / "run", tmp_path / "back").rounded == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_trained_from_a_converted_model_and_back(corpus, tmp_path):
    folder = published.save(published.griffin(vocab_size=320, bos_token_id=256), tmp_path / "source")
    convert(folder, tmp_path / "run", tokenizer="bytes")
    fixed = [f"data.corpora=[{corpus}]", *SHORT, "run.threads=1", "run.device=cpu", "logging.tensorboard=false"]
    config, _ = check_run(resolve(str(tmp_path / "run"), [*fixed, f"run.folder={tmp_path / 'tuned'}"]))
    assert train(config, init_from=str(tmp_path / "run")).status == "finished"
    with pytest.raises(ConfigError, match="holds converted weights and no training to resume"):
        train(replace(config, run=replace(config.run, folder=str(tmp_path / "run"))))
    report = convert(tmp_path / "tuned", tmp_path / "back")
    assert (report.family, report.rounded) == ("recurrent_gemma", 0)
    assert close(published.logits(tmp_path / "back", TOKENS), logits_of_run(tmp_path / "tuned"))
    assert not close(published.logits(tmp_path / "back", TOKENS), published.logits(folder, TOKENS))
    card = (tmp_path / "back" / "README.md").read_text()
    assert "Step 2 of the run `tuned`" in card and "bytes of UTF-8" in card


TWIN = ["model.linearized_attention.group=8", "model.linearized_attention.conv_taps=3"]
MIXER = "model.linearized_attention"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run folder's checkpoint of step 0, by name."""
    folder = run / "checkpoints" / "step-0"
    checkpoints.verify(folder)
    manifest, files = checkpoints.read_manifest(folder), MappedFiles(folder)
    return {name.removeprefix("weight/"): whole_tensor(manifest, files, name) for name in manifest.tensors}


@pytest.mark.parametrize("name", ["llama", "llama-tied-biases"])
def test_a_twin_has_every_tensor_of_its_teacher_and_draws_its_own_from_the_seed(source, tmp_path, name):
    folder = source(name, torch.bfloat16)
    convert(folder, tmp_path / "teacher")
    there = convert(folder, tmp_path / "twin", linearized=True, overrides=[*TWIN, "run.seed=3"], shard_bytes=8000)
    theirs, ours = weights_of(tmp_path / "teacher"), weights_of(tmp_path / "twin")
    added = {
        f"blocks.{n}.mixer.{own}" for n in (0, 1) for own in ("conv_weight", "global_scale", "query_map", "key_map")
    }
    assert ours.keys() == theirs.keys() | added
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    model = open_trained(tmp_path / "twin", "cpu").model
    model.init_weights(3)
    drawn = model.state_dict()
    assert all(torch.equal(ours[name], drawn[name]) for name in added)
    assert ours["blocks.0.mixer.conv_weight"].shape == (4, 3)
    assert (there.drawn, there.tensors, there.family, there.rounded) == (8, len(ours), "llama", 0)
    for file in ("tokenizer/tokenizer.json", "huggingface/LICENSE"):
        assert (tmp_path / "twin" / file).read_bytes() == (tmp_path / "teacher" / file).read_bytes()


def test_the_card_of_a_twin_says_what_it_is_and_how_it_is_trained(source, tmp_path):
    convert(source(), tmp_path / "twin", linearized=True)
    card = (tmp_path / "twin" / "README.md").read_text()
    assert "LlamaForCausalLM, its attention linearized" in card and "2 linearized_attention" in card
    assert "8 tensors that linearized attention adds are drawn from seed 0 and not trained" in card
    command = next(shlex.split(line) for line in card.splitlines() if line.startswith("longscan train"))
    given = [word for word in command if word.startswith("stages=")]
    validate(resolve(str(tmp_path / "twin"), [*given, "data.corpora=[x]"]))


LINEARIZED = {
    "bloom": ("bloom", {}, r"source is a bloom; only a llama can be linearized"),
    "griffin": ("griffin", {}, r"source is a recurrent_gemma; only a llama can be linearized"),
    "dtype": ("llama", {"dtype": "bf16"}, r"always fp32"),
    "no twin": ("llama", {"linearized": False, "overrides": TWIN}, r"group=8' says how to linearize.*--linearized"),
    "unknown key": ("llama", {"overrides": [f"{MIXER}.grup=8"]}, rf"unknown key {MIXER}.grup"),
    "no value": ("llama", {"overrides": ["run.seed"]}, r"'run.seed' is no part of a twin"),
    "no number": ("llama", {"overrides": ["run.seed=two"]}, r"run.seed"),
    "the teacher's": ("llama", {"overrides": ["model.width=48"]}, r"'model.width=48' is no part of a twin"),
    "training": ("llama", {"overrides": ["stages.0.tokens=1M"]}, r"'stages.0.tokens=1M' is no part of a twin"),
    "group": ("llama", {"overrides": [f"{MIXER}.group=0"]}, r"group=0 must be at least 1"),
    "heads": (
        "llama",
        {"overrides": [f"{MIXER}.kv_heads=4"]},
        r"blocks.0.mixer.key.weight is \[12, 24\] in the model to linearize and \[24, 24\] in the twin",
    ),
    "biases": (
        "llama",
        {"overrides": [f"{MIXER}.output_bias=true"]},
        r"blocks.0.mixer.output.bias is absent in the model to linearize and \[24\] in the twin",
    ),
}


@pytest.mark.parametrize("what", LINEARIZED)
def test_a_twin_that_cannot_be_is_refused_before_anything_is_written(source, tmp_path, what):
    name, options, message = LINEARIZED[what]
    folder = source(name)
    with pytest.raises(ConfigError, match=message):
        convert(folder, tmp_path / "twin", **{"linearized": True, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_neither_a_run_nor_a_twin_is_linearized_or_converted_back(source, tmp_path):
    folder = source()
    convert(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match="takes a llama of transformers, and .*run is a run"):
        convert(tmp_path / "run", tmp_path / "twin", linearized=True)
    convert(folder, tmp_path / "twin", linearized=True)
    with pytest.raises(ConfigError, match="llama: it has no linearized_attention"):
        convert(tmp_path / "twin", tmp_path / "back")


def test_a_model_that_no_architecture_says(tiny, tmp_path):
    train(tiny(*SHORT))
    with pytest.raises(ConfigError, match=r"model.logit_soft_cap=0.0 would be 30.0.*llama: it has no local_att"):
        convert(tmp_path / "run", tmp_path / "back")


def test_tensors_are_put_together_from_boxes(tmp_path):
    whole = torch.randn(5, 4)
    boxes = [Box((0, 0), (5, 1)), Box((0, 1), (2, 3)), Box((2, 1), (3, 3))]
    files = []
    for number, box in enumerate(boxes):
        rows, columns = (slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        path = tmp_path / f"{number}.safetensors"
        entry = Entry("x", "F32", box.sizes)
        written = write_file(path, [entry], [whole[rows, columns]])
        assert load_file(path)["x"].equal(whole[rows, columns])
        assert checkpoints.manifest.checksum_of(path) == written.checksum
        files.append(DataFile(path.name, written.bytes, written.checksum, (Chunk("x", box, written.begins[0]),)))
    manifest = Manifest(0, 0, {"x": ((5, 4), "F32")}, tuple(files), {})
    assert whole_tensor(manifest, MappedFiles(tmp_path), "x").equal(whole)


# Bad input


def change_config(**fields):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        said = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))

    return change


def change_tensors(**tensors):
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        held |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({name: t for name, t in held.items() if t is not None}, folder / "model.safetensors")

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-1.safetensors", "x": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def wrong_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))


BAD = {
    "unknown field": (change_config(sliding_window=64), ConfigError, r"not known of llama models: sliding_window=64"),
    "lacking field": (change_config(hidden_size=...), ConfigError, r"lacks hidden_size"),
    "scaled rope": (change_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ConfigError, r"llama3"),
    "other activation": (change_config(hidden_act="gelu"), ConfigError, r"hidden_act='gelu'.*'silu'"),
    "other model": (change_config(model_type="lama"), ConfigError, r"model_type='lama'.*known: llama"),
    "impossible": (change_config(num_attention_heads=3, head_dim=7), ConfigError, r"rope_fraction|kv_heads"),
    "no number": (change_config(hidden_size="wide"), ConfigError, r"a value that makes no llama model"),
    "no heads": (change_config(num_attention_heads=0), ConfigError, r"a value that makes no llama model"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), UserError, r"config.json is not JSON"),
    "wrong shape": (
        change_tensors(model__norm__weight=torch.ones(7)),
        UserError,
        r"model.norm.weight is \[7\], by config.json it would be \[24\]",
    ),
    "missing tensor": (change_tensors(lm_head__weight=None), UserError, r"lm_head.weight \[64, 24\] is missing"),
    "surplus tensor": (change_tensors(model__extra=torch.ones(2)), UserError, r"model.extra \[2\] is not a tensor of"),
    "unknown dtype": (
        change_tensors(model__norm__weight=torch.ones(24, dtype=torch.int8)),
        UserError,
        r"model.norm.weight is I8",
    ),
    "truncated": (truncate, UserError, r"model.safetensors \(\d+ bytes\) cannot be read"),
    "only a pickle": (only_a_pickle, UserError, r"pytorch_model.bin is a pickle, which is never read"),
    "lost shard": (lost_shard, UserError, r"model-2.safetensors \(missing\)"),
    "wrong index": (wrong_index, UserError, r"holds no x, which model.safetensors.index.json says"),
    "no such end": (change_config(eos_token_id=64), ConfigError, r"eos_token_id=64, an id that .* does not have"),
    "no end": (change_config(eos_token_id=[]), ConfigError, r"eos_token_id=\[\], an id"),
    "no id": (change_config(bos_token_id=["<s>"]), ConfigError, r"bos_token_id=\['<s>'\], an id"),
    "larger tokenizer": (lambda folder: write_tokenizer(folder, 65), ConfigError, r"has 64 rows and the tokenizer 65"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ConfigError, r"has no tokenizer.json"),
    "no tokenizer.json": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ConfigError,
        r"not a Hugging Face tokenizer.json",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_said_before_anything_is_written(source, tmp_path, what):
    spoil, error, message = BAD[what]
    folder = source()
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        convert(folder, tmp_path / "run")
    assert type(raised.value) is error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_of_another_model(tmp_path):
    folder = published.save(published.llama(vocab_size=2000), tmp_path / "source")
    write_tokenizer(folder)
    with pytest.raises(ConfigError, match="has 2000 rows and the tokenizer 64 tokens"):
        convert(folder, tmp_path / "run")


def test_options_that_do_not_fit(source, tmp_path):
    folder = source()
    for options, message in (
        ({"to": "huggingface"}, "can only be converted to 'longscan'"),
        ({"to": "onnx"}, "one of huggingface, longscan"),
        ({"dtype": "bf16"}, "always fp32"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(folder, tmp_path / "run", **options)
    convert(folder, tmp_path / "run", to="longscan")
    for options, message in (
        ({"to": "longscan"}, "can only be converted to 'huggingface'"),
        ({"dtype": "int8"}, "one of fp32, bf16, fp16"),
        ({"tokenizer": "bytes"}, "has its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path / "run", tmp_path / "back", **options)
    with pytest.raises(ConfigError, match="exists and is never written over"):
        convert(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds neither"):
        convert(tmp_path, tmp_path / "x")
    with pytest.raises(ConfigError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch, way):
    folder = source()
    if way == "back":
        convert(folder, tmp_path / "run")
        folder = tmp_path / "run"
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longscan.models.convert.files.sync", full)
    with pytest.raises(UserError, match="No space left on device; nothing is left of it"):
        convert(folder, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("reader", ["models.convert.Weights.read", "launcher.converting.weights.whole_tensor"])
def test_memory_holds_one_tensor(source, tmp_path, monkeypatch, reader):
    """When a tensor is read, at most the one read before is still held."""
    owner, _, name = f"longscan.{reader}".rpartition(".")
    original, read = pkgutil.resolve_name(f"{owner}.{name}"), []

    def counted(*arguments):
        assert sum(tensor() is not None for tensor in read) <= 1
        tensor = original(*arguments)
        read.append(weakref.ref(tensor))
        return tensor

    folder = source("griffin")
    monkeypatch.setattr(f"{owner}.{name}", counted)
    convert(folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert len(read) == len(load_file(folder / "model.safetensors"))


def test_memory_holds_one_tensor_of_a_twin_too(source, tmp_path, monkeypatch):
    """When a tensor is written, at most the one before it is still held."""
    written = []

    def watched(tensors):
        for tensor in tensors:
            assert sum(earlier() is not None for earlier in written) <= 1
            written.append(weakref.ref(tensor.untyped_storage()))
            yield tensor

    def write(path, entries, tensors, *metadata):
        return write_file(path, entries, watched(tensors), *metadata)

    folder = source()
    monkeypatch.setattr("longscan.models.convert.write_file", write)
    made = convert(folder, tmp_path / "twin", linearized=True)
    assert made.drawn == 8 and len(written) == made.tensors


def test_the_command(source, tmp_path, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    folder = source()
    capsys.readouterr()
    code, out, _ = run(folder, tmp_path / "run", "--json")
    said = json.loads(out)
    assert code == 0 and said["to"] == "longscan" and said["family"] == "llama" and said["rounded"] == 0
    code, out, _ = run(tmp_path / "run", tmp_path / "back", "--to", "huggingface", "--dtype", "fp16")
    assert code == 0 and "21 tensors were rounded" in out
    assert run(folder, tmp_path / "run")[0] == 2
    code, out, _ = run(folder, tmp_path / "twin", *TWIN, "--linearized")
    assert code == 0 and "8 tensors are the twin's own" in out
    truncate(folder)
    code, out, err = run(folder, tmp_path / "run2")
    assert (code, out) == (1, "") and "cannot be read" in err
