"""Argument validation: shapes, dtypes and precisions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "check_devices", "check_head", "check_precision", "check_shapes", "map_of", "unfit"]

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16", "fp16")
"""Operand precisions of matrix products on a GPU; accumulation is always in fp32."""


def unfit(name: str, expected: str, tensor: Tensor) -> ValueError:
    """The ValueError for a tensor of the wrong shape or dtype: its name, expected, actual."""
    return ValueError(f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)}")


def check_shapes(holder: object, **axes: str) -> dict[str, int]:
    """Axis sizes by letter, consistent across an object's tensors.

    Args:
        holder: object with the tensors as attributes; None is skipped.
        axes: one letter per axis for each attribute, such as coefficients="nK"; only n and K may be 0.

    Raises:
        ValueError: wrong number of axes, or a size inconsistent with an earlier tensor.
    """
    sizes: dict[str, int] = {}
    for name, letters in axes.items():
        tensor = getattr(holder, name)
        if tensor is None:
            continue
        known, fits = dict(sizes), tensor.ndim == len(letters)
        for letter, size in zip(letters, tensor.shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size and (size > 0 or letter in "nK")
        if not fits:
            raise unfit(name, f"[{', '.join([str(known.get(letter, letter)) for letter in letters])}]", tensor)
    return sizes


def check_precision(precision: str) -> None:
    """Raise ValueError unless the precision is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")


def check_devices(first: str, tensor: Tensor, *groups: Mapping[str, object]) -> None:
    """Raise ValueError unless all tensors of the groups, by name, are on the device of `tensor`, whose name is `first`."""
    for group in groups:
        for name, other in group.items():
            if isinstance(other, Tensor) and other.device != tensor.device:
                raise ValueError(
                    f"{name}: expected a tensor on {tensor.device}, where {first} is, got one on {other.device}; move it with .to()"
                )


def map_of(feature_map: Tensor) -> Tensor:
    """The map as a detached view [N, D, H, W]; tokens [N, T, D] become [N, D, T, 1]."""
    if feature_map.ndim not in (3, 4) or 0 in feature_map.shape[1:] or not feature_map.is_floating_point():
        raise unfit("feature_map", "a floating point [N, D, H, W], or tokens [N, T, D]", feature_map)
    feature_map = feature_map.detach()
    return feature_map.transpose(1, 2).unsqueeze(-1) if feature_map.ndim == 3 else feature_map


def check_head(
    width: int, weight: Tensor, bias: Tensor | None, weight_mask: Tensor | None, neuron_mask: Tensor | None
) -> None:
    """Raise ValueError where a head does not fit features [N, width]."""
    fits = weight.ndim == 2 and weight.shape[1] == width and 0 not in weight.shape
    if not (fits and weight.is_floating_point()):
        raise unfit("weight", f"a floating point [C, {width}], C and D > 0", weight)
    classes = weight.shape[0]
    if bias is not None and not (bias.shape == (classes,) and bias.is_floating_point()):
        raise unfit("bias", f"a floating point [{classes}]", bias)
    if weight_mask is not None:
        words = -(-width // 32)
        is_bool = weight_mask.shape == weight.shape and weight_mask.dtype == torch.bool
        is_packed = weight_mask.shape == (classes, words) and weight_mask.dtype == torch.int32
        if not (is_bool or is_packed):
            expected = f"bool {list(weight.shape)}, or int32 [{classes}, {words}] of pack_mask"
            raise unfit("weight_mask", expected, weight_mask)
    if neuron_mask is not None and not (neuron_mask.shape == (width,) and neuron_mask.dtype == torch.bool):
        raise unfit("neuron_mask", f"bool [{width}]", neuron_mask)
