"""Preprocessing of decoded pixels: channels, size, range, mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, OodEngineError

if TYPE_CHECKING:
    from PIL import Image as PillowImage

__all__ = ["Preprocess", "import_pillow", "pillow_pixels"]

SIGNED = " (Hounsfield units, say: map the window of the model to [0, 1])"
LUMA = np.array([19595, 38470, 7471])  # / 65536: ITU-R 601-2 luma, in Pillow's fixed-point integers


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of pixels to the model's input: (x - mean) / std with x in [0, 1], as float32 [C, H, W].

    Attributes:
        size: (height, width) to resize to, with Pillow's antialiased bilinear filter; None: no resizing.
        channels: 3 (RGB) or 1 (gray); images are converted, and an alpha channel is dropped.
        mean: one number for all channels, or one per channel, in units of [0, 1].
        std: likewise; above 0.

    Raises:
        InputError: an invalid value.
    """

    size: tuple[int, int] | None = None
    channels: int = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise InputError(f"preprocess channels = {self.channels!r}: expected 3 (RGB) or 1 (gray)")
        if self.size is not None:
            object.__setattr__(self, "size", _checked_size(self.size))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _checked_numbers(name, getattr(self, name), self.channels))
        if min(self.std) <= 0:
            raise InputError(f"preprocess std = {self.std}: expected numbers above 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`.

        Raises:
            InputError: unknown fields or invalid values.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(fields, Mapping) or not set(fields) <= known:
            raise InputError(f"preprocess {fields!r}: expected a mapping with {', '.join(sorted(known))}")
        return cls(**fields)

    def __call__(self, image: PillowImage.Image | np.ndarray) -> Tensor:
        """Preprocess one image to float32 [C, H, W].

        Args:
            image: a Pillow image of any mode (16-bit gray is divided by 65535; 16-bit colour is reduced to 8 bits by Pillow), or an
                array [H, W] or [H, W, 1 or 3] of uint8, divided by 255, of uint16, divided by 65535, or of floats in [0, 1]. Floats
                outside [0, 1] are accepted only with mean 0 and std 1, as already normalised values.

        Raises:
            InputError: any other input, and NaN or Inf.
        """
        pixels = _bytes_or_floats(image if isinstance(image, np.ndarray) else pillow_pixels(image))
        mean, std = (np.array(values, dtype=np.float32) for values in (self.mean, self.std))
        if pixels.dtype != np.uint8 and (any(self.mean) or set(self.std) != {1.0}):
            _check_unit_range(pixels)
        pixels = _resized(_with_channels(pixels, self.channels), self.size)
        if pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32) / 255
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))


def import_pillow() -> Any:
    """Import the module PIL.Image.

    Raises:
        OodEngineError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise OodEngineError("reading and converting images needs Pillow: pip install 'ood-engine[cli]'") from error
    return Image


def pillow_pixels(image: PillowImage.Image) -> np.ndarray:
    """The pixels of a Pillow image: uint8 [H, W] or [H, W, 3], or float32 [H, W] for 16-bit gray and float images.

    16-bit gray is divided by 65535; float images are returned unchanged.

    Raises:
        InputError: integers beyond 16 bits, whose range is unknown.
        Exception: whatever Pillow raises on damaged data.
    """
    if not isinstance(image, import_pillow().Image):
        raise InputError(f"image is a {type(image).__name__}; expected a Pillow image or a NumPy array")
    if image.mode == "F":
        return np.asarray(image, dtype=np.float32)
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise InputError(
                f"pixels from {deep.min()} to {deep.max()}; expected integers of at most 16 bits, 0 to 65535"
                f"{SIGNED if deep.min() < 0 else ''}"
            )
        return deep.astype(np.float32) / 65535
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode == "P":  # direct conversion to RGB warns if the palette is transparent
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _bytes_or_floats(pixels: np.ndarray) -> np.ndarray:
    """The pixels as uint8 or finite float32 [H, W, 1 or 3]."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise InputError(
            f"image of shape {list(pixels.shape)}; expected [H, W], [H, W, 1] or [H, W, 3], all sizes above 0"
        )
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        return pixels.astype(np.float32) / 65535
    if pixels.dtype.kind != "f":
        raise InputError(f"image of dtype {pixels.dtype}; expected uint8, uint16, or float in [0, 1]")
    with np.errstate(over="ignore"):
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise InputError(f"{int((~np.isfinite(pixels)).sum())} of {pixels.size} pixel values are NaN or Inf")
    return pixels


def _check_unit_range(pixels: np.ndarray) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise InputError(
            f"float pixels from {low:.4g} to {high:.4g}; expected [0, 1] before mean and std are applied "
            "(already normalised values need mean 0 and std 1)"
        )


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if pixels.dtype == np.uint8:
        return ((pixels @ LUMA + 0x8000) >> 16).astype(np.uint8)[:, :, None]
    return (pixels @ (LUMA / 65536).astype(np.float32))[:, :, None]


def _resized(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size is None or pixels.shape[:2] == size:
        return pixels
    image_module, (height, width) = import_pillow(), size

    def resized(plane: np.ndarray) -> np.ndarray:
        image = image_module.fromarray(np.ascontiguousarray(plane))
        return np.asarray(image.resize((width, height), image_module.Resampling.BILINEAR))

    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return resized(pixels)
    return np.stack([resized(pixels[:, :, channel]) for channel in range(pixels.shape[2])], axis=2)


def _checked_size(size: Any) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise InputError(f"preprocess size = {size!r}: expected (height, width) in pixels, or None")
    return (size[0], size[1])


def _checked_numbers(name: str, numbers: Any, channels: int) -> tuple[float, ...]:
    wanted = "1 number" if channels == 1 else f"1 number or {channels}"
    if not isinstance(numbers, (tuple, list)) or len(numbers) not in (1, channels):
        raise InputError(f"preprocess {name} = {numbers!r}: expected {wanted}, in a tuple")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise InputError(f"preprocess {name} = {numbers!r}: expected finite numbers")
    return tuple(float(number) for number in numbers)
