"""Noise corruptions: Gaussian, shot and impulse noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .randomness import Randomness

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise"]


def gaussian_noise(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Add Gaussian noise of a given standard deviation (low light)."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return images + deviation * random.normal(*images.shape)


def shot_noise(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Replace each value by a Poisson photon count, at a given number of photons for white."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return random.poisson(images * photons) / photons


def impulse_noise(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Set a given share of the values to 0 or 1 with equal probability (salt and pepper)."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    hit = random.uniform(*images.shape) < share
    salt = random.uniform(*images.shape) < 0.5
    return torch.where(hit, salt.to(images.dtype), images)
