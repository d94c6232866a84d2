"""Rotary position embedding: tables of cos and sin by position, with the scalings that checkpoints ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchinfer.models.config_file import ConfigFile

if TYPE_CHECKING:  # reading a config must not import torch, which takes long
    from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The parameters of rotary embedding. `kind` is default, linear, llama3, yarn or divided.

    Fields that a kind does not use keep their defaults.
    """

    kind: str
    theta: float
    head_dim: int
    factor: float = 1.0
    original_positions: int = 0  # llama3, yarn: the context length that the checkpoint was first trained with
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    divisors: tuple[float, ...] = ()  # divided: a divisor for each frequency, from a GGUF file

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), float32 [positions, head_dim / 2] each."""
        import torch

        angles = torch.outer(torch.arange(positions, dtype=torch.float32), self.frequencies())
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def frequencies(self) -> Tensor:
        """Return the frequencies in radians per position, float32 [head_dim / 2]."""
        import torch

        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        inverse = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        if self.kind == "yarn":
            keep = 1.0 - self._yarn_ramp()
            return inverse / self.factor * (1.0 - keep) + inverse * keep
        if self.kind == "divided":
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
            return self.head_dim * math.log(span) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        return ((torch.arange(self.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def read_rope(config: ConfigFile, head_dim: int, positions: int) -> Rope:
    """Read `rope_parameters`, which newer checkpoints have, or `rope_scaling` and `rope_theta`, which older ones have.

    Raises `ValueError` naming what is not supported, or both fields if they say different things.
    """
    given = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)] or ["rope_parameters"]
    found = [_read(config, config.object(key), head_dim, positions) for key in given]
    if found[0] != found[-1]:
        raise ValueError(
            f"config.json has rope_parameters {config.get('rope_parameters')} and rope_scaling "
            f"{config.get('rope_scaling')}, which say different things: keep the one that is meant, with its rope_theta"
        )
    return found[0]


def _read(config: ConfigFile, scaling: ConfigFile, head_dim: int, positions: int) -> Rope:
    """Read one of the two objects; what it leaves out comes from the config."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    known = {
        "default": {"mrope_section", "mrope_interleaved"},  # positions of images; those of text are all alike
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        },
        "divided": {"divisors"},
    }  # fmt: skip
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"config.json: RoPE scaling {kind!r} is not supported; supported are {', '.join(known)}")
    if by_layer := [key for key, value in scaling.fields.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{scaling.name} has RoPE for each type of layer ({', '.join(by_layer)}); supported is one for all layers"
        )
    for key in scaling.fields.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} - known[kind]:
        raise ValueError(f"config.json: RoPE scaling {kind!r} has a field {key!r} that is not known")
    if scaling.fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = (scaling if "rope_theta" in scaling.fields else config).number("rope_theta")
    if kind == "default":
        return Rope("default", theta, head_dim)
    if kind == "divided":
        divisors = scaling.get("divisors")
        if (
            not isinstance(divisors, list)
            or len(divisors) != head_dim // 2
            or not all(isinstance(d, float) and 0 < d < float("inf") for d in divisors)
        ):
            raise ValueError(f"config.json: RoPE's divisors is {divisors!r}; expected {head_dim // 2} positive numbers")
        return Rope("divided", theta, head_dim, divisors=tuple(divisors))
    factor = scaling.number("factor")
    if kind == "linear":
        return Rope("linear", theta, head_dim, factor)
    inside = scaling if config.get("original_max_position_embeddings") is None else config
    original = inside.size("original_max_position_embeddings", positions)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
        return Rope("llama3", theta, head_dim, factor, original, low, high)
    scales = (scaling.number(key, 1.0) if scaling.get(key) else None for key in ("mscale", "mscale_all_dim"))
    attention = scaling.number("attention_factor", yarn_attention_factor(factor, *scales))
    return Rope(
        "yarn",
        theta,
        head_dim,
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=attention,
    )


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return YaRN's default for the factor on cos and sin."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
