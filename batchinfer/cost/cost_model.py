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
    kv_bytes_per_token: int  # bytes of a token's keys and values in the layers that store them
    kv_bytes_read: int  # the same in all layers: some may read those of another

    @classmethod
    def of(cls, config: ModelConfig, kv_bytes: int) -> "CostModel":
        """Return the cost model of a checkpoint with this `config`; an element of keys and values takes `kv_bytes`."""
        shapes = config.attentions
        stored, read = (sum(a.kv_bytes(kv_bytes) for a in found) for found in (config.storing, shapes))
        return cls(layer_weights(config), config.head.size, sum(a.q.rows for a in shapes), stored, read)

    @property
    def attention_operations(self) -> int:
        """Operations of attention between one token and one token that it sees, in all layers."""
        return 4 * self.query_numbers

    def operations(self, requests: Requests) -> float:
        """Return the operations of one request: of its prompt, and of each new token with the head."""
        prompt, output, seen = requests.prompt, requests.output, self.attention_operations
        prefill = prompt * (2 * self.linear_parameters + seen * prompt / 2)
        a_token = 2 * self.linear_parameters + 2 * self.head_parameters + seen * (prompt + output / 2)
        return prefill + output * a_token

    def bytes_read(self, requests: Requests) -> float:
        """Return the bytes of keys and values that the new tokens of one request read."""
        return requests.output * (requests.prompt + requests.output / 2) * self.kv_bytes_read
