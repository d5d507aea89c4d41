"""Blur corruptions: defocus, frosted glass, motion and zoom."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .filters import (
    convolve,
    disk_kernel,
    displace,
    gaussian_blur,
    motion_kernels,
    pixel_grid,
    pixel_scale,
)
from .randomness import Randomness

__all__ = ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"]

_ZOOM_STEPS = 11


def defocus_blur(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Convolve with a disk. Deviation: its rim is smoothed by half a pixel at every severity."""
    radius = (3, 4, 6, 8, 10)[severity - 1] * pixel_scale(images)
    return gaussian_blur(convolve(images, disk_kernel(radius, images)), sigma=0.5)


def glass_blur(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Blur, scatter pixels among their neighbours, and blur again.

    Deviation: a single displacement by uniform offsets replaces the repeated swaps of neighbours in the original. Its reach is the
    original's times the square root of the number of passes, raised where it would not increase with the severity.
    """
    sigma, reach = ((0.7, 1.5), (0.9, 2.2), (1.0, 3.4), (1.1, 4.3), (1.5, 5.7))[severity - 1]
    scale = pixel_scale(images)
    batch, _, height, width = images.shape
    offsets = reach * scale * random.uniform(batch, 2, height, width, low=-1.0)
    return gaussian_blur(displace(gaussian_blur(images, sigma * scale), offsets), sigma * scale)


def motion_blur(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Convolve with a line within 45 degrees of the horizontal. Deviation: the line extends to both sides of the pixel."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    scale = pixel_scale(images)
    angles = random.uniform(len(images), low=-math.pi / 4, high=math.pi / 4)
    return convolve(images, motion_kernels(angles, radius * scale, sigma * scale))


def zoom_blur(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Average the image over increasing zooms about its centre. Deviation: 11 even steps at every severity."""
    largest = (1.10, 1.15, 1.20, 1.25, 1.30)[severity - 1]
    from_centre = pixel_grid(images)
    from_centre = from_centre - from_centre.mean((1, 2), keepdim=True)
    zoomed = torch.zeros_like(images)
    for step in range(_ZOOM_STEPS):
        zoom = 1 + (largest - 1) * step / (_ZOOM_STEPS - 1)
        zoomed += displace(images, from_centre * (1 / zoom - 1))
    return zoomed / _ZOOM_STEPS
