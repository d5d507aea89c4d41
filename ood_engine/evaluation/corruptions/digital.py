"""Digital corruptions: brightness, contrast, elastic deformation, pixelation and JPEG compression."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import displace, gaussian_blur, pixel_scale
from .randomness import Randomness

__all__ = ["brightness", "contrast", "elastic_transform", "jpeg_compression", "pixelate"]

_BLOCK = 8
# Table K.1 of ITU-T T.81: luminance quantisation at quality 50.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def brightness(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Increase the HSV value (the largest channel), keeping hue and saturation; gray images are shifted."""
    shift = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = images.amax(1, keepdim=True)
    raised = (value + shift).clamp_max(1)
    return torch.where(value > 0, images / value * raised, raised)


def contrast(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Reduce the deviation from each channel's mean to a given share."""
    share = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = images.mean((2, 3), keepdim=True)
    return mean + share * (images - mean)


def elastic_transform(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Displace the pixels by a smooth random field.

    Deviation: no affine part, and the same smoothness (a Gaussian of 8 pixels at 224) at every severity, so that the root mean
    square displacement increases; the original passes from large affine to small rough deformations.
    """
    displacement = (2, 3, 4, 5, 6)[severity - 1] * pixel_scale(images)
    batch, _, height, width = images.shape
    field = gaussian_blur(random.normal(batch, 2, height, width), sigma=8 * pixel_scale(images))
    return displace(images, displacement * field / field.square().mean((1, 2, 3), keepdim=True).sqrt())


def pixelate(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Downsample by box averages to a given share of the side, and upsample by nearest neighbour.

    The number of boxes is an integer, so on very small images two severities can coincide: 8 pixels give 5, 4, 3, 2, 2.
    """
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = images.shape[-2:]
    rows = _box_averages(round(share * height), height, images)
    columns = _box_averages(round(share * width), width, images)
    return F.interpolate(rows @ images @ columns.T, size=(height, width), mode="nearest-exact")


def _box_averages(boxes: int, pixels: int, like: Tensor) -> Tensor:
    """Matrix [boxes, pixels] averaging a line over boxes of equal length; a pixel cut by an edge counts proportionally."""
    edges = torch.linspace(0, pixels, boxes + 1, dtype=like.dtype, device=like.device).unsqueeze(1)
    starts = torch.arange(pixels, dtype=like.dtype, device=like.device)
    covered = torch.minimum(edges[1:], starts + 1) - torch.maximum(edges[:-1], starts)
    return covered.clamp_min(0) * boxes / pixels


def jpeg_compression(images: Tensor, severity: int, random: Randomness) -> Tensor:
    """Quantise the cosine transform of each 8x8 block, as baseline JPEG (ITU-T T.81) does at a given quality.

    Deviation: every channel is treated as luminance, without colour transform or chroma subsampling; the image is padded to whole
    blocks by replicating its border; the result is not rounded to 8 bits.
    """
    quality = (25, 18, 15, 10, 7)[severity - 1]
    steps = (images.new_tensor(_LUMINANCE) * (5000 // quality) + 50).div(100).floor().clamp(1, 255)
    transform = _cosine_transform(images)
    batch, channels, height, width = images.shape
    padded = F.pad(images, (0, -width % _BLOCK, 0, -height % _BLOCK), mode="replicate")
    blocks = (255 * padded - 128).unflatten(3, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK)).transpose(3, 4)
    coefficients = transform @ blocks @ transform.T
    quantised = (coefficients / steps).round() * steps
    blocks = (transform.T @ quantised @ transform + 128) / 255
    return blocks.transpose(3, 4).reshape(batch, channels, *padded.shape[2:])[..., :height, :width]


def _cosine_transform(like: Tensor) -> Tensor:
    """The orthonormal DCT-II matrix [8, 8]."""
    position = torch.arange(_BLOCK, dtype=like.dtype, device=like.device)
    matrix = torch.cos(math.pi / _BLOCK * (position + 0.5) * position.unsqueeze(1)) * math.sqrt(2 / _BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix
