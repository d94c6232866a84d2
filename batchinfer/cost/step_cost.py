"""Predict the seconds of an engine step from what it computes, with constants fitted once to steps timed on a device.

A step's time is modelled as a sum of quantities times constants: seconds per step, per layer, per number that passes
through norms and activations, per weight (by the number of rows it is multiplied with), per key that attention reads
or computes, and per logit. Effects that such a sum cannot hold, such as overlap, are averaged into the constants.
"""

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.grain import TILE
from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import GatedDeltaNet

Floats = NDArray[np.float64]

ROWS = (8, 16, 32, 64, 128, 256, 512)
"""Numbers of rows of a product for which the seconds per weight are fitted. They are interpolated in between, constant
below the first, and proportional to the rows above the last."""


CONVOLVED = 2
"""Numbers that pass through norms and activations in the time of one that a convolution multiplies by a tap."""


@dataclass(frozen=True, eq=False)
class Work:
    """The work of n steps, [n] each; padding counts, because it is computed too."""

    tokens: Floats
    sampled: Floats  # rows of logits
    decoding: Floats  # sequences with one new token
    decode_keys: Floats  # positions that these sequences see, rounded up to whole blocks
    tiles: Floats  # tiles of prompts
    tile_keys: Floats  # positions that these tiles see, each tile's own included
    tile_positions: Floats  # different positions of tiles in their sequences: attention computes each at once

    def __post_init__(self) -> None:
        assert len({len(getattr(self, field.name)) for field in fields(self)}) == 1

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Products:
    """One kind of matrix products: the engine settings that choose it, and the bytes of its weights."""

    quantization: str
    dtype: str
    layer_bytes: float  # of an element of the layers' matrices
    head_bytes: float

    def kv_cache(self, device: str) -> str:
        """Return the default type of keys and values: that of the activations between products."""
        return "float32" if device == "cpu" and self.quantization != "none" else self.dtype


PRODUCTS = {
    "float32": Products("none", "float32", 4, 4),
    "bfloat16": Products("none", "bfloat16", 2, 2),
    "w8a8-int8": Products("w8a8-int8", "bfloat16", 1, 2),
    "w4a8": Products("w4a8", "bfloat16", 4.25 / 8, 2),  # a scale for 128 columns
}
KV_CACHES = ("float32", "bfloat16", "int8", "fp8")  # the types of keys and values that are measured


@dataclass(frozen=True)
class Weights:
    """Bytes of a decoder's matrix elements where it runs, and of the cache that may hold them."""

    layer_bytes: float  # of an element of the layers' matrices
    head_bytes: float
    cache_bytes: float  # of the last-level cache: weights that fit stay in it from step to step

    def streamed(self, model: ModelConfig) -> float:
        """Return the share of the weights that a step reads from memory; it grows from 0 to 1 around the cache size."""
        nbytes = layer_weights(model) * self.layer_bytes + model.head.size * self.head_bytes
        return float(np.clip(nbytes / self.cache_bytes - 0.5, 0.0, 1.0))


def weights_per_token(model: ModelConfig) -> int:
    """Return the number of elements of the matrices that a token is multiplied by, without the head's."""
    made = 0 if model.ends.per_layer is None else model.ends.per_layer.projection.size
    of_layers = (
        sum(matrix.size for found in layer.mixer.products.values() for matrix in found)
        + layer.feed_forward.weights_per_token
        + (0 if layer.per_layer is None else layer.per_layer.weights_per_token)
        for layer in model.layers
    )
    return made + sum(of_layers)


def layer_weights(model: ModelConfig) -> int:
    """Return the number of elements of all matrices but the head's."""
    made = 0 if model.ends.per_layer is None else model.ends.per_layer.projection.size
    return made + sum(matrix.size for layer in model.layers for matrix in layer.matrices)


def quantities(work: Work, model: ModelConfig, weights: Weights, kv_cache: str, sampling: str) -> dict[str, Floats]:
    """Return the quantities that a step's seconds are a sum of, by name: [n] each.

    `kv_cache` is the type of keys and values; `sampling` is greedy, drawn or filtered.
    """
    w, layers = work, model.layers
    shapes = model.attentions
    # Behind attention, the last layer computes sampled rows only.
    inner, last = layers[:-1], layers[-1]
    moved = w.sampled * last.numbers_behind_attention + w.tokens * (
        sum(2 * layer.products["qkv"][0].columns + 2 * _numbers_mixed(layer) for layer in layers)
        + sum(layer.numbers_behind_attention for layer in inner)
    )
    products = _products(work, model)
    head = model.head.size
    streamed = weights.streamed(model)
    heads, width = sum(a.heads for a in shapes), sum(a.heads * a.head_dim for a in shapes)
    kv = sum(a.kv_heads * a.head_dim for a in shapes)
    stored = sum(a.kv_heads * a.head_dim for a in shapes if a.source is None)
    moved += (TILE * w.tiles + w.decoding) * sum(CONVOLVED * m.length * m.channels for m in model.recurrent)
    named = {
        "step": np.ones(len(w)),
        "layer": np.full(len(w), float(len(layers))),
        "decoding layer": len(shapes) * (w.decoding > 0),
        "number": moved,
        "weight from memory": streamed * weights.layer_bytes * sum(part * (rows > 0) for part, rows in products),
        "head": head * (w.sampled > 0),
        "head from memory": streamed * weights.head_bytes * head * (w.sampled > 0),
        "head by row": head * w.sampled,
        "logit": model.vocab_size * w.sampled,
        "place of tiles": len(shapes) * w.tile_positions,
        "tile operation": width * TILE * w.tile_keys,
        "tile score": heads * TILE * w.tile_keys,
        f"tile key in {kv_cache}": kv * w.tile_keys,
        "decoding sequence": len(shapes) * w.decoding,
        "decoding score": heads * w.decode_keys,
        f"decoding key in {kv_cache}": kv * w.decode_keys,
        f"stored key in {kv_cache}": stored * w.tokens,
    }
    if deltas := [mixer for mixer in model.recurrent if isinstance(mixer, GatedDeltaNet)]:
        named |= {
            "part of states": len(deltas) * (w.tile_positions + (w.decoding > 0)),
            "tile's multiplication with states": sum(m.tile_multiplications for m in deltas) * w.tiles,
            "decoding state number": sum(m.state_numbers[1] for m in deltas) * w.decoding,
        }
    if sampling != "greedy":
        named[f"{sampling} logit"] = model.vocab_size * w.sampled
    by_rows = np.sum([part * _shares(rows) for part, rows in products], axis=0)
    named |= {f"weight by {rows} rows": weights for rows, weights in zip(ROWS, by_rows, strict=True)}
    return {name: np.asarray(values, np.float64) for name, values in named.items()}


def _numbers_mixed(layer: Layer) -> int:
    """Count a token's numbers that its mixer takes from the products before it."""
    return sum(m.rows for name, matrices in layer.mixer.products.items() if name != "output" for m in matrices)


def _products(work: Work, model: ModelConfig) -> list[tuple[Floats, Floats]]:
    """Return (weights [n], the rows that they are multiplied with [n]) of the products of all layers, put together.

    Of a mixture those experts count that are expected to be touched, as if tokens chose evenly.
    """
    *inner, last = model.layers
    entered = [found for layer in model.layers for name, found in layer.mixer.products.items() if name != "output"]
    weights = sum(matrix.size for matrices in entered for matrix in matrices)
    weights += sum(layer.mixer.output.size for layer in inner)
    weights += sum(layer.per_layer.weights_per_token for layer in inner if layer.per_layer is not None)
    behind = Counter((layer.feed_forward, False) for layer in inner)
    behind[last.feed_forward, True] += 1
    ones = np.ones(len(work))
    of_last = last.mixer.output.size + (0 if last.per_layer is None else last.per_layer.weights_per_token)
    found = [(weights * ones, work.tokens), (of_last * ones, work.sampled)]
    for (f, sampled), layers in behind.items():
        rows = work.sampled if sampled else work.tokens
        if isinstance(f, FeedForward):
            found.append((layers * f.weights_per_token * ones, rows))
            continue
        chosen = f.router.chosen
        touched = experts_touched(f, rows)
        found.append((layers * touched * f.experts[0].weights_per_token, rows * chosen / np.maximum(touched, 1e-9)))
        found.append((layers * (f.weights_per_token - chosen * f.experts[0].weights_per_token) * ones, rows))
    return found


def experts_touched(mixture: Experts, rows: Floats) -> Floats:
    """Return how many experts `rows` [n] tokens are expected to touch, [n], if each chooses evenly by itself."""
    experts = len(mixture.experts)
    return np.asarray(experts * (1 - (1 - mixture.router.chosen / experts) ** rows), np.float64)


def _shares(rows: Floats) -> Floats:
    """Return interpolation weights [len(ROWS), n] for products of `rows` [n] rows; all are 0 for no rows."""
    inside = np.clip(rows, ROWS[0], ROWS[-1])
    shares: Floats = np.array([np.interp(inside, ROWS, one) for one in np.eye(len(ROWS))])
    shares[-1] *= np.maximum(rows, ROWS[-1]) / ROWS[-1]
    shares[:, rows == 0] = 0.0
    return shares


@dataclass(frozen=True)
class StepCost:
    """The constants of one device and one kind of products: seconds of each quantity, by its name."""

    seconds: dict[str, float]
    error: float = 0.0  # median relative error of the steps that it was fitted to

    @classmethod
    def fit(
        cls, measured: list[tuple[dict[str, Floats], Floats]], operations_per_second: float, byte_seconds: float
    ) -> "StepCost":
        """Fit constants to measured steps, (quantities by name, seconds [n]), by least squares of the relative error.

        Constants have lower bounds: 0, the device's `operations_per_second` for products, and the measured
        `byte_seconds` for weights from memory. Without these bounds a few small shapes would not tell apart all the
        quantities that grow with the tokens or with the weights.
        """
        names = sorted({name for steps, _ in measured for name in steps})
        rows = [np.stack([steps.get(name, np.zeros(len(taken))) for name in names], 1) for steps, taken in measured]
        taken = np.concatenate([taken for _, taken in measured])
        relative = np.concatenate(rows) / taken[:, None]
        bounds = {f"weight by {count} rows": 2 * count / operations_per_second for count in ROWS}
        bounds |= {"weight from memory": byte_seconds, "head from memory": byte_seconds}
        least = np.array([bounds.get(name, 0.0) for name in names])
        found = least + nonnegative_least_squares(relative, 1 - relative @ least)
        error = float(np.median(np.abs(relative @ found - 1)))
        return cls(dict(zip(names, found.tolist(), strict=True)), error)

    def times(self, factor: float) -> "StepCost":
        """Return the same cost with all seconds multiplied by `factor`."""
        return StepCost({name: factor * seconds for name, seconds in self.seconds.items()}, self.error)

    def of(self, quantities: dict[str, Floats]) -> Floats:
        """Return the seconds [n] of n steps. Raises `KeyError` naming a quantity that was not measured."""
        total: Floats = np.sum([self.seconds[name] * values for name, values in quantities.items()], axis=0)
        return total


@dataclass(frozen=True)
class DeviceCost:
    """All that was measured on a device; keys of dicts are names in `PRODUCTS`."""

    steps: dict[str, StepCost]
    load_seconds: dict[str, float]  # to load an element of the layers' matrices
    start_seconds: float  # from the start of a process until the engine's code is imported
    operations_per_second: dict[str, float]  # of a large matrix product
    bytes_per_second: float  # copy rate; read and written bytes both count
    cache_bytes: float  # of the last-level cache

    def seconds(self, products: str, work: Work, model: ModelConfig, kv_cache: str, sampling: str) -> Floats:
        """Return the seconds [n] of n steps. Raises `KeyError` naming a quantity or products that were not measured."""
        kind = PRODUCTS[products]
        weights = Weights(kind.layer_bytes, kind.head_bytes, self.cache_bytes)
        return self.steps[products].of(quantities(work, model, weights, kv_cache, sampling))


def nonnegative_least_squares(a: Floats, b: Floats) -> Floats:
    """Return the x [n] >= 0 that makes |a x - b| least, for a [m, n] and b [m] (Lawson and Hanson 1974)."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    x = np.zeros(a.shape[1])
    free = np.zeros(len(x), np.bool_)
    for _ in range(10 * len(x)):
        gradient = a.T @ (b - a @ x)
        gradient[free] = -np.inf
        if gradient.max() <= 1e-10 * len(b):
            break
        free[gradient.argmax()] = True
        while True:
            wanted = np.zeros_like(x)
            wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                break
            # Move x towards `wanted` until the first element reaches 0, and hold that element there from then on.
            shares = np.where(below, x / np.maximum(x - wanted, 1e-300), np.inf)
            x += (wanted - x) * shares.min()
            free &= (shares > shares.min()) & (x > 0)
            x[~free] = 0.0
        x = wanted
    return np.asarray(x / scale, np.float64)
