"""Rotary position embedding: angles by position, with the scalings that checkpoints ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only reads a config waits for no torch
    from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """`kind` is default, linear, llama3, yarn or divided; fields that a kind does not use keep their defaults."""

    kind: str
    theta: float
    head_dim: int
    factor: float = 1.0
    original_positions: int = 0  # llama3, yarn: the context that the checkpoint was first trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    divisors: tuple[float, ...] = ()  # divided: of each frequency, as GGUF files hold them

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) float32 [positions, head_dim / 2]."""
        import torch

        angles = torch.outer(torch.arange(positions, dtype=torch.float32), self.frequencies())
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def frequencies(self) -> Tensor:
        """Radians a position, float32 [head_dim / 2]."""
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
        """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)."""
        import torch

        wavelength = 2 * math.pi / inverse
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = (self.original_positions / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / self.factor + smooth * inverse
        stretched = torch.where(wavelength > self.original_positions / low, inverse / self.factor, inverse)
        between = (wavelength >= self.original_positions / high) & (wavelength <= self.original_positions / low)
        return torch.where(between, blended, stretched)

    def _yarn_ramp(self) -> Tensor:
        """0 where a dimension turns fast enough to be kept, 1 where it is interpolated (Peng et al. 2023)."""
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


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The factor on cos and sin where the checkpoint names none."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
