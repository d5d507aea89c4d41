"""Bit-packed masks: 32 columns per int32 word, an eighth of the memory of bool."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_mask", "unpack_mask"]

_BITS = 32


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into int32 words: bit j of word w is column 32·w + j; padding bits are 0.

    Args:
        mask: bool [C, D] for a weight mask, [D] for a neuron mask; any strides.

    Returns:
        int32 [C, ceil(D / 32)], or [ceil(D / 32)], contiguous.

    Raises:
        ValueError: not bool, or zero-dimensional.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> ok.pack_mask(torch.tensor([[True, True, False], [False, False, True]])).tolist()
        [[3], [4]]
    """
    if mask.dtype != torch.bool or mask.ndim == 0:
        raise ValueError(f"mask: expected bool [C, D] or [D], got {mask.dtype} {list(mask.shape)}")
    words = mask.new_zeros((*mask.shape[:-1], -(-mask.shape[-1] // _BITS)), dtype=torch.int32)
    for bit in range(min(_BITS, mask.shape[-1])):
        column = mask[..., bit::_BITS]
        words[..., : column.shape[-1]] |= column.to(torch.int32) << bit
    return words


def unpack_mask(packed: Tensor, width: int) -> Tensor:
    """The bool mask packed by `pack_mask`.

    Args:
        packed: int32 [C, ceil(width / 32)], or [ceil(width / 32)].
        width: columns of the mask.

    Returns:
        bool [C, width], or [width].

    Raises:
        ValueError: not int32, or the wrong number of words for `width`.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> ok.unpack_mask(torch.tensor([3], dtype=torch.int32), width=3)
        tensor([ True,  True, False])
    """
    expected = -(-width // _BITS)
    if packed.dtype != torch.int32 or packed.ndim == 0 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed: expected int32 [..., {expected}] for {width} columns, got {packed.dtype} {list(packed.shape)}"
        )
    mask = packed.new_empty((*packed.shape[:-1], width), dtype=torch.bool)
    for bit in range(min(_BITS, width)):
        column = mask[..., bit::_BITS]
        column.copy_((packed >> bit & 1)[..., : column.shape[-1]])
    return mask
