"""What is required of a model, of its images, and of its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, TapError
from ..identity import strided
from .outputs import relative_difference, tolerance_of

__all__ = ["require_batch", "require_finite_weights", "require_steady", "rounding_of"]


def require_batch(images: Any) -> None:
    """Raise InputError unless images are a floating-point batch."""
    if not isinstance(images, Tensor) or images.ndim < 2 or not images.is_floating_point():
        came = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        hint = "; convert as in training, such as images.float() / 255" if isinstance(images, Tensor) else ""
        raise InputError(f"images: expected a floating point batch [N, C, H, W], got {came}{hint}")


def require_finite_weights(model: nn.Module) -> None:
    """Raise TapError if a parameter or buffer is not loaded or not finite."""
    buffers = dict(model.named_buffers())
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        if tensor.is_meta or is_lazy(tensor):
            raise TapError(
                f"the model's {name!r} has no values yet (lazy, or on the meta device): expected loaded weights; run the model"
                " once, or load a checkpoint"
            )
        if not tensor.is_floating_point():
            continue
        values = strided(tensor)[-1]
        if values.element_size() == 1:  # of 8 bits torch knows little but their conversion
            values = values.float()
        bad = ~torch.isfinite(values)
        if name in buffers:
            # Attention masks contain -inf.
            bad &= ~torch.isneginf(values)
        if bad.any():
            raise TapError(
                f"the model's {name!r} has {int(bad.sum())} NaN or infinite values of {tensor.numel()}: expected finite"
                " weights; load an intact checkpoint"
            )


def rounding_of(head: nn.Module, output: Tensor) -> torch.dtype:
    """The dtype to whose precision a head rounded for its `output`; fp16 for TF32, which has as many bits of mantissa."""
    if output.dtype == torch.float32 and output.is_cuda:
        backends: Any = torch.backends  # whose stubs lack cudnn.conv
        products = backends.cuda.matmul if isinstance(head, nn.Linear) else backends.cudnn.conv
        if products.fp32_precision == "tf32":
            return torch.float16
    return output.dtype


def require_steady(
    expected: Tensor, found: Tensor, again: Callable[[], Tensor], modules: Mapping[str, nn.Module], *dtypes: torch.dtype
) -> None:
    """Raise TapError unless logits computed in another batch are what they were.

    Args:
        expected: logits of some images in one batch.
        found: logits of the same images in another batch.
        again: computes the latter once more.
        modules: name → module of the model.
        dtypes: those to whose precision the model rounds.
    """
    tolerance = tolerance_of(expected.dtype, *dtypes)
    changed = relative_difference(found, expected)
    if changed <= tolerance:
        return
    randomly = relative_difference(again(), found)
    if not randomly <= tolerance:
        raise TapError(
            f"two forward passes of the same images differ by up to {randomly:.3g} relative to the size of the logits: expected a"
            " model without randomness in evaluation mode; switch dropout and sampling off, such as by"
            " F.dropout(x, p, self.training)"
        )
    kinds = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    norms = [repr(name) for name, one in modules.items() if isinstance(one, kinds) and one.running_mean is None]
    where = f": {', '.join(norms[:3])} has no running statistics" if norms else ", such as its statistics"
    raise TapError(
        f"the logits of an image change by up to {changed:.3g}, relative to their size, with the rest of its batch{where};"
        " expected a model that treats each image alone; use norms with track_running_stats=True, or of each image"
    )
