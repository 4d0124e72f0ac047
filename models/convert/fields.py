"""The fields of a config.json, each read once: what nobody read is unknown, and an unknown field is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError

# What changes no logit of a loaded model: names, ids of special tokens, how weights began and were regularised.
UNREAD = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "final_w_init_variance_scale",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "seq_length",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "w_init_variance_scale",
    }
)


class Fields:
    """The fields of a model of the family `family`."""

    def __init__(self, mapping: Mapping[str, Any], family: str) -> None:
        self._left = {key: value for key, value in mapping.items() if key not in UNREAD}
        self._family = family

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of `key`; ConfigError where it is absent or null."""
        value = self.take(key, None)
        if value is None:
            raise ConfigError(f"config.json lacks {key}, which a {self._family} model needs")
        return value

    def either(self, key: str, other: str) -> Any:
        """The value of the field that has two names; ConfigError where both are absent or null."""
        value = self.take(other, None)
        return self.need(key) if value is None else self.take(key, value)

    def require(self, key: str, expected: Any) -> None:
        """Returns nothing; ConfigError where `key` is there and says something else than `expected`."""
        value = self.take(key, expected)
        if value != expected:
            raise ConfigError(
                f"config.json says {key}={value!r}; of {self._family} models only those with {expected!r} can be "
                "converted"
            )

    def rope(self) -> tuple[float, float | None]:
        """The base of the rotary frequencies and the share of a head's dims, None where unsaid.

        They stand in `rope_parameters` since transformers 5, in fields of their own before. Scaled frequencies
        (`rope_scaling`) are refused.
        """
        said = {"rope_type": "default", **self.take("rope_parameters", {}), **self.take("rope_scaling", {})}
        said.setdefault("rope_theta", self.take("rope_theta", 10000.0))
        said.setdefault("partial_rotary_factor", self.take("partial_rotary_factor", None))
        scaled = {key: value for key, value in said.items() if key not in ("rope_theta", "partial_rotary_factor")}
        if scaled != {"rope_type": "default"}:
            raise ConfigError(f"config.json scales its rotary frequencies ({scaled}); only unscaled ones are known")
        # Both places may say it, as files saved for readers of either do.
        for key in ("rope_theta", "partial_rotary_factor"):
            self._left.pop(key, None)
        return float(said["rope_theta"]), said["partial_rotary_factor"]

    def close(self) -> None:
        """Returns nothing; ConfigError where fields are left that nobody read."""
        if self._left:
            unknown = ", ".join(f"{key}={value!r}" for key, value in sorted(self._left.items()))
            raise ConfigError(
                f"config.json has fields that are not known of {self._family} models: {unknown}; what they change "
                "would be lost. Remove those that change nothing"
            )
