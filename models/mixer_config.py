"""What each mixer is, as plain data: sizes, parameter counts, FLOPs and what is wrong with the values.

No torch here. `models/config.py` holds the model's config, which has one of these for every mixer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

DECAY_INITS = ("paper", "released")
LOCAL_BRANCHES = ("softmax", "relu2")
FEATURE_MAPS = ("elu", "relu", "identity", "taylor", "learned")
STATE_BYTES = 4


class MixerConfig(Protocol):
    """What every mixer's config answers; `width` is the model's."""

    def num_params(self, width: int) -> int:
        """The mixer's parameters."""
        ...

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """FLOPs a token, forward and backward, of the mixing itself: what 6 x parameters does not count."""
        ...

    def carry_bytes(self, width: int, tokens: int, element: int) -> int:
        """Bytes of the carry of a row that has read `tokens`, an activation being `element` bytes, a state fp32."""
        ...

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values, one clause each, values included."""
        ...


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

    def carry_bytes(self, width: int, tokens: int, element: int) -> int:
        """The state and the convolution's inputs."""
        return self.channels(width) * (STATE_BYTES + (self.conv_taps - 1) * element)

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        name = "model.rg_lru"
        if self.gate_blocks < 1:
            yield f"{name}.gate_blocks={self.gate_blocks} must be at least 1"
        elif self.width < 0 or self.channels(width) % self.gate_blocks:
            yield f"{name}.width={self.width} must be a positive multiple of gate_blocks={self.gate_blocks}, or 0"
        if self.conv_taps < 1:
            yield f"{name}.conv_taps={self.conv_taps} must be at least 1"
        yield from not_among(f"{name}.decay_init", self.decay_init, DECAY_INITS)
        if len(self.decay_range) != 2 or not 0 < self.decay_range[0] < self.decay_range[1] < 1:
            yield f"{name}.decay_range={self.decay_range} must be two rising numbers between 0 and 1"


@dataclass
class ShortConvConfig:
    """Based's gated short convolution: a convolution over 3 taps and SiLU on one branch, times the other.

    The released code also has a bias in the convolution, but only where its CUDA kernel runs; here it has none.
    """

    width: int = field(default=0, metadata={"help": "width of a branch; 0 = 2 x model width, as in Based"})
    taps: int = field(default=3, metadata={"help": "taps of the convolution"})
    bias: bool = field(default=True, metadata={"help": "biases of the three linears"})

    def channels(self, width: int) -> int:
        """The width of a branch in force."""
        return self.width or 2 * width

    def num_params(self, width: int) -> int:
        """The block's parameters."""
        channels = self.channels(width)
        return 3 * width * channels + self.bias * (2 * channels + width) + channels * self.taps

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """Zero: each tap is a parameter."""
        return 0.0

    def carry_bytes(self, width: int, tokens: int, element: int) -> int:
        """The convolution's inputs."""
        return self.channels(width) * (self.taps - 1) * element

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        if self.width < 0:
            yield f"model.short_conv.width={self.width} must be positive, or 0 for 2 x model width"
        if self.taps < 1:
            yield f"model.short_conv.taps={self.taps} must be at least 1"


@dataclass
class HeadsConfig:
    """What the mixers with heads share."""

    name: ClassVar[str]

    heads: int = field(default=0, metadata={"help": "query heads; 0 = width / head_dim"})
    head_dim: int = field(default=128, metadata={"help": "dims of a head"})

    def query_heads(self, width: int) -> int:
        """The number of query heads in force."""
        return self.heads or width // self.head_dim

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        if self.head_dim < 1:
            yield f"model.{self.name}.head_dim={self.head_dim} must be at least 1"
        elif self.heads < 0 or (self.heads == 0 and (width % self.head_dim or width < self.head_dim)):
            yield (
                f"model.{self.name}.heads={self.heads} needs model.width={width} "
                f"to be a multiple of head_dim={self.head_dim}"
            )


@dataclass
class TaylorAttentionConfig(HeadsConfig):
    """Based's linear attention, whose weights are exp's Taylor polynomial of second order.

    `scale` multiplies the scores inside the polynomial: the released code's 1 / sqrt(feature_dim), which the paper's
    equation leaves out, keeps them in the range where the polynomial is near exp. `normalize` divides by the weights'
    sum, as both do. No decay: some released runs have a fixed one a head, the paper none.
    """

    name: ClassVar[str] = "taylor_attention"

    head_dim: int = field(default=64, metadata={"help": "dims of a value head"})
    feature_dim: int = field(default=16, metadata={"help": "dims of a query and key head"})
    scale: float = field(default=0.0, metadata={"help": "factor of the scores; 0 = 1 / sqrt(feature_dim)"})
    normalize: bool = field(default=True, metadata={"help": "divide by the sum of the weights"})

    def num_params(self, width: int) -> int:
        """The mixer's parameters."""
        return 2 * width * self.query_heads(width) * (self.feature_dim + self.head_dim)

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """4 FLOPs a state entry (added to, read) and pass, three passes: packed terms x (values, normaliser)."""
        terms = taylor_terms(self.feature_dim)
        return 12.0 * self.query_heads(width) * terms * (self.head_dim + self.normalize)

    def carry_bytes(self, width: int, tokens: int, element: int) -> int:
        """The sums over keys, of values and of one."""
        return self.query_heads(width) * taylor_terms(self.feature_dim) * (self.head_dim + 1) * STATE_BYTES

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        yield from super().problems(width)
        if self.feature_dim < 1:
            yield f"model.{self.name}.feature_dim={self.feature_dim} must be at least 1"
        if self.scale < 0:
            yield f"model.{self.name}.scale={self.scale} must be positive, or 0 for 1 / sqrt(feature_dim)"


@dataclass
class AttentionConfig(HeadsConfig):
    """Softmax attention over the whole document.

    `alibi` is ALiBi's: each head loses its slope times the distance, and nothing else tells positions. `none` leaves
    positions to what the model adds to its embeddings, or to the other mixers.
    """

    name: ClassVar[str] = "attention"
    positions: ClassVar[tuple[str, ...]] = ("rope", "alibi", "none")

    kv_heads: int = field(default=0, metadata={"help": "key and value heads; 0 = as many as query heads"})
    position: str = field(default="rope", metadata={"help": "rope, alibi or none"})
    rope_fraction: float = field(default=1.0, metadata={"help": "share of a head's dims that is rotated"})
    rope_base: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies"})
    alibi_scale: float = field(default=1.0, metadata={"help": "factor on ALiBi's slopes; below 1 looks further back"})
    qkv_bias: bool = field(default=False, metadata={"help": "biases of q, k and v, which need as many heads each"})
    output_bias: bool = field(default=False, metadata={"help": "bias of the output projection"})

    def key_heads(self, width: int) -> int:
        """The number of key and value heads in force."""
        return self.kv_heads or self.query_heads(width)

    @property
    def rotary_dims(self) -> int:
        """How many of a head's dims are rotated."""
        return round(self.head_dim * self.rope_fraction) if self.position == "rope" else 0

    @property
    def keys_seen(self) -> int | None:
        """Keys a query sees, itself included; None for its whole document."""
        return None

    def num_params(self, width: int) -> int:
        """The attention's parameters."""
        queries, keys = self.query_heads(width), self.key_heads(width)
        biases = self.qkv_bias * (queries + 2 * keys) * self.head_dim + self.output_bias * width
        return 2 * width * (queries + keys) * self.head_dim + biases

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """4 K a pair, head and pass, three passes; only pairs really seen, the row being one document."""
        pairs = pairs_per_token(seq_len, self.keys_seen or seq_len)
        return 12.0 * self.query_heads(width) * self.head_dim * pairs

    def carry_bytes(self, width: int, tokens: int, element: int) -> int:
        """Keys and values: of all that was read, or of the window before the next token."""
        kept = tokens if self.keys_seen is None else self.keys_seen - 1
        return 2 * self.key_heads(width) * self.head_dim * kept * element

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        name = f"model.{self.name}"
        found = list(super().problems(width))
        yield from found
        if self.kv_heads < 0:
            yield f"{name}.kv_heads={self.kv_heads} must be at least 1, or 0 for as many as query heads"
        elif not found and self.query_heads(width) % self.key_heads(width):
            yield f"{name}.heads={self.query_heads(width)} is not a multiple of kv_heads={self.kv_heads}"
        elif not found and self.qkv_bias and self.query_heads(width) != self.key_heads(width):
            yield f"{name}.qkv_bias=True needs kv_heads={self.kv_heads} to be heads={self.query_heads(width)}, or 0"
        yield from not_among(f"{name}.position", self.position, self.positions)
        if not 0 <= self.rope_fraction <= 1 or self.rotary_dims % 2:
            yield (
                f"{name}.rope_fraction={self.rope_fraction} of head_dim={self.head_dim} "
                f"is {self.head_dim * self.rope_fraction:g} dims; it must be an even number between 0 and head_dim"
            )
        if self.rope_base <= 1:
            yield f"{name}.rope_base={self.rope_base} must be above 1"
        if self.alibi_scale <= 0:
            yield f"{name}.alibi_scale={self.alibi_scale} must be above 0"


@dataclass
class LocalAttentionConfig(AttentionConfig):
    """Sliding-window softmax attention; by default Griffin's, with rotary positions and one key head.

    `window` counts the query itself: the paper's 1024 means 1024 keys (the released code's mask keeps one more).
    `rope_fraction` is 0.5, the released code's choice (the paper says RoPE and no more): the weights and figures that
    can be checked were made so, and the other half of each head matches content at any distance.
    """

    name: ClassVar[str] = "local_attention"

    kv_heads: int = field(default=1, metadata={"help": "key and value heads; 1 = multi-query, 0 = as query heads"})
    rope_fraction: float = field(default=0.5, metadata={"help": "share of a head's dims that is rotated"})
    output_bias: bool = field(default=True, metadata={"help": "bias of the output projection"})
    window: int = field(default=1024, metadata={"help": "keys a query sees, itself included"})

    @property
    def keys_seen(self) -> int:
        """The window."""
        return self.window

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        yield from super().problems(width)
        if self.window < 1:
            yield f"model.{self.name}.window={self.window} must be at least 1"


@dataclass
class LinearizedAttentionConfig(AttentionConfig):
    """Grouped linear attention with a local branch and a convolution over the values (arXiv 2406.07368).

    `local` is softmax, `feature_map` elu and `normalize` true by default: every branch is then a mean of values, at
    any length, and a softmax model's projections mean the same in the local branch. The released code is `relu2`,
    `identity` and false: nothing is divided, and its global branch grows with the tokens read.
    """

    name: ClassVar[str] = "linearized_attention"
    positions: ClassVar[tuple[str, ...]] = ("rope", "none")

    group: int = field(default=64, metadata={"help": "tokens of a group, counted from the document's start"})
    local: str = field(default="softmax", metadata={"help": "attention inside a group: softmax or relu2"})
    feature_map: str = field(default="elu", metadata={"help": "elu (elu + 1), relu, identity, taylor or learned"})
    feature_dim: int = field(default=16, metadata={"help": "dims a head is projected to before taylor or learned"})
    normalize: bool = field(default=True, metadata={"help": "divide the global branch by the sum of its weights"})
    conv_taps: int = field(default=32, metadata={"help": "taps of the causal convolution over the values"})

    @property
    def keys_seen(self) -> int:
        """The group: the most keys that the local branch keeps."""
        return self.group

    @property
    def projected(self) -> bool:
        """Whether the feature map has a projection of its own."""
        return self.feature_map in ("taylor", "learned")

    @property
    def features(self) -> int:
        """Features of a head."""
        if self.feature_map == "taylor":
            return taylor_terms(self.feature_dim)
        return 2 * self.feature_dim if self.feature_map == "learned" else self.head_dim

    def num_params(self, width: int) -> int:
        """The attention's parameters, and per head a filter, a factor and the maps' projections."""
        maps = 2 * self.head_dim * self.feature_dim if self.projected else 0
        return super().num_params(width) + self.query_heads(width) * (self.conv_taps + 1 + maps)

    def mixing_flops(self, width: int, seq_len: int) -> float:
        """Pairs inside the groups as in softmax attention, state entries as in Taylor's, a filter for each value."""
        whole, rest = divmod(seq_len, self.group)
        pairs = (whole * self.group * (self.group + 1) + rest * (rest + 1)) / (2 * seq_len)
        state = self.features * (self.head_dim + self.normalize)
        filters = (self.head_dim - 1) * self.conv_taps
        return self.query_heads(width) * (12.0 * self.head_dim * pairs + 12.0 * state + 6.0 * filters)

    def carry_bytes(self, width: int, tokens: int, element: int) -> int:
        """Keys and values of a group or the filter, and the sums over all groups and over the open one."""
        kept = 2 * (max(self.group, self.conv_taps) - 1)
        heads = self.query_heads(width) if self.projected else self.key_heads(width)
        sums = heads * 2 * self.features * (self.head_dim + self.normalize)
        return self.key_heads(width) * self.head_dim * kept * element + sums * STATE_BYTES

    def problems(self, width: int) -> Iterator[str]:
        """What is wrong with the values."""
        name = f"model.{self.name}"
        yield from super().problems(width)
        for key in ("group", "feature_dim", "conv_taps"):
            if getattr(self, key) < 1:
                yield f"{name}.{key}={getattr(self, key)} must be at least 1"
        yield from not_among(f"{name}.local", self.local, LOCAL_BRANCHES)
        yield from not_among(f"{name}.feature_map", self.feature_map, FEATURE_MAPS)
        if self.normalize and self.feature_map == "identity":
            yield f"{name}.normalize=True needs weights that are never negative; feature_map='identity' has some"


def taylor_terms(dims: int) -> int:
    """The packed terms of the second-order Taylor feature map of `dims` dims."""
    return 1 + dims + dims * (dims + 1) // 2


def pairs_per_token(seq_len: int, window: int) -> float:
    """The mean number of keys a query sees in a document of `seq_len` tokens."""
    inside = min(seq_len, window)
    return (inside * (inside + 1) / 2 + (seq_len - inside) * window) / seq_len


def not_among(key: str, value: str, known: tuple[str, ...]) -> Iterator[str]:
    """A clause where `value` is none of `known`."""
    if value not in known:
        yield f"{key}={value!r} is not one of {', '.join(known)}"
