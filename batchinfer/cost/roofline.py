"""What a job must cost: operations and bytes from its lengths and the model's shape, and seconds from two ceilings.

Two figures of a device, operations and bytes a second, are enough to place a run between two times: `bound`, where
reading and computing overlap perfectly, and `serial`, where they take turns, as they do in most engines' steps.
"""

from dataclasses import dataclass

from batchinfer.cost.step_cost import layer_weights
from batchinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Device:
    """Ceilings as measured."""

    operations_per_second: float  # of the matrix products in the type that the weights are multiplied in
    bytes_per_second: float  # of a copy, read and written bytes counted


@dataclass(frozen=True)
class Requests:
    """The same request so many times: its lengths in tokens."""

    prompt: int
    output: int
    shared: int = 0  # of the prompt, computed once for all of them

    @property
    def context(self) -> float:
        """Tokens of its own that a step of its generation reads, on average."""
        return self.prompt - self.shared + self.output / 2


@dataclass(frozen=True)
class CostModel:
    """Of one model with one kind of weights and of KV cache."""

    linear_parameters: int  # of the layers' matrices
    head_parameters: int
    query_numbers: int  # of a token's queries in all layers
    kv_numbers: int  # of its keys and values
    weight_bytes: float  # of a matrix element
    kv_bytes: float  # of an element of keys and values, its share of a scale included

    @classmethod
    def of(cls, config: ModelConfig, weight_bytes: float, kv_bytes: float) -> "CostModel":
        """From a checkpoint's shape."""
        shapes = [layer.attention for layer in config.layers]
        queries, keys_values = sum(a.q.rows for a in shapes), sum(a.k.rows + a.v.rows for a in shapes)
        return cls(layer_weights(config), config.head.size, queries, keys_values, weight_bytes, kv_bytes)

    @property
    def attention_operations(self) -> int:
        """Of one token with each token that it sees."""
        return 4 * self.query_numbers

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of all layers."""
        return self.kv_numbers * self.kv_bytes

    def operations(self, requests: Requests) -> float:
        """Of one request: its own part of the prompt, and each new token with the head."""
        r, seen = requests, self.attention_operations
        own = r.prompt - r.shared
        prefill = own * (2 * self.linear_parameters + seen * (r.shared + own / 2))
        a_token = 2 * self.linear_parameters + 2 * self.head_parameters + seen * (r.prompt + r.output / 2)
        return prefill + r.output * a_token

    def bytes_read(self, requests: Requests, batch: float) -> float:
        """Keys and values for one request's new tokens; a shared part is read once for all that run side by side."""
        own, shared = requests.context, requests.shared / batch
        return requests.output * (own + shared) * self.kv_bytes_per_token

    def largest_batch(self, requests: Requests, pool_bytes: float) -> float:
        """Requests whose keys and values fit side by side, half of their output being there on average."""
        a_token = self.kv_bytes_per_token
        return (pool_bytes - requests.shared * a_token) / (requests.context * a_token)

    def bound_seconds(self, requests: Requests, batch: float, device: Device) -> float:
        """Of one request: no engine can be faster on this device."""
        compute = self.operations(requests) / device.operations_per_second
        weights = requests.output * self._weights / batch
        return max(compute, (self.bytes_read(requests, batch) + weights) / device.bytes_per_second)

    def serial_seconds(self, requests: Requests, batch: float, device: Device) -> float:
        """Of one request where attention waits for the products, and each step's products take the longer of reading
        their weights and computing."""
        compute = self.operations(requests) / device.operations_per_second
        attention = self.bytes_read(requests, batch) / device.bytes_per_second
        reading = requests.output * self._weights / batch / device.bytes_per_second
        new = 2 * (self.linear_parameters + self.head_parameters) * requests.output / device.operations_per_second
        return compute + attention + max(0.0, reading - new)

    @property
    def _weights(self) -> float:
        return (self.linear_parameters + self.head_parameters) * self.weight_bytes
