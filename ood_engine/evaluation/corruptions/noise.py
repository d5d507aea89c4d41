"""Noise of the sensor: Gaussian, shot and impulse noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .randomness import Randomness

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise"]


def gaussian_noise(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Add normal noise of the given standard deviation (low light)."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return images + deviation * random.normal(*images.shape)


def shot_noise(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Replace each value by a Poisson count of photons, at the given number of photons for white."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return random.poisson(images * photons) / photons


def impulse_noise(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Set the given share of the values to 0 or 1, half each (salt and pepper)."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    hit = random.uniform(*images.shape) < share
    salt = random.uniform(*images.shape) < 0.5
    return torch.where(hit, salt.to(images.dtype), images)
