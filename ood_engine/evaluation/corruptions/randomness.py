"""Device-independent random draws that leave the global random state untouched."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

__all__ = ["Randomness"]


class Randomness:
    """Draws from a CPU generator seeded by `(seed, name)`, returned in the dtype and on the device of `like`."""

    def __init__(self, seed: int, name: str, like: Tensor) -> None:
        self._like = like
        self._generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{name}/{seed}".encode()))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform on [low, high)."""
        draws = torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return draws.to(self._like) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu").to(self._like)

    def poisson(self, rates: Tensor) -> Tensor:
        """Poisson counts with the given rates, in the shape of `rates`."""
        return torch.poisson(rates.cpu(), generator=self._generator).to(self._like)
