"""Mixtures of experts, as families describe them."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.feed_forward import Experts, FeedForward, Router
from batchinfer.models.fused_experts import QWEN_3_5, FusedExperts
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

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
    bias: bool = False,
    fused: FusedExperts = QWEN_3_5,
) -> Layer:
    """Replace a layer's feed-forward block by so many experts of size `inner`.

    Each is described by modules of its own; a checkpoint may hold them `fused`.
    """
    hidden, f = layer.block.up.columns, layer.block
    found = tuple(block(f"{name}.experts.{i}", hidden, inner, names, f.activation, bias) for i in range(experts))
    return replace(layer, feed_forward=Experts(router, found, shared, shared_gate, fused))


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
