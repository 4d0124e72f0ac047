"""What a model is, as plain data; and all that is known of it without building it.

No torch here: sizes, parameter counts and FLOPs are arithmetic on these fields, so a layout can be refused before any
process starts. Every field is an int, float, bool, str, a list of them or a nested dataclass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from ..errors import ConfigError

ACTIVATIONS = ("gelu", "silu")
DECAY_INITS = ("paper", "released")
PRESETS = Path(__file__).parent / "presets"


class MixerConfig(Protocol):
    """What every mixer's config answers; `width` is the model's."""

    def num_params(self, width: int) -> int:
        """The mixer's parameters."""
        ...

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """FLOPs a token, forward and backward, of the mixing itself: what 6 x parameters does not count."""
        ...

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values, one clause each, values included."""
        ...


@dataclass
class MLPConfig:
    """The gated MLP `W_down(act(W_gate x) * W_up x)`."""

    hidden: int = field(default=0, metadata={"help": "hidden width; 0 = 3 x model width, as in Griffin"})
    activation: str = field(default="gelu", metadata={"help": "gelu (tanh approximation) or silu"})
    bias: bool = field(default=True, metadata={"help": "biases; the paper is silent, its code has them"})

    def hidden_size(self, width: int) -> int:
        """The hidden width in force."""
        return self.hidden or 3 * width

    def num_params(self, width: int) -> int:
        """The MLP's parameters."""
        hidden = self.hidden_size(width)
        return 3 * width * hidden + self.bias * (2 * hidden + width)

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        if self.hidden < 0:
            yield f"model.mlp.hidden={self.hidden} must be positive, or 0 for 3 x width"
        if self.activation not in ACTIVATIONS:
            yield f"model.mlp.activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}"


@dataclass
class RGLRUConfig:
    """Griffin's recurrent block: two branches, a short convolution and the RG-LRU on one, GeLU on the other.

    Where the paper and the released code differ: `gate_blocks` is the paper's 16 (the number of heads in the code), and
    `decay_init` the code's, which learns faster; `mixers/rg_lru.py` says by how much.
    """

    width: int = field(default=0, metadata={"help": "recurrence width; 0 = 4/3 of model width, in whole gate blocks"})
    gate_blocks: int = field(default=16, metadata={"help": "blocks of the block-diagonal gates"})
    conv_taps: int = field(default=4, metadata={"help": "taps of the short convolution"})
    decay_init: str = field(default="released", metadata={"help": "released: a in decay_range; paper: a^8 in it"})
    decay_range: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "range of initial decays"})
    bias: bool = field(default=True, metadata={"help": "biases of the three linears"})

    def channels(self, width: int) -> int:
        """The recurrence width in force."""
        return self.width or -(-4 * width // (3 * self.gate_blocks)) * self.gate_blocks

    def num_params(self, width: int) -> int:
        """The recurrent block's parameters."""
        channels = self.channels(width)
        linears = 3 * width * channels + self.bias * (2 * channels + width)
        conv = channels * (self.conv_taps + 1)
        gates = 2 * (channels * channels // self.gate_blocks + channels)
        return linears + conv + gates + channels

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """Zero: the scan and the gates' pointwise work (some tens of FLOPs a channel) are not counted."""
        return 0.0

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        name = "model.rg_lru"
        if self.gate_blocks < 1:
            yield f"{name}.gate_blocks={self.gate_blocks} must be at least 1"
        elif self.width < 0 or self.channels(width) % self.gate_blocks:
            yield f"{name}.width={self.width} must be a positive multiple of gate_blocks={self.gate_blocks}, or 0"
        if self.conv_taps < 1:
            yield f"{name}.conv_taps={self.conv_taps} must be at least 1"
        if self.decay_init not in DECAY_INITS:
            yield f"{name}.decay_init={self.decay_init!r} is not one of {', '.join(DECAY_INITS)}"
        if len(self.decay_range) != 2 or not 0 < self.decay_range[0] < self.decay_range[1] < 1:
            yield f"{name}.decay_range={self.decay_range} must be two rising numbers between 0 and 1"


@dataclass
class LocalAttentionConfig:
    """Sliding-window softmax attention with rotary positions; multi-query by default.

    `window` counts the query itself: the paper's 1024 means 1024 keys (the released code's mask keeps one more).
    `rope_fraction` is 0.5, the released code's choice (the paper says RoPE and no more): the weights and figures that
    can be checked were made so, and the other half of each head matches content at any distance.
    """

    heads: int = field(default=0, metadata={"help": "query heads; 0 = width / head_dim"})
    head_dim: int = field(default=128, metadata={"help": "dims of a head"})
    kv_heads: int = field(default=1, metadata={"help": "key and value heads; 1 = multi-query"})
    window: int = field(default=1024, metadata={"help": "keys a query sees, itself included"})
    rope_fraction: float = field(default=0.5, metadata={"help": "share of a head's dims that is rotated"})
    rope_base: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies"})
    output_bias: bool = field(default=True, metadata={"help": "bias of the output projection; q, k, v have none"})

    def query_heads(self, width: int) -> int:
        """The number of query heads in force."""
        return self.heads or width // self.head_dim

    @property
    def rotary_dims(self) -> int:
        """How many of a head's dims are rotated."""
        return round(self.head_dim * self.rope_fraction)

    def num_params(self, width: int) -> int:
        """The attention's parameters."""
        inner = self.query_heads(width) * self.head_dim
        return 2 * width * inner + 2 * width * self.kv_heads * self.head_dim + self.output_bias * width

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """4 K a pair, head and pass, three passes; only pairs inside the window, the row being one document."""
        return 12.0 * self.query_heads(width) * self.head_dim * pairs_per_token(seq_len, self.window)

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        name = "model.local_attention"
        for key in ("head_dim", "kv_heads", "window"):
            if getattr(self, key) < 1:
                yield f"{name}.{key}={getattr(self, key)} must be at least 1"
        if self.head_dim < 1 or self.kv_heads < 1:
            return
        if self.heads < 0 or (self.heads == 0 and (width % self.head_dim or width < self.head_dim)):
            yield f"{name}.heads={self.heads} needs model.width={width} to be a multiple of head_dim={self.head_dim}"
        elif self.query_heads(width) % self.kv_heads:
            yield f"{name}.heads={self.query_heads(width)} is not a multiple of kv_heads={self.kv_heads}"
        if not 0 <= self.rope_fraction <= 1 or self.rotary_dims % 2:
            yield (
                f"{name}.rope_fraction={self.rope_fraction} of head_dim={self.head_dim} "
                f"is {self.head_dim * self.rope_fraction:g} dims; it must be an even number between 0 and head_dim"
            )
        if self.rope_base <= 1:
            yield f"{name}.rope_base={self.rope_base} must be above 1"


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
    norm_eps: float = field(default=1e-6, metadata={"help": "added to the mean square in RMSNorm"})
    tie_embeddings: bool = field(default=True, metadata={"help": "the head is the embedding's matrix"})
    embedding_scale: bool = field(default=False, metadata={"help": "embeddings times sqrt(width) (RecurrentGemma)"})
    logit_soft_cap: float = field(default=0.0, metadata={"help": "c tanh(logits / c); 0 = off (RecurrentGemma: 30)"})

    @property
    def mixers(self) -> list[str]:
        """The mixer's name of each block."""
        return [self.pattern[index % len(self.pattern)] for index in range(self.layers)]

    def mixer_config(self, name: str) -> MixerConfig:
        """The config of the mixer called `name`."""
        return getattr(self, name)


MIXER_NAMES = ("local_attention", "rg_lru")


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


def num_params(config: ModelConfig) -> int:
    """The number of parameters of the model, exactly; a tied head is the embedding and counts once."""
    blocks = sum(config.mixer_config(name).num_params(config.width) for name in config.mixers)
    blocks += config.layers * (config.mlp.num_params(config.width) + 2 * config.width)
    tables = 1 if config.tie_embeddings else 2
    return blocks + config.width + tables * config.vocab_size * config.width


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of training on one token of a row of `seq_len` tokens that is one document.

    6 x parameters (a tied head once, the embedding look-up not at all) plus softmax attention by the pairs really
    inside the window. Scans add nothing beyond their parameters, and recomputation is never counted.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.width
    mixing = sum(config.mixer_config(name).mixing_flops(config.width, seq_len) for name in config.mixers)
    return 6.0 * (num_params(config) - lookup) + mixing


def pairs_per_token(seq_len: int, window: int) -> float:
    """The mean number of keys a query sees in a document of `seq_len` tokens."""
    inside = min(seq_len, window)
    return (inside * (inside + 1) / 2 + (seq_len - inside) * window) / seq_len


def preset_names() -> list[str]:
    """The names of the model presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The ModelConfig fields that the preset `name` sets, as a plain mapping."""
    if name not in preset_names():
        raise ConfigError(f"unknown model preset {name!r}; {nearest(name, preset_names())}")
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


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
