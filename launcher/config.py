"""The configuration: dataclasses <- a YAML preset <- `key=value`, then plain dataclasses again.

It is not reachable from anywhere: whoever needs a value is given it. Invariant: a `Config` that left `resolve` has
every key known and every value of its type, and no OmegaConf type leaves this file. Whether the values make sense
together is `validate.py`'s question; `schema.py` reads the dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError
from ..models.config import ModelConfig, with_positions
from .schema import Key, fit, keys_of, option

PRESETS = Path(__file__).parent / "presets"
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class CorpusConfig:
    """One prepared corpus and its share of the rows."""

    path: str = option("", "folder or URL that `longscan prepare` wrote")
    weight: float = option(1.0, "share of the rows, relative to the other corpora", above=0)


@dataclass
class DataConfig:
    """What is read and in which order; all of it but cache and verify decides the order of the rows."""

    corpora: list[CorpusConfig] = option([], "corpora to mix; `[path, path]` is short for equal weights")
    packing: str = option("concat", "how documents fill rows", choices=("concat", "best_fit"))
    shuffle_window: int = option(8, "shards whose documents are shuffled together", at_least=1)
    seed: int = option(0, "seed of the shuffles", at_least=0)
    skipped_rows: list[str] = option([], "rows to leave out, each as stage:first-last, say 0:1200-1215")
    cache: str = option("", "folder for shards fetched from URLs (empty: ~/.cache/longscan)")
    cache_gib: float = option(64.0, "size limit of that folder in GiB", above=0)
    verify: str = option("size", "what a shard is checked against before it is read", choices=("size", "checksum"))


@dataclass
class StageConfig:
    """One stretch of training at one row length."""

    seq_len: int = option(0, "tokens of a row", at_least=1)
    tokens: int = option(0, "tokens to train on in this stage, e.g. 1.5B", at_least=1)
    lr_scale: float = option(1.0, "factor on the learning rate during this stage", above=0)
    micro_rows: int = option(0, "rows of a micro-batch in this stage (0: batch.micro_rows)", at_least=0)
    packing: str = option("", "overrides data.packing (empty: as there)", choices=("", "concat", "best_fit"))
    weights: list[float] = option([], "overrides the corpora's weights, one a corpus (empty: as there)")
    rope_base: float = option(0.0, "base of the rotary frequencies in this stage (0: the model's)", at_least=0)
    alibi_scale: float = option(0.0, "factor on ALiBi's slopes in this stage (0: the model's)", at_least=0)
    objective: str = option(
        "language_modelling",
        "what is learned: the next token, or to attend as softmax attention would with the same projections",
        choices=("language_modelling", "attention_transfer"),
    )
    trains: str = option(
        "all",
        "what changes: all but adapters, what linearized attention adds to softmax attention, or adapters (model.lora)",
        choices=("all", "mixers", "lora"),
    )


@dataclass
class BatchConfig:
    """How many tokens make a step; independent of how many workers there are."""

    tokens: int = option(65536, "tokens of a step over all workers", at_least=1)
    micro_rows: int = option(1, "rows a worker handles at once", at_least=1)
    ramp_from: int = option(0, "tokens of the first step; grows to batch.tokens (0: no ramp)", at_least=0)
    ramp_steps: int = option(0, "steps over which the batch grows", at_least=0)


@dataclass
class OptimizerConfig:
    """AdamW. Norms, biases and RG-LRU parameters are never decayed."""

    lr: float = option(1e-3, "peak learning rate", above=0)
    betas: list[float] = option([0.9, 0.95], "decay rates of the first and second moment")
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", at_least=0)
    clip: float = option(1.0, "largest global gradient norm (0: no clipping)", at_least=0)


@dataclass
class ScheduleConfig:
    """The learning rate over the steps."""

    warmup_steps: int = option(100, "steps of linear warm-up from 0", at_least=0)
    kind: str = option("cosine", "shape after the warm-up", choices=("cosine", "linear", "wsd", "constant"))
    final_ratio: float = option(0.1, "learning rate at the end as a share of the peak", at_least=0, at_most=1)
    decay_share: float = option(0.2, "wsd: share of the steps spent decaying", above=0, at_most=1)


@dataclass
class ParallelConfig:
    """How the model and the rows are spread over the workers."""

    data: int = option(0, "replicas (0: as many as the workers allow)", at_least=0)
    context: int = option(1, "workers that share one row, a contiguous piece each", at_least=1)
    tensor: int = option(1, "workers that share each layer", at_least=1)
    pipeline: int = option(1, "workers that share the stack of layers", at_least=1)
    zero: int = option(1, "DeepSpeed ZeRO stage", at_least=0, at_most=3)
    sequence_parallel: bool = option(False, "split norms and residuals over the tensor workers")
    copy_engines: bool = option(
        False, "tensor workers of one node exchange by their GPUs' copy engines (sequence_parallel, NVLink)"
    )
    offload_optimizer: bool = option(False, "keep optimizer state in host memory and compute updates there (zero >= 1)")
    interleave: int = option(1, "runs of layers a pipeline worker holds; more idle less and send more", at_least=1)
    stage_layers: list[int] = option([], "layers of each run, pipeline x interleave numbers (empty: dealt evenly)")


@dataclass
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: int = option(500, "steps between checkpoints; the last step is always saved", at_least=1)
    keep_last: int = option(2, "newest checkpoints to keep", at_least=1)
    keep_every: int = option(0, "also keep for good each checkpoint of a multiple of this (0: none)", at_least=0)


@dataclass
class ValidationConfig:
    """The loss on the corpora's held-out split while training."""

    every: int = option(500, "steps between validations (0: never)", at_least=0)
    rows: int = option(64, "held-out rows scored each time", at_least=1)


@dataclass
class LoggingConfig:
    """Where the metrics go besides metrics.jsonl."""

    every: int = option(1, "steps between two lines of metrics", at_least=1)
    tensorboard: bool = option(True, "write TensorBoard files into the run folder")
    wandb: str = option("", "Weights & Biases project (empty: off; needs `pip install longscan[wandb]`)")


@dataclass
class RunConfig:
    """The run itself: where it is written and how its processes start."""

    folder: str = option("", "run folder (empty: runs/<name of the config>)")
    seed: int = option(0, "seed of the initial weights", at_least=0)
    launcher: str = option("ray", "ray: one process a worker; inline: this process alone", choices=("ray", "inline"))
    workers: int = option(0, "workers (0: one a GPU, or one where there is none)", at_least=0)
    device: str = option("auto", "auto: GPUs where there are any", choices=DEVICES)
    threads: int = option(0, "CPU threads a worker (0: the cores shared among the workers)", at_least=0)
    deterministic: bool = option(False, "bit-for-bit repeatable; refuses what cannot be")
    implementation: str = option("auto", "kernels", choices=("auto", "reference", "triton"))
    activation_checkpoint: str = option(
        "none",
        "what a block computes again in the backward pass: nothing, its MLP (selective) or all of it, its input kept in"
        " GPU (full) or host memory (offload)",
        choices=("none", "selective", "full", "offload"),
    )
    compile: bool = option(False, "torch.compile of the blocks; the first steps of each row length wait for it")
    cuda_graphs: bool = option(
        False, "a micro-batch's forward and backward as one launch, where the host is slower than the GPU"
    )
    timeout_seconds: float = option(300.0, "how long a worker waits for the others before it gives up", above=0)
    max_loss_ratio: float = option(3.0, "stop when the loss is this many times its recent mean (0: off)", at_least=0)


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[StageConfig] = option([], "stages, trained one after the other on one stream of documents")
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: str = option("auto", "auto: bf16 on GPU, fp32 on CPU", choices=("auto", "fp32", "bf16"))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)


def resolve(source: str, overrides: Sequence[str] = ()) -> Config:
    """The plain configuration of `source` (a preset's name, a YAML file or a run folder) with `key=value` overrides.

    Raises ConfigError for an unknown source, an unknown key (naming the nearest known one) or a value of another type.
    What only makes sense together is checked by `validate`.
    """
    file = find_source(source)
    layer = _with_overrides(_read_yaml(file), overrides)
    layer = _with_model_preset(layer)
    _expand_shorthand(layer)
    config = from_mapping(layer)
    if not config.run.folder:
        name = file.parent.name if file.name.startswith("config") and Path(source).is_dir() else file.stem
        config.run.folder = str(Path("runs") / name)
    return config


def preset_names() -> list[str]:
    """The configurations that come with longscan."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def config_keys() -> list[Key]:
    """Every key a configuration may hold, with its type, default and meaning."""
    preset = Key("model.preset", "str", "", "model preset whose fields the others override; not a field itself")
    return [preset, *keys_of(Config)]


def find_source(source: str) -> Path:
    """The YAML file that `source` names: a preset, a path, or a run folder."""
    path = Path(source)
    if path.is_dir():
        from .run_folder import RunFolder

        return RunFolder.open(path).config_file
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {source}; {_known_presets()}.")
        return path
    preset = PRESETS / f"{source}.yaml"
    if not preset.is_file():
        near = difflib.get_close_matches(source, preset_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{source!r} is neither a preset, a YAML file nor a run folder; {hint}{_known_presets()}.")
    return preset


def load(file: str | os.PathLike[str]) -> Config:
    """The configuration that `save` wrote to `file`."""
    return from_mapping(_read_yaml(Path(file)))


def from_mapping(layer: dict[str, Any]) -> Config:
    """The configuration that nested mappings hold, over the defaults; what `dataclasses.asdict` gave comes back."""
    fitted = fit(Config, layer, names=[key.name for key in config_keys()])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), fitted))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the configuration'}: {str(error).splitlines()[0]}.") from error


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key spelt out, in the order of the dataclasses."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Config, new: Config) -> list[str]:
    """What changed, one `key: old -> new` each."""
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    keys = list(before) + [key for key in after if key not in before]
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in keys
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted key; a list of mappings is walked by index."""
    if isinstance(tree, dict):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        items = [(f"{prefix}.{index}", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: leaf for name, value in items for key, leaf in flatten(value, name).items()}


def with_vocabulary(config: Config, tokenizer_vocab: int) -> Config:
    """The configuration with a vocabulary of 0 replaced by the tokenizer's, rounded up to a multiple of 64.

    The rounding keeps the head's matrix divisible by tensor ranks and friendly to tensor cores; the extra ids never
    occur. A vocabulary that was set must hold the tokenizer's.
    """
    wanted = config.model.vocab_size
    if wanted and wanted < tokenizer_vocab:
        raise ConfigError(
            f"model.vocab_size is {wanted}, but the corpus's tokenizer has {tokenizer_vocab} tokens; "
            "leave it at 0 to take the tokenizer's."
        )
    size = wanted or math.ceil(tokenizer_vocab / 64) * 64
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def stage_model(config: Config, number: int) -> ModelConfig:
    """The model as stage `number` trains it: with that stage's RoPE base and ALiBi scale."""
    stage = config.stages[number]
    return with_positions(config.model, stage.rope_base, stage.alibi_scale)


def checkpoint_config(meta: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint's `meta` holds, its model as the stage it was taken in trains it."""
    config = from_mapping(meta["config"])
    if "cursor" not in meta:  # converted weights: no stage has trained them
        return config
    return dataclasses.replace(config, model=stage_model(config, meta["cursor"]["stage"]))


def _known_presets() -> str:
    return f"the presets are {', '.join(preset_names())}"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        node = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    layer = OmegaConf.to_container(node)
    if not isinstance(layer, dict):
        raise ConfigError(f"{file} holds a list; a configuration is a mapping of keys to values.")
    return layer  # type: ignore[return-value]


def _with_overrides(layer: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The layer with each `key=value` set; `stages.0.tokens=1M` reaches into a list."""
    node = OmegaConf.create(layer)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise ConfigError(f"{text!r} is not an override; write key=value, say optimizer.lr=3e-4.")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index]
            OmegaConf.update(node, key, "" if parsed is None and not value else parsed, force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"cannot set {key} to {value!r}: {reason}.") from error
    return OmegaConf.to_container(node)  # type: ignore[return-value]


def _with_model_preset(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer with `model.preset` replaced by the fields of that preset, under the fields given beside it."""
    model = layer.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return layer
    from ..models.config import load_preset

    given = {key: value for key, value in model.items() if key != "preset"}
    merged = OmegaConf.merge(OmegaConf.create(load_preset(str(model["preset"]))), OmegaConf.create(given))
    return {**layer, "model": OmegaConf.to_container(merged)}


def _expand_shorthand(layer: dict[str, Any]) -> None:
    """Turns `data.corpora: [path]` into `[{path: path}]`."""
    data = layer.get("data")
    corpora = data.get("corpora") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(corpora, str):
        corpora = [corpora]
    if isinstance(data, dict) and isinstance(corpora, list):
        data["corpora"] = [{"path": item} if isinstance(item, str) else item for item in corpora]
