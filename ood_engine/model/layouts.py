"""Layouts of feature maps: how a module's output is read as [N, D, H, W]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["LAYOUTS", "layouts_of", "puts_channels_first"]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NHWC": lambda output: output.permute(0, 3, 1, 2),
    "NCHW": lambda output: output,
    "NTD": lambda output: output.transpose(1, 2).unsqueeze(3),
    "NDL": lambda output: output.unsqueeze(3),
    "NTHWD": lambda output: output.permute(0, 4, 1, 2, 3).flatten(3),
    "NDTHW": lambda output: output.flatten(3),
}
"""Module output → [N, D, H, W], a view: images, tokens and sequences of length L, and volumes or video of T frames."""

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.TransformerEncoderLayer)


def layouts_of(output: Tensor) -> list[str]:
    """The layouts with more than one channel and more than one position, those with the channels first at the end."""
    found = []
    for name, read in LAYOUTS.items():
        if len(name) == output.ndim:
            channels, *positions = read(output).shape[1:]
            # A single channel is a pooled [N, D, 1, 1] in the other layout.
            if channels > 1 and torch.Size(positions).numel() > 1:
                found.append(name)
    return found


def puts_channels_first(module: nn.Module) -> bool | None:
    """Whether a module's output has its channels in the second dimension, or in the last; None if its kind does not say."""
    if isinstance(module, _CHANNELS_FIRST):
        return True
    # A subclass may permute, as the LayerNorm2d of many models does.
    return False if type(module) in _CHANNELS_LAST else None
