"""What a model is, as plain data; and all that is known of it without building it.

No torch here: sizes, parameter counts and FLOPs are arithmetic on these fields, so a layout can be refused before any
process starts. Every field is an int, float, bool, str, a list of them or a nested dataclass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .mixer_config import (
    AttentionConfig,
    LinearizedAttentionConfig,
    LocalAttentionConfig,
    MixerConfig,
    RGLRUConfig,
    ShortConvConfig,
    TaylorAttentionConfig,
    not_among,
)

ACTIVATIONS = ("gelu", "silu")
PLAIN_ACTIVATIONS = (*ACTIVATIONS, "relu")
NORMS = ("rms", "layer")
POSITION_EMBEDDINGS = ("none", "sinusoidal")
# The linears of attention and of the MLP, by their names in a block.
ADAPTABLE = ("query", "key", "value", "output", "gate", "up", "down")
PRESETS = Path(__file__).parent / "presets"


@dataclass
class MLPConfig:
    """The gated MLP `W_down(act(W_gate x) * W_up x)`, or the plain `W_down act(W_up x)` of transformers before it."""

    hidden: int = field(default=0, metadata={"help": "hidden width; 0 = 3 x model width, as in Griffin"})
    gated: bool = field(default=True, metadata={"help": "false: no gate, as in the ALiBi transformer and BLOOM"})
    activation: str = field(default="gelu", metadata={"help": "gelu (tanh approximation), silu; relu if not gated"})
    bias: bool = field(default=True, metadata={"help": "biases; the paper is silent, its code has them"})

    def hidden_size(self, width: int) -> int:
        """The hidden width in force."""
        return self.hidden or 3 * width

    def num_params(self, width: int) -> int:
        """The MLP's parameters."""
        hidden, inputs = self.hidden_size(width), 1 + self.gated
        return (inputs + 1) * width * hidden + self.bias * (inputs * hidden + width)

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        if self.hidden < 0:
            yield f"model.mlp.hidden={self.hidden} must be positive, or 0 for 3 x width"
        yield from not_among("model.mlp.activation", self.activation, ACTIVATIONS if self.gated else PLAIN_ACTIVATIONS)


@dataclass
class LoRAConfig:
    """Low-rank adapters of linears in the blocks, `alpha / rank B A x` beside `W x`; none by default."""

    rank: int = field(default=0, metadata={"help": "rows of A and columns of B; 0 = no adapters"})
    alpha: float = field(default=16.0, metadata={"help": "the adapter is multiplied by alpha / rank"})
    linears: list[str] = field(
        default_factory=lambda: ["query", "key", "value", "output"],
        metadata={"help": f"which linears of a block have one: {', '.join(ADAPTABLE)}"},
    )

    def num_params(self, model: ModelConfig) -> int:
        """The parameters of all adapters."""
        if not self.rank:
            return 0
        return self.rank * sum(_sides(model, mixer, linear) for mixer in model.mixers for linear in set(self.linears))

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """What is wrong with the values."""
        if self.rank < 0 or self.alpha <= 0:
            yield f"model.lora.rank={self.rank} must be at least 0 and model.lora.alpha={self.alpha:g} above 0"
        for name in self.linears:
            yield from not_among("model.lora.linears", name, ADAPTABLE)
        known = {name for name in model.pattern if isinstance(getattr(model, name, None), AttentionConfig)}
        if self.rank and (others := sorted(set(model.pattern) - known)):
            yield f"model.lora.rank={self.rank} needs mixers with attention; model.pattern has {', '.join(others)}"


def _sides(model: ModelConfig, mixer: str, linear: str) -> int:
    """Inputs and outputs of a block's linear; 0 where the block has none of that name."""
    options, width = model.mixer_config(mixer), model.width
    if linear in ("gate", "up", "down"):
        return 0 if linear == "gate" and not model.mlp.gated else width + model.mlp.hidden_size(width)
    assert isinstance(options, AttentionConfig), mixer
    heads = options.key_heads(width) if linear in ("key", "value") else options.query_heads(width)
    return width + heads * options.head_dim


@dataclass
class ModelConfig:
    """A language model: an embedding, `layers` blocks whose mixers follow `pattern`, a norm and a head."""

    vocab_size: int = field(default=0, metadata={"help": "rows of the embedding; 0 = taken from the tokenizer"})
    width: int = field(default=768, metadata={"help": "width of the residual stream"})
    layers: int = field(default=12, metadata={"help": "number of blocks"})
    pattern: list[str] = field(
        default_factory=lambda: ["rg_lru", "rg_lru", "local_attention"],
        metadata={"help": "mixers of the blocks, repeated until there are `layers`"},
    )
    mlp: MLPConfig = field(default_factory=MLPConfig)
    rg_lru: RGLRUConfig = field(default_factory=RGLRUConfig)
    local_attention: LocalAttentionConfig = field(default_factory=LocalAttentionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    taylor_attention: TaylorAttentionConfig = field(default_factory=TaylorAttentionConfig)
    short_conv: ShortConvConfig = field(default_factory=ShortConvConfig)
    linearized_attention: LinearizedAttentionConfig = field(default_factory=LinearizedAttentionConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    norm: str = field(default="rms", metadata={"help": "rms: RMSNorm; layer: LayerNorm, with biases"})
    norm_eps: float = field(default=1e-6, metadata={"help": "added to the norm's mean square"})
    embedding_norm: bool = field(default=False, metadata={"help": "a norm after the embedding (BLOOM)"})
    tie_embeddings: bool = field(default=True, metadata={"help": "the head is the embedding's matrix"})
    embedding_scale: bool = field(default=False, metadata={"help": "embeddings times sqrt(width), that in bf16"})
    position_embedding: str = field(default="none", metadata={"help": "added to the embeddings: none or sinusoidal"})
    logit_soft_cap: float = field(default=0.0, metadata={"help": "c tanh(logits / c); 0 = off (RecurrentGemma: 30)"})

    @property
    def mixers(self) -> list[str]:
        """The mixer's name of each block."""
        return [self.pattern[index % len(self.pattern)] for index in range(self.layers)]

    def mixer_config(self, name: str) -> MixerConfig:
        """The config of the mixer called `name`."""
        return getattr(self, name)


MIXER_NAMES = (
    "attention",
    "linearized_attention",
    "local_attention",
    "rg_lru",
    "short_conv",
    "taylor_attention",
)


def validate(config: ModelConfig) -> None:
    """Returns nothing; raises ConfigError with every problem and its values if the model cannot be built."""
    problems = list(_problems(config))
    if problems:
        raise ConfigError("; ".join(problems))


def _problems(config: ModelConfig) -> Iterator[str]:
    for key in ("width", "layers"):
        if getattr(config, key) < 1:
            yield f"model.{key}={getattr(config, key)} must be at least 1"
    if config.vocab_size < 0:
        yield f"model.vocab_size={config.vocab_size} must be positive, or 0 for the tokenizer's"
    if config.norm_eps <= 0:
        yield f"model.norm_eps={config.norm_eps} must be above 0"
    if config.logit_soft_cap < 0:
        yield f"model.logit_soft_cap={config.logit_soft_cap} must be positive, or 0 for none"
    yield from not_among("model.norm", config.norm, NORMS)
    yield from not_among("model.position_embedding", config.position_embedding, POSITION_EMBEDDINGS)
    if config.position_embedding == "sinusoidal" and config.width % 2:
        yield f"model.width={config.width} must be even for model.position_embedding='sinusoidal'"
    if not config.pattern:
        yield f"model.pattern=[] names no mixer; use some of {', '.join(MIXER_NAMES)}"
    if config.width < 1:
        return
    for name in dict.fromkeys(config.pattern):
        if name in MIXER_NAMES:
            yield from config.mixer_config(name).problems(config.width)
        else:
            yield f"model.pattern names the unknown mixer {name!r}; {nearest(name, MIXER_NAMES)}"
    yield from config.mlp.problems(config.width)
    yield from config.lora.problems(config)


def told_positions(config: ModelConfig) -> set[str]:
    """How the mixers of `config` are told positions: rope, alibi, both or neither."""
    options = [config.mixer_config(name) for name in set(config.pattern) & set(MIXER_NAMES)]
    attentions = [each for each in options if isinstance(each, AttentionConfig)]
    return {each.position for each in attentions if each.rotary_dims or each.position == "alibi"}


def with_positions(config: ModelConfig, rope_base: float = 0.0, alibi_scale: float = 0.0) -> ModelConfig:
    """`config` with this base wherever it rotates and this factor on ALiBi's slopes; 0 leaves what is there.

    No parameter depends on either, so a model may go on with others (`LanguageModel.use_positions`).
    """
    given = {"rope_base": rope_base, "alibi_scale": alibi_scale}
    changes = {key: value for key, value in given.items() if value}
    attentions = (config.attention, config.local_attention, config.linearized_attention)
    return replace(config, **{each.name: replace(each, **changes) for each in attentions})


def num_params(config: ModelConfig) -> int:
    """The number of parameters of the model, exactly; a tied head is the embedding and counts once."""
    blocks = sum(config.mixer_config(name).num_params(config.width) for name in config.mixers)
    blocks += config.layers * config.mlp.num_params(config.width)
    norms = 2 * config.layers + 1 + config.embedding_norm
    vectors = norms * (2 if config.norm == "layer" else 1)
    tables = 1 if config.tie_embeddings else 2
    return blocks + (vectors + tables * config.vocab_size) * config.width + config.lora.num_params(config)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of training on one token of a row of `seq_len` tokens that is one document.

    6 x parameters (a tied head once, the embedding look-up not at all) plus softmax attention by the pairs really
    inside the window and linear attention by its states' entries. Diagonal scans add nothing beyond their parameters,
    and recomputation is never counted.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.width
    mixing = sum(config.mixer_config(name).mixing_flops(config.width, seq_len) for name in config.mixers)
    return 6.0 * (num_params(config) - lookup) + mixing


def carry_bytes(config: ModelConfig, tokens: int, element: int = 2) -> int:
    """Bytes that generation keeps of a row that has read `tokens`; an activation is `element` bytes, as in bf16."""
    return sum(config.mixer_config(name).carry_bytes(config.width, tokens, element) for name in config.mixers)


def preset_names() -> list[str]:
    """The names of the model presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The ModelConfig fields that the preset `name` sets, as a plain mapping.

    A preset with `base` is that preset but for the fields it names itself, at any depth; lists are replaced.
    """
    preset = _read_preset(name)
    preset.pop("published", None)
    base = preset.pop("base", None)
    return _over(load_preset(base), preset) if base else preset


@dataclass(frozen=True)
class Published:
    """What is published of a preset's size.

    Attributes:
        parameters: the count as it is printed, "1.35B": its digits say how it was rounded.
        vocab_size: the vocabulary.
        embedding: the embedding's parameters in that count: this model's own unless given, 0 where they are left out.
    """

    parameters: str
    vocab_size: int
    embedding: int | None = None

    def counted(self, config: ModelConfig) -> int:
        """What `config` has of what the published count counts."""
        blocks = num_params(replace(config, vocab_size=0))
        embedding = num_params(replace(config, vocab_size=self.vocab_size)) - blocks
        return blocks + (embedding if self.embedding is None else self.embedding)


def published(name: str) -> Published | None:
    """What is published of the size of the preset `name`; None where the preset is our own."""
    figures = _read_preset(name).get("published")
    return figures and Published(**figures)


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"unknown model preset {name!r}; {nearest(name, preset_names())}")
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def _over(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _over(base.get(key, {}), value) for key, value in fields.items() if isinstance(value, dict)}
    return base | fields | nested


def config_from_mapping(mapping: Mapping[str, Any]) -> ModelConfig:
    """A validated ModelConfig with the fields of `mapping` (a preset, a saved config) and defaults for the rest."""
    config = ModelConfig()
    _fill(config, mapping, "model")
    validate(config)
    return config


def _fill(config: Any, mapping: Mapping[str, Any], path: str) -> None:
    known = [entry.name for entry in fields(config)]
    for key, value in mapping.items():
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}; {nearest(key, known)}")
        if is_dataclass(getattr(config, key)):
            _fill(getattr(config, key), value, f"{path}.{key}")
        else:
            setattr(config, key, value)


def config_to_mapping(config: ModelConfig) -> dict[str, Any]:
    """The fields of `config` as a plain mapping, the inverse of `config_from_mapping`."""
    return asdict(config)


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A clause that lists what is known, the nearest to `name` first."""
    ranked = sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
    return f"known: {', '.join(ranked)}"
