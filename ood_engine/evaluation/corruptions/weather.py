"""Weather corruptions: snow, frost and fog, with generated textures in place of photographs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import convolve, motion_kernels, pixel_scale
from .randomness import Randomness

__all__ = ["fog", "frost", "snow"]


def snow(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Whiten the image and add flakes, with motion blur within 45 degrees of the vertical.

    As in the paper, flakes are Gaussian noise on a coarser grid, thresholded. Deviation: a flake has 3 pixels at 224 at every
    severity, and the last thresholds and streak lengths are chosen so that snow increases with the severity.
    """
    mean, threshold = ((0.1, 0.5), (0.2, 0.5), (0.55, 0.9), (0.55, 0.85), (0.55, 0.8))[severity - 1]
    radius, sigma = ((10, 4), (12, 4), (12, 6), (12, 8), (12, 12))[severity - 1]
    kept = (0.80, 0.75, 0.70, 0.65, 0.55)[severity - 1]
    scale = pixel_scale(images)
    batch, _, height, width = images.shape

    flake = max(1.0, 3 * scale)
    noise = random.normal(batch, 1, math.ceil(height / flake), math.ceil(width / flake))
    noise = F.interpolate(mean + 0.3 * noise, size=(height, width), mode="bilinear", align_corners=False)
    flakes = torch.where(noise > threshold, noise, 0).clamp(0, 1)
    angles = random.uniform(batch, low=math.pi / 4, high=3 * math.pi / 4)
    flakes = convolve(flakes, motion_kernels(angles, radius * scale, sigma * scale))

    whitened = torch.maximum(images, 1.5 * images.mean(1, keepdim=True) + 0.5)
    return kept * images + (1 - kept) * whitened + flakes + flakes.flip(2, 3)


def frost(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Overlay ice on the darkened image: `weight * image + ice_weight * ice`.

    Deviation: the ice is a film of uneven thickness with needles in three directions 60 degrees apart, as in crystals (the original
    crops six photographs), and its last two weights are 0.8 and 0.9 instead of 0.7 and 0.75.
    """
    weight, ice_weight = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.8), (0.6, 0.9))[severity - 1]
    return weight * images + ice_weight * _ice(images, random)


def fog(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Blend with haze: `(image + density * haze) / (1 + density)`.

    Deviation: the haze is a sum of octaves of interpolated noise instead of the diamond-square fractal, equally rough at every
    severity; white is 1 instead of the image's maximum; severity 4 has density 2.75 instead of 2.5, the density of severity 3.
    """
    density = (1.5, 2, 2.5, 2.75, 3)[severity - 1]
    return (images + density * _fractal_noise(images, random, decay=1.7)) / (1 + density)


def _ice(images: Tensor, random: Randomness) -> Tensor:
    batch, _, height, width = images.shape
    scale = pixel_scale(images)
    needles = images.new_zeros(batch, 1, height, width)
    first_angle = random.uniform(batch, high=math.pi)
    for branch in range(3):
        seeds = random.uniform(batch, 1, height, width) ** 8
        kernels = motion_kernels(first_angle + branch * math.pi / 3, radius=18 * scale, sigma=9 * scale)
        needles = torch.maximum(needles, _stretched(convolve(seeds, kernels)))
    film = _fractal_noise(images, random, decay=1.6)
    return 0.8 * needles * film.sqrt() + 0.5 * film


def _fractal_noise(images: Tensor, random: Randomness, decay: float) -> Tensor:
    """Noise [N, 1, H, W], stretched to [0, 1] per image; each octave is twice as fine and `decay` times weaker."""
    batch, _, height, width = images.shape
    noise = images.new_zeros(batch, 1, height, width)
    for octave in range(math.ceil(math.log2(max(height, width))) + 1):
        cells = 2**octave + 1
        layer = random.uniform(batch, 1, min(cells, height), min(cells, width), low=-1.0)
        layer = F.interpolate(layer, size=(height, width), mode="bilinear", align_corners=True)
        noise += layer / decay**octave
    return _stretched(noise)


def _stretched(texture: Tensor) -> Tensor:
    low, high = texture.amin((2, 3), keepdim=True), texture.amax((2, 3), keepdim=True)
    return (texture - low) / (high - low)
