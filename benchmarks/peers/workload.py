"""The one shape and workload that every engine runs, and the rates read from a run of it."""

import json
from dataclasses import dataclass
from pathlib import Path

SHAPE_DIR = Path(__file__).resolve().parents[1] / "shapes" / "llama-852m"

NUM_PROMPTS = 64
INPUT_LEN = 64
OUTPUT_LEN = 24


@dataclass(frozen=True)
class Shape:
    """The fields of a Llama `config.json` that decide the work."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @classmethod
    def load(cls) -> "Shape":
        config = json.loads((SHAPE_DIR / "config.json").read_text())
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices: what every token passes through."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def workload_operations(self) -> int:
        """Multiplications and additions of the matrix products with weights in one run; attention scores left out.

        The head runs once a new token. A request's last new token is never fed back, so the layers see one less.
        """
        layer_tokens = NUM_PROMPTS * (INPUT_LEN + OUTPUT_LEN - 1)
        head_tokens = NUM_PROMPTS * OUTPUT_LEN
        return 2 * (self.layer_weights * layer_tokens + self.hidden_size * self.vocab_size * head_tokens)


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one run, model load excluded."""

    prefill: float  # prompt tokens over the seconds until every request has its first new token
    decode: float  # new tokens after that moment over the seconds after it
    total: float  # all prompt and new tokens over all seconds

    @classmethod
    def of(cls, prefill_seconds: float, decode_seconds: float, decoded_tokens: int) -> "Rates":
        return cls(
            prefill=NUM_PROMPTS * INPUT_LEN / prefill_seconds,
            decode=decoded_tokens / decode_seconds,
            total=NUM_PROMPTS * (INPUT_LEN + OUTPUT_LEN) / (prefill_seconds + decode_seconds),
        )
