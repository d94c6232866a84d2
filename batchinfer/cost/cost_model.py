"""`CostModel`: operations, and bytes of keys and values read, that requests cost; from the model's shape."""

from dataclasses import dataclass

from batchinfer.cost.step_cost import weights_per_token
from batchinfer.kernels.grain import TILE
from batchinfer.models.config import ModelConfig
from batchinfer.models.mixer import GatedDeltaNet, state_bytes


@dataclass(frozen=True)
class Requests:
    """The lengths, in tokens, of requests that all have the same lengths."""

    prompt: int
    output: int


@dataclass(frozen=True)
class CostModel:
    """The cost of requests for one model with one type of KV cache."""

    linear_parameters: int  # elements of the matrices of all layers that a token is multiplied by
    head_parameters: int
    query_numbers: int  # elements of a token's queries in all layers
    kv_bytes_per_token: int  # bytes of a token's keys and values in the layers that store them
    kv_bytes_read: int  # the same in all layers: some may read those of another
    state_bytes: int = 0  # of a sequence's state in all layers that keep one
    tile_multiplications: int = 0  # multiplications of a tile of a prompt with states and within itself, in all layers
    state_sums: int = 0  # numbers of a state that each new token multiplies three times

    @classmethod
    def of(cls, config: ModelConfig, kv_bytes: int, stream_bytes: int = 4) -> "CostModel":
        """Return the cost model of a checkpoint with this `config`.

        An element of keys and values takes `kv_bytes`, and one of the residual stream `stream_bytes`.
        """
        shapes = config.attentions
        stored, read = (sum(a.kv_bytes(kv_bytes) for a in found) for found in (config.storing, shapes))
        deltas = [mixer for mixer in config.recurrent if isinstance(mixer, GatedDeltaNet)]
        return cls(
            weights_per_token(config),
            config.head.size,
            sum(a.q.rows for a in shapes),
            stored,
            read,
            state_bytes=sum(state_bytes(mixer, stream_bytes) for mixer in config.recurrent),
            tile_multiplications=sum(mixer.tile_multiplications for mixer in deltas),
            state_sums=sum(mixer.state_numbers[1] for mixer in deltas),
        )

    @property
    def attention_operations(self) -> int:
        """Operations of attention between one token and one token that it sees, in all layers."""
        return 4 * self.query_numbers

    def operations(self, requests: Requests) -> float:
        """Return the operations of one request: of its prompt, and of each new token with the head.

        Of a mixture of experts, those of the experts that a token chooses.
        """
        prompt, output, seen = requests.prompt, requests.output, self.attention_operations
        prefill = prompt * (2 * self.linear_parameters + seen * prompt / 2 + 2 * self.tile_multiplications / TILE)
        a_token = 2 * self.linear_parameters + 2 * self.head_parameters + seen * (prompt + output / 2)
        a_token += 6 * self.state_sums
        return prefill + output * a_token

    def bytes_read(self, requests: Requests) -> float:
        """Return the bytes of keys and values that the new tokens of one request read."""
        return requests.output * (requests.prompt + requests.output / 2) * self.kv_bytes_read
