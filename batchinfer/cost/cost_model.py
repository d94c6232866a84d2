"""`CostModel`: operations, and bytes of keys and values read, that requests cost; from the model's shape."""

from dataclasses import dataclass

from batchinfer.cost.step_cost import layer_weights
from batchinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Requests:
    """The lengths, in tokens, of requests that all have the same lengths."""

    prompt: int
    output: int


@dataclass(frozen=True)
class CostModel:
    """The cost of requests for one model with one type of KV cache."""

    linear_parameters: int  # elements of the matrices of all layers
    head_parameters: int
    query_numbers: int  # elements of a token's queries in all layers
    kv_numbers: int  # elements of a token's keys and values in all layers
    kv_bytes: float  # bytes of an element of keys or values, its share of a scale included

    @classmethod
    def of(cls, config: ModelConfig, kv_bytes: float) -> "CostModel":
        """Return the cost model of a checkpoint with this `config`."""
        shapes = config.attentions
        queries, keys_values = sum(a.q.rows for a in shapes), sum(a.k.rows + a.v.rows for a in shapes)
        return cls(layer_weights(config), config.head.size, queries, keys_values, kv_bytes)

    @property
    def attention_operations(self) -> int:
        """Operations of attention between one token and one token that it sees, in all layers."""
        return 4 * self.query_numbers

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of a token's keys and values in all layers."""
        return self.kv_numbers * self.kv_bytes

    def operations(self, requests: Requests) -> float:
        """Return the operations of one request: of its prompt, and of each new token with the head."""
        prompt, output, seen = requests.prompt, requests.output, self.attention_operations
        prefill = prompt * (2 * self.linear_parameters + seen * prompt / 2)
        a_token = 2 * self.linear_parameters + 2 * self.head_parameters + seen * (prompt + output / 2)
        return prefill + output * a_token

    def bytes_read(self, requests: Requests) -> float:
        """Return the bytes of keys and values that the new tokens of one request read."""
        return requests.output * (requests.prompt + requests.output / 2) * self.kv_bytes_per_token
