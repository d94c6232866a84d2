"""Mixtures of experts, as families describe them."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.feed_forward import Experts, FeedForward, Router
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix, Stack

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")


def with_experts(
    layer: Layer,
    router: Router,
    experts: int,
    inner: int,
    *,
    name: str = "mlp",
    names: tuple[str, str, str] = GATE_UP_DOWN,
    shared: FeedForward | None = None,
    shared_gate: Matrix | None = None,
) -> Layer:
    """Replace a layer's feed-forward block by so many experts of size `inner`, each with modules of its own."""
    hidden, f = layer.block.up.columns, layer.block
    found = tuple(block(f"{name}.experts.{i}", hidden, inner, names, f.activation) for i in range(experts))
    return replace(layer, feed_forward=Experts(router, found, shared, shared_gate))


def block(
    name: str,
    hidden: int,
    inner: int,
    names: tuple[str, str, str] = GATE_UP_DOWN,
    activation: str = "silu",
    bias: bool = False,
) -> FeedForward:
    """Describe a block of size `inner`; `names` are those of gate, up and down."""
    gate, up, down = (f"{name}.{part}" for part in names)
    return FeedForward(
        gate=Matrix(gate, inner, hidden, bias),
        up=Matrix(up, inner, hidden, bias),
        down=Matrix(down, hidden, inner, bias),
        activation=activation,
    )


def stacked_experts(
    experts: int,
    hidden: int,
    inner: int,
    gate_up: str,
    down: str,
    stack: Stack,
    *,
    bias: bool = False,
    step: int = 1,
    activation: str = "silu",
) -> tuple[FeedForward, ...]:
    """Describe experts whose matrices are stored as two tensors, gate and up in one of them.

    The rows of gate and up alternate if `step` is 2, and those of up follow those of gate if it is 1.
    """

    def expert(i: int) -> FeedForward:
        first, second = 2 * inner * i, 2 * inner * i + (1 if step == 2 else inner)
        rows = 2 * inner * experts
        return FeedForward(
            gate=Matrix(gate_up, inner, hidden, bias, first, rows, step, stack=stack),
            up=Matrix(gate_up, inner, hidden, bias, second, rows, step, stack=stack),
            down=Matrix(down, hidden, inner, bias, hidden * i, hidden * experts, stack=stack),
            activation=activation,
        )

    return tuple(expert(i) for i in range(experts))


def number_of_experts(config: ConfigFile, default: int) -> int:
    """Return the number of experts. Checkpoints give it under either of two names.

    Raises `ValueError` if both are there and differ.
    """
    found = [config.size(key) for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    if len(set(found)) > 1:
        raise ValueError(f"config.json: num_experts is {found[0]}, and num_local_experts is {found[1]}")
    return found[0] if found else default


def chosen_experts(config: ConfigFile, experts: int, key: str = "num_experts_per_tok") -> int:
    """Return the number of experts that are chosen for a token. Raises `ValueError` if there are not so many."""
    chosen = config.size(key)
    if chosen > experts:
        raise ValueError(f"config.json: {key} is {chosen}, more than the {experts} experts of a layer")
    return chosen


def best_groups(config: ConfigFile, experts: int, chosen: int) -> tuple[int, int]:
    """Return (number of groups, number of them that experts are chosen from).

    Raises `ValueError` for groups that do not fit.
    """
    groups, best = config.size("n_group"), config.size("topk_group")
    fits = experts % groups == 0 and best <= groups and chosen <= best * (experts // groups)
    if not fits or (groups > 1 and experts // groups < 2):
        raise ValueError(
            f"config.json: n_group is {groups} and topk_group {best}; {experts} experts, {chosen} of them chosen, do "
            "not fit such groups"
        )
    return groups, best
