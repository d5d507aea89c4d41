"""What the public functions require of their arguments: shapes, dtypes, and tensors of a basis that fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import BasisTensors, DualTensors, ExplicitTensors, FactoredTensors, HasBasisTensors

__all__ = ["PRECISIONS", "basis_tensors", "check_basis", "check_head", "check_precision", "map_of", "require"]

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16", "fp16")
"""What a GPU kernel rounds the operands of its matrix products to; sums are fp32 in all of them."""


def require(condition: bool, name: str, expected: str, tensor: Tensor) -> None:
    """Raise ValueError naming the tensor, what was expected and what came."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)}")


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that no kernel knows."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")


def map_of(feature_map: Tensor) -> Tensor:
    """The map as [N, D, H, W], a view: tokens [N, T, D] become [N, D, T, 1]."""
    is_map = feature_map.ndim in (3, 4) and 0 not in feature_map.shape[1:] and feature_map.is_floating_point()
    require(is_map, "feature_map", "a floating point [N, D, H, W], or tokens [N, T, D]", feature_map)
    feature_map = feature_map.detach()
    return feature_map.transpose(1, 2).unsqueeze(-1) if feature_map.ndim == 3 else feature_map


def check_head(
    width: int, weight: Tensor, bias: Tensor | None, weight_mask: Tensor | None, neuron_mask: Tensor | None
) -> None:
    """Raise ValueError where the parts of a head do not fit features [N, width]."""
    fits = weight.ndim == 2 and weight.shape[1] == width and 0 not in weight.shape
    require(fits and weight.is_floating_point(), "weight", f"a floating point [C, {width}], C and D > 0", weight)
    classes = weight.shape[0]
    if bias is not None:
        fits = bias.shape == (classes,) and bias.is_floating_point()
        require(fits, "bias", f"a floating point [{classes}]", bias)
    if weight_mask is not None:
        words = -(-width // 32)
        is_bool = weight_mask.shape == weight.shape and weight_mask.dtype == torch.bool
        is_packed = weight_mask.shape == (classes, words) and weight_mask.dtype == torch.int32
        expected = f"bool {list(weight.shape)}, or int32 [{classes}, {words}] of pack_mask"
        require(is_bool or is_packed, "weight_mask", expected, weight_mask)
    if neuron_mask is not None:
        fits = neuron_mask.shape == (width,) and neuron_mask.dtype == torch.bool
        require(fits, "neuron_mask", f"bool [{width}]", neuron_mask)


def basis_tensors(basis: BasisTensors | HasBasisTensors) -> BasisTensors:
    """The tensors of a basis, given as they are or as something fitted that holds them."""
    tensors = basis.tensors() if isinstance(basis, HasBasisTensors) else basis
    if not isinstance(tensors, DualTensors | ExplicitTensors | FactoredTensors):
        expected = "DualTensors, ExplicitTensors, FactoredTensors or an object with .tensors()"
        raise ValueError(f"basis: expected {expected}, got {type(tensors).__name__}")
    return tensors


def check_basis(tensors: BasisTensors) -> tuple[int, int]:
    """Classes C and features D of a basis whose tensors fit together; what does not fit could broadcast silently."""
    if isinstance(tensors, ExplicitTensors):
        return _check_explicit(tensors)
    if isinstance(tensors, FactoredTensors):
        return _check_factored(tensors)
    return _check_dual(tensors)


def _check_explicit(tensors: ExplicitTensors) -> tuple[int, int]:
    components, constants = tensors.components, tensors.constants
    require(components.ndim == 3 and 0 not in components.shape[1:], "components", "[K, C, D]", components)
    require(constants.shape == components.shape[:1], "constants", f"[{components.shape[0]}]", constants)
    return components.shape[1], components.shape[2] - tensors.bias


def _check_factored(tensors: FactoredTensors) -> tuple[int, int]:
    classes, features, core, constants = tensors[:4]
    require(classes.ndim == 2 and 0 not in classes.shape, "class_factors", "[C, R]", classes)
    fits = features.ndim == 2 and features.shape[0] > tensors.bias and features.shape[1] > 0
    require(fits, "feature_factors", "[D, Q], with the bias [D + 1, Q]", features)
    ranks = (classes.shape[1], features.shape[1])
    require(core.ndim == 3 and core.shape[1:] == ranks, "core", f"[K, {ranks[0]}, {ranks[1]}]", core)
    require(constants.shape == core.shape[:1], "constants", f"[{core.shape[0]}]", constants)
    return classes.shape[0], features.shape[0] - tensors.bias


def _check_dual(tensors: DualTensors) -> tuple[int, int]:
    cotangents, features, coefficients, constants = tensors[:4]
    anchors = cotangents.shape[0] if cotangents.ndim else 0
    require(cotangents.ndim == 2 and cotangents.shape[1] > 0, "anchor_cotangents", "[n, C]", cotangents)
    require(features.ndim == 2 and features.shape[0] == anchors, "anchor_features", f"[{anchors}, D]", features)
    fits = coefficients.ndim == 2 and coefficients.shape[0] == anchors
    require(fits, "coefficients", f"[{anchors}, K]", coefficients)
    require(constants.shape == coefficients.shape[1:], "constants", f"[{coefficients.shape[1]}]", constants)
    shift, linear = tensors.shift, tensors.linear
    if (shift is None) != (linear is None):
        raise ValueError("shift and linear of a dual basis belong together: expected both or neither, got one")
    if shift is not None and linear is not None:
        require(shift.shape == features.shape[1:], "shift", f"[{features.shape[1]}]", shift)
        shape = (cotangents.shape[1], coefficients.shape[1])
        require(linear.shape == shape, "linear", str(list(shape)), linear)
    return cotangents.shape[1], features.shape[1]
