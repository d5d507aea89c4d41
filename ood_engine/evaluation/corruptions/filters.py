"""Filters shared by several corruptions: pixel scale, convolution, kernels, displacement."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolve", "disk_kernel", "displace", "gaussian_blur", "motion_kernels", "pixel_grid", "pixel_scale"]

_REFERENCE_SIDE = 224
_SMALLEST_SCALED_SIDE = 32


def pixel_scale(images: Tensor) -> float:
    """Number of pixels of these images equivalent to one pixel at a side of 224."""
    return max(min(images.shape[-2:]), _SMALLEST_SCALED_SIDE) / _REFERENCE_SIDE


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve image n [C, H, W] with kernel n [h, w] (odd sides, normalised to sum 1); a single kernel is broadcast."""
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    kernels = kernels.expand(len(images), -1, -1).unsqueeze(1)
    rows, columns = kernels.shape[-2] // 2, kernels.shape[-1] // 2
    padded = F.pad(images, (columns, columns, rows, rows), mode="replicate")
    return F.conv2d(padded.transpose(0, 1), kernels, groups=len(images)).transpose(0, 1)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian filter, `sigma` in pixels, truncated at 3 sigma."""
    radius = max(1, math.ceil(3 * sigma))
    positions = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (positions / sigma) ** 2)
    return convolve(convolve(images, kernel.view(1, 1, -1)), kernel.view(1, -1, 1))


def disk_kernel(radius: float, like: Tensor) -> Tensor:
    """Disk [1, k, k] of `radius` pixels with an antialiased rim."""
    x, y = _centred_square(math.ceil(radius + 0.5), like)
    return (radius + 0.5 - torch.hypot(x, y)).clamp(0, 1).unsqueeze(0)


def motion_kernels(angles: Tensor, radius: float, sigma: float) -> Tensor:
    """Lines [N, k, k] at `angles` [N] (radians), weighted by a Gaussian of `sigma` and truncated at `radius` pixels."""
    x, y = _centred_square(max(1, math.ceil(radius)), angles)
    cosine, sine = angles.cos().view(-1, 1, 1), angles.sin().view(-1, 1, 1)
    along, across = x * cosine + y * sine, y * cosine - x * sine
    inside = along.abs() <= max(1.0, radius)
    return torch.exp(-0.5 * (along / sigma) ** 2) * (1 - across.abs()).clamp_min(0) * inside


def _centred_square(reach: int, like: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    y, x = torch.meshgrid(positions, positions, indexing="ij")
    return x, y


def pixel_grid(images: Tensor) -> Tensor:
    """Pixel coordinates (x, y), [2, H, W]."""
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=images.dtype, device=images.device)
    y = torch.arange(height, dtype=images.dtype, device=images.device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def displace(images: Tensor, offsets: Tensor) -> Tensor:
    """Sample each pixel at its position plus `offsets` [1 or N, 2, H, W] or [2, H, W] = (x, y) in pixels.

    Bilinear interpolation, reflected at the border.
    """
    size = images.new_tensor([images.shape[-1], images.shape[-2]]).view(2, 1, 1)
    places = (2 * (pixel_grid(images) + offsets) + 1) / size - 1
    places = places.expand(len(images), -1, -1, -1).permute(0, 2, 3, 1)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="reflection", align_corners=False)
