"""`ConfigFile`: the fields of a `config.json`, each checked as it is read."""

import sys
from typing import Any

MOST = sys.float_info.max  # JSON may hold larger integers

# The largest sizes accepted. No model comes near them, and tables of a larger size would not fit in memory.
_LARGEST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10, "num_key_value_heads": 1 << 10, "head_dim": 1 << 10,
    "shared_intermediate_size": 1 << 19, "no_rope_layer_interval": 1 << 10, "sliding_window_pattern": 1 << 10,
    "num_experts": 1 << 12, "num_local_experts": 1 << 12, "n_routed_experts": 1 << 12, "moe_num_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12, "moe_k": 1 << 12, "n_group": 1 << 12, "topk_group": 1 << 12,
    "n_shared_experts": 1 << 10, "num_shared_experts": 1 << 10, "moe_num_shared_experts": 1 << 10,
    "moe_intermediate_size": 1 << 19, "shared_expert_intermediate_size": 1 << 19, "decoder_sparse_step": 1 << 10,
    "moe_layer_interval": 1 << 10, "first_k_dense_replace": 1 << 10, "max_window_layers": 1 << 10,
    "rotary_dim": 1 << 10, "num_dense_layers": 1 << 10,
    "global_head_dim": 1 << 10, "num_global_key_value_heads": 1 << 10, "num_kv_shared_layers": 1 << 10,
    "vocab_size_per_layer_input": 1 << 22, "hidden_size_per_layer_input": 1 << 17,
    "conv_L_cache": 1 << 10, "block_ff_dim": 1 << 19, "block_multiple_of": 1 << 19, "full_attention_interval": 1 << 10,
    "linear_conv_kernel_dim": 1 << 10, "linear_key_head_dim": 1 << 10, "linear_value_head_dim": 1 << 10,
    "linear_num_key_heads": 1 << 10, "linear_num_value_heads": 1 << 10,
    "max_position_embeddings": 1 << 24, "original_max_position_embeddings": 1 << 24, "sliding_window": 1 << 24,
}  # fmt: skip


class ConfigFile:
    """Typed access to the parsed JSON. Methods raise `ValueError` naming the field, its value and what it must be.

    A field that is null counts as missing.
    """

    def __init__(self, fields: dict[str, Any], name: str = "config.json") -> None:
        """Take the fields of the file, or of the object in it that `name` ends with."""
        self.fields, self.name = fields, name

    def changed(self, **fields: Any) -> "ConfigFile":
        """Return the same file with other values of some fields; None stands for a missing one."""
        return ConfigFile({**self.fields, **fields}, self.name)

    def get(self, key: str) -> Any:
        """Return the field unchecked, or None if it is missing."""
        return self.fields.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """Return the field, an integer of 1 or more."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST[key]:
            raise ValueError(f"{self.name}: {key} is {value!r}; it must be a whole number from 1 to {_LARGEST[key]}")
        return value

    def whole(self, key: str) -> int:
        """Return the field, an integer of 0 or more."""
        value = self._given(key, None)
        return 0 if value == 0 and type(value) is int else self.size(key)

    def size_or_none(self, key: str) -> int | None:
        """Return the field, an integer of 1 or more, or None if it is missing."""
        return None if self.get(key) is None else self.size(key)

    def size_or_zero(self, key: str) -> int:
        """Return the field, an integer of 0 or more."""
        return 0 if self.get(key) == 0 and not isinstance(self.get(key), bool) else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the field, a positive number."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
            raise ValueError(f"{self.name}: {key} is {value!r}; it must be a positive number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """Return the field, a positive number, or None if it is missing."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return the field, true or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.name}: {key} is {value!r}; it must be true or false")
        return value

    def object(self, key: str) -> "ConfigFile":
        """Return the field, an object; an empty one if it is missing."""
        value = self._given(key, {})
        if not isinstance(value, dict):
            raise ValueError(f"{self.name}: {key} is {value!r}; it must be an object")
        return ConfigFile(value, f"{self.name}: {key}")

    def _given(self, key: str, default: Any) -> Any:
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            told = f"{self.name}: {key} is null" if key in self.fields else f"{self.name} has no {key}"
            raise ValueError(f"{told}; it must have a value")
        return value
