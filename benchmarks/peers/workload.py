"""The one shape and the workloads that every engine runs, and the rates read from a run of one."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

SHAPE_DIR = Path(__file__).resolve().parents[1] / "shapes" / "llama-852m"
THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens, side by side, each answered with the same number of new ones."""

    num_prompts: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Read "64x64x24". Raises `ValueError` for another form."""
        num_prompts, input_len, output_len = map(int, text.split("x"))
        return cls(num_prompts, input_len, output_len)

    def __str__(self) -> str:
        return f"{self.num_prompts}x{self.input_len}x{self.output_len}"

    @property
    def tokens(self) -> int:
        """All tokens, of prompts and new ones."""
        return self.num_prompts * (self.input_len + self.output_len)


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

    def operations(self, workload: Workload) -> int:
        """Multiplications and additions of the matrix products with weights in one run; attention scores left out.

        The head runs once a new token. A request's last new token is never fed back, so the layers see one less.
        """
        layer_tokens = workload.tokens - workload.num_prompts
        head_tokens = workload.num_prompts * workload.output_len
        return 2 * (self.layer_weights * layer_tokens + self.hidden_size * self.vocab_size * head_tokens)


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one run, model load excluded."""

    prefill: float  # prompt tokens over the seconds until every request has its first new token
    decode: float  # new tokens after that moment over the seconds after it
    total: float  # all prompt and new tokens over all seconds

    @classmethod
    def of(cls, workload: Workload, prefill_seconds: float, decode_seconds: float, decoded_tokens: int) -> "Rates":
        return cls(
            prefill=workload.num_prompts * workload.input_len / prefill_seconds,
            decode=decoded_tokens / decode_seconds,
            total=workload.tokens / (prefill_seconds + decode_seconds),
        )
