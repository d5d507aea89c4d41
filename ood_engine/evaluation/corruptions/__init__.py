"""The 15 common image corruptions of Hendrycks and Dietterich (arXiv 1903.12261) in plain torch.

They serve as pseudo-OOD data derived from in-distribution images. The originals require OpenCV, 8-bit RGB and at least 32
pixels; these accept float images in [0, 1] with any number of channels, of 4x4 pixels or more, on any device.

The strengths of each severity are those of ImageNet-C, except where a function's docstring says otherwise. Deviations shared by
all corruptions:

- Constants in pixels refer to a side of 224 pixels and scale with the shorter side, taken as at least 32 pixels: a blur of a
  tenth of a pixel would leave an 8x8 image unchanged.
- Blurs replicate the border; gray is the mean of the channels.
- No rounding to 8 bits.
- Each `(seed, name)` draws the same noise at every severity, so that severities differ in strength only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import InputError
from .blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from .digital import (
    brightness,
    contrast,
    elastic_transform,
    jpeg_compression,
    pixelate,
)
from .noise import gaussian_noise, impulse_noise, shot_noise
from .randomness import Randomness
from .weather import fog, frost, snow

__all__ = ["CORRUPTIONS", "corrupt"]

_FUNCTIONS: dict[str, Callable[[Tensor, int, Randomness], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}
CORRUPTIONS: tuple[str, ...] = tuple(_FUNCTIONS)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALLEST_SIDE = 4


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int = 3, *, seed: int = 0) -> Tensor:
    """Apply one corruption of `CORRUPTIONS` to a batch of images.

    Deterministic in its arguments: noise is drawn on the CPU by a dedicated generator for every device, and the global random
    state is neither read nor advanced. Each image of a batch receives its own noise, so the result depends on the position in
    the batch. No gradient is recorded.

    Args:
        images: [N, C, H, W] with values in [0, 1]; N >= 0, C >= 1, H and W >= 4; fp16, bf16, fp32 or fp64; any device.
        name: one of `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        seed: any integer.

    Returns:
        A new tensor [N, C, H, W] with values in [0, 1], of the dtype and on the device of `images`. fp16 and bf16 are computed
        in fp32.

    Raises:
        InputError: images of invalid type, shape or range, or not finite; an unknown name or severity.

    Example:
        >>> import torch
        >>> gray = torch.full((2, 3, 32, 32), 0.5)
        >>> [round(float(corrupt(gray, "brightness", severity).mean()), 2) for severity in (1, 3, 5)]
        [0.6, 0.8, 1.0]
        >>> foggy = corrupt(gray, "fog", seed=7)
        >>> foggy.shape, torch.equal(foggy, corrupt(gray, "fog", seed=7))
        (torch.Size([2, 3, 32, 32]), True)
    """
    _check_arguments(name, severity, seed)
    _check_images(images)
    if len(images) == 0:
        return images.clone()
    working = images.to(torch.promote_types(images.dtype, torch.float32))
    corrupted = _FUNCTIONS[name](working, severity, Randomness(seed, name, working))
    return corrupted.clamp(0, 1).to(images.dtype).contiguous()


def _check_arguments(name: str, severity: int, seed: int) -> None:
    if name not in CORRUPTIONS:
        raise InputError(f"corruption {name!r} is unknown; choose one of: {', '.join(CORRUPTIONS)}")
    if not _is_integer(severity) or not 1 <= severity <= 5:
        raise InputError(f"severity must be an integer from 1 (weak) to 5 (strong), not {severity!r}")
    if not _is_integer(seed):
        raise InputError(f"seed must be an integer, not {seed!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch tensor [N, C, H, W], not {type(images).__name__}; convert them first")
    shape = list(images.shape)
    if images.ndim != 4:
        raise InputError(f"images must have shape [N, C, H, W], not {shape}; add the batch or channel dimension")
    if shape[1] < 1 or min(shape[2:]) < _SMALLEST_SIDE:
        raise InputError(f"images need at least 1 channel and {_SMALLEST_SIDE}x{_SMALLEST_SIDE} pixels, not {shape}")
    if images.dtype not in _DTYPES:
        raise InputError(
            f"images must be fp16, bf16, fp32 or fp64 with values in [0, 1], not {images.dtype}; "
            "for 8-bit images pass images.float() / 255"
        )
    bad = int((~torch.isfinite(images)).sum())
    if bad:
        raise InputError(f"images hold {bad} values that are NaN or infinite; leave those images out")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise InputError(
            f"images must lie in [0, 1], not in [{images.min().item():.4g}, {images.max().item():.4g}]; "
            "corrupt them before normalisation"
        )
