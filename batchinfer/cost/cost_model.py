"""`CostModel`: the operations and the bytes of keys and values that requests cost, from the model's shape."""

from dataclasses import dataclass

from batchinfer.cost.step_cost import layer_weights
from batchinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Requests:
    """Any number of requests that have the same lengths in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True)
class CostModel:
    """Of one model with one kind of KV cache."""

    linear_parameters: int  # of the layers' matrices
    head_parameters: int
    query_numbers: int  # of a token's queries in all layers
    kv_numbers: int  # of its keys and values
    kv_bytes: float  # of an element of keys and values, its share of a scale included

    @classmethod
    def of(cls, config: ModelConfig, kv_bytes: float) -> "CostModel":
        """From a checkpoint's shape."""
        shapes = [layer.attention for layer in config.layers]
        queries, keys_values = sum(a.q.rows for a in shapes), sum(a.k.rows + a.v.rows for a in shapes)
        return cls(layer_weights(config), config.head.size, queries, keys_values, kv_bytes)

    @property
    def attention_operations(self) -> int:
        """Of one token with each token that it sees."""
        return 4 * self.query_numbers

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of all layers."""
        return self.kv_numbers * self.kv_bytes

    def operations(self, requests: Requests) -> float:
        """Of one request: its prompt, and each new token with the head."""
        prompt, output, seen = requests.prompt, requests.output, self.attention_operations
        prefill = prompt * (2 * self.linear_parameters + seen * prompt / 2)
        a_token = 2 * self.linear_parameters + 2 * self.head_parameters + seen * (prompt + output / 2)
        return prefill + output * a_token

    def bytes_read(self, requests: Requests) -> float:
        """Keys and values that one request's new tokens read."""
        return requests.output * (requests.prompt + requests.output / 2) * self.kv_bytes_per_token
