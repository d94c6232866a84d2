"""Rotary position embedding: tables of cos and sin by position, with the scalings that checkpoints ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batchinfer.models.config_file import ConfigFile

if TYPE_CHECKING:  # reading a config must not import torch, which takes long
    from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The parameters of rotary embedding. `kind` is one of those that `_read` knows, or none.

    Fields that a kind does not use keep their defaults. Number i of a head is paired with number head_dim / 2 + i, as
    in Llama. Checkpoints that rotate a part of each head, or pair neighbours, are reordered when they are loaded
    (`order`); what is not rotated is paired at frequency 0. Proportional embedding (Gemma 4) has such pairs in
    checkpoints too, and its frequencies are those of a head that is rotated as a whole.
    """

    kind: str
    theta: float
    head_dim: int
    rotated: int  # numbers of a head that are rotated: the first ones in a checkpoint
    factor: float = 1.0
    original_positions: int = 0  # llama3, yarn, longrope: the context length that the checkpoint was first trained with
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    divisors: tuple[float, ...] = ()  # divided, from a GGUF file, and longrope: a divisor for each frequency
    long_divisors: tuple[float, ...] = ()  # longrope: those of sequences longer than `original_positions`

    def order(self, interleaved: bool) -> tuple[int, ...] | None:
        """Return, for each number of a head, its place in the checkpoint's head; None if that is the same.

        `interleaved` says that the checkpoint pairs neighbours among the rotated numbers, not halves.
        """
        if self.kind == "proportional":
            return None
        half = self.rotated // 2
        left = [2 * i if interleaved else i for i in range(half)]
        right = [2 * i + 1 if interleaved else half + i for i in range(half)]
        rest = list(range(self.rotated, self.head_dim))
        middle = self.head_dim // 2 - half
        order = (*left, *rest[:middle], *right, *rest[middle:])
        return None if order == tuple(range(self.head_dim)) else order

    def within(self, positions: int) -> Rope:
        """Return the embedding for sequences of at most so many positions, which longrope has two of."""
        if self.kind == "longrope" and positions > self.original_positions:
            return replace(self, divisors=self.long_divisors)
        return self

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), float32 [positions, head_dim / 2] each."""
        import torch

        angles = torch.outer(torch.arange(positions, dtype=torch.float32), self.frequencies())
        factor = torch.ones(self.head_dim // 2)
        factor[: self.rotated // 2] = self.attention_factor
        return angles.cos() * factor, angles.sin() * factor

    def frequencies(self) -> Tensor:
        """Return the frequencies in radians per position, float32 [head_dim / 2]."""
        import torch

        found = torch.zeros(self.head_dim // 2)
        found[: self.rotated // 2] = self._rotated_frequencies()
        return found

    def _rotated_frequencies(self) -> Tensor:
        import torch

        if self.kind == "none":
            return torch.zeros(self.rotated // 2)
        of = self.head_dim if self.kind == "proportional" else self.rotated
        exponent = torch.arange(0, self.rotated, 2, dtype=torch.int64).float() / of
        inverse = 1.0 / self.theta**exponent
        if self.kind in ("linear", "proportional"):
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        if self.kind == "yarn":
            keep = 1.0 - self._yarn_ramp()
            return inverse / self.factor * (1.0 - keep) + inverse * keep
        if self.kind in ("divided", "longrope"):
            return inverse / torch.tensor(self.divisors)
        return inverse

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Scale the frequencies as Llama 3.1 does: stretch long wavelengths, keep short ones, blend those between."""
        import torch

        wavelength = 2 * math.pi / inverse
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = (self.original_positions / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / self.factor + smooth * inverse
        stretched = torch.where(wavelength > self.original_positions / low, inverse / self.factor, inverse)
        between = (wavelength >= self.original_positions / high) & (wavelength <= self.original_positions / low)
        return torch.where(between, blended, stretched)

    def _yarn_ramp(self) -> Tensor:
        """Return YaRN's ramp (Peng et al. 2023): 0 for frequencies high enough to be kept, 1 for interpolated ones."""
        import torch

        def dimension(turns: float) -> float:
            span = self.original_positions / (turns * 2 * math.pi)
            return self.rotated * math.log(span) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotated - 1)
        if low == high:
            high += 0.001
        return ((torch.arange(self.rotated // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class RopeFields:
    """What a family writes into `config.json` about rotary embedding, beyond what all families do."""

    layer_type: str | None = None  # the type of layers whose object is read, where each type has one
    theta: float | None = None  # default of that type; None: the field of the config
    partial: bool = False  # whether a part of each head may be rotated
    names: tuple[tuple[str, str], ...] = ()  # (name in the file, name here) of kinds
    others: frozenset[str] = frozenset()  # fields that the family reads itself


def read_rope(config: ConfigFile, head_dim: int, fields: RopeFields = RopeFields()) -> Rope:
    """Read `rope_parameters`, which newer checkpoints have, or `rope_scaling` and `rope_theta`, which older ones have.

    Raises `ValueError` naming what is not supported, or both fields if they say different things.
    """
    given = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)] or ["rope_parameters"]
    found = [_read(config, _of_type(config.object(key), fields.layer_type), head_dim, fields) for key in given]
    if found[0] != found[-1]:
        raise ValueError(
            f"config.json has rope_parameters {config.get('rope_parameters')} and rope_scaling "
            f"{config.get('rope_scaling')}, which say different things: keep the one that is meant, with its rope_theta"
        )
    return found[0]


def no_rope(head_dim: int) -> Rope:
    """Return the embedding that rotates nothing."""
    return Rope("none", 1.0, head_dim, head_dim)


def _of_type(scaling: ConfigFile, layer_type: str | None) -> ConfigFile:
    by_layer = [key for key, value in scaling.fields.items() if isinstance(value, dict)]
    if not by_layer:
        return scaling
    if layer_type not in by_layer:
        raise ValueError(
            f"{scaling.name} has RoPE for each type of layer ({', '.join(by_layer)}); "
            + ("supported is one for all layers" if layer_type is None else f"there is none for {layer_type}")
        )
    return scaling.object(layer_type)


def _read(config: ConfigFile, scaling: ConfigFile, head_dim: int, fields: RopeFields) -> Rope:
    """Read one of the two objects; what it leaves out comes from the config."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"{scaling.name}: rope_type is {kind!r}; it must be a string")
    kind = dict(fields.names).get(kind, kind)
    known = {
        "default": {"mrope_section", "mrope_interleaved"},  # positions of images; those of text are all alike
        "linear": {"factor"},
        "proportional": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        },
        "longrope": {
            "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
        },
        "divided": {"divisors"},
    }  # fmt: skip
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"config.json: RoPE scaling {kind!r} is not supported; supported are {', '.join(known)}")
    everywhere = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | fields.others
    for key in scaling.fields.keys() - everywhere - known[kind]:
        raise ValueError(f"config.json: RoPE scaling {kind!r} has a field {key!r} that is not known")
    rotated = _rotated(config, scaling, head_dim, fields.partial or kind == "proportional")
    inside = scaling if "rope_theta" in scaling.fields or fields.theta is not None else config
    theta = inside.number("rope_theta", fields.theta)
    if kind == "default":
        return Rope("default", theta, head_dim, rotated)
    if kind == "proportional":
        return Rope("proportional", theta, head_dim, rotated, scaling.number("factor", 1.0))
    if kind == "divided":
        return Rope("divided", theta, head_dim, rotated, divisors=_divisors(scaling, "divisors", rotated))
    positions = config.size("max_position_embeddings")
    inside = scaling if config.get("original_max_position_embeddings") is None else config
    original = inside.size("original_max_position_embeddings", positions)
    if kind == "longrope":
        factor = scaling.number("factor", positions / original)
        return Rope(
            "longrope",
            theta,
            head_dim,
            rotated,
            factor,
            original,
            attention_factor=scaling.number("attention_factor", _longrope_attention_factor(factor, original)),
            divisors=_divisors(scaling, "short_factor", rotated),
            long_divisors=_divisors(scaling, "long_factor", rotated),
        )
    factor = scaling.number("factor")
    if kind == "linear":
        return Rope("linear", theta, head_dim, rotated, factor)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
        return Rope("llama3", theta, head_dim, rotated, factor, original, low, high)
    scales = (scaling.number(key, 1.0) if scaling.get(key) else None for key in ("mscale", "mscale_all_dim"))
    attention = scaling.number("attention_factor", yarn_attention_factor(factor, *scales))
    return Rope(
        "yarn",
        theta,
        head_dim,
        rotated,
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=attention,
    )


def _rotated(config: ConfigFile, scaling: ConfigFile, head_dim: int, partial: bool) -> int:
    """Return how many numbers of a head are rotated."""
    inside = scaling if scaling.get("partial_rotary_factor") is not None else config
    part = inside.number("partial_rotary_factor", 1.0)
    rotated = int(head_dim * part)
    if part != 1.0 and not partial:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported for this model_type")
    if not 0 < rotated <= head_dim or rotated % 2:
        raise ValueError(
            f"config.json: partial_rotary_factor {part} of head_dim {head_dim} are {rotated} numbers; it must be an "
            f"even number from 2 to {head_dim}"
        )
    return rotated


def _divisors(scaling: ConfigFile, key: str, rotated: int) -> tuple[float, ...]:
    found = scaling.get(key)
    if (
        not isinstance(found, list)
        or len(found) != rotated // 2
        or not all(isinstance(d, int | float) and not isinstance(d, bool) and 0 < d < float("inf") for d in found)
    ):
        raise ValueError(f"config.json: RoPE's {key} is {found!r}; expected {rotated // 2} positive numbers")
    return tuple(map(float, found))


def _longrope_attention_factor(factor: float, original: int) -> float:
    """Return the default of LongRoPE (Ding et al. 2024) for the factor on cos and sin."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return YaRN's default for the factor on cos and sin."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
