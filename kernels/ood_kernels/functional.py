"""The public functions: they check shapes and dtypes, unpack the tuples and call the torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference
from .types import BasisTensors, DualTensors, ExplicitTensors, HasBasisTensors, Head, PoolStatistics, ScoreOutputs

__all__ = ["masked_energy", "pool_nap", "pool_statistics", "project_gradients", "score"]


def _require(condition: bool, name: str, expected: str, tensor: Tensor) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)}")


def _check_feature_map(feature_map: Tensor) -> None:
    is_map = feature_map.ndim == 4 and 0 not in feature_map.shape[1:]
    _require(is_map and feature_map.is_floating_point(), "feature_map", "a floating point [N, D, H, W]", feature_map)


def _check_basis(tensors: BasisTensors) -> tuple[int, int]:
    """Classes C and features D of a basis whose tensors fit together; what does not fit could broadcast silently."""
    constants = tensors.constants
    if isinstance(tensors, ExplicitTensors):
        components = tensors.components
        _require(components.ndim == 3 and 0 not in components.shape[1:], "components", "[K, C, D]", components)
        _require(constants.shape == components.shape[:1], "constants", f"[{components.shape[0]}]", constants)
        return components.shape[1], components.shape[2] - tensors.bias
    cotangents, features, coefficients = tensors[:3]
    anchors = cotangents.shape[0] if cotangents.ndim else 0
    _require(cotangents.ndim == 2 and cotangents.shape[1] > 0, "anchor_cotangents", "[n, C]", cotangents)
    _require(features.ndim == 2 and features.shape[0] == anchors, "anchor_features", f"[{anchors}, D]", features)
    fits = coefficients.ndim == 2 and coefficients.shape[0] == anchors
    _require(fits, "coefficients", f"[{anchors}, K]", coefficients)
    _require(constants.shape == coefficients.shape[1:], "constants", f"[{coefficients.shape[1]}]", constants)
    shift, linear = tensors.shift, tensors.linear
    if (shift is None) != (linear is None):
        raise ValueError("shift and linear of a dual basis belong together: expected both or neither, got one")
    if shift is not None and linear is not None:
        _require(shift.shape == features.shape[1:], "shift", f"[{features.shape[1]}]", shift)
        shape = (cotangents.shape[1], coefficients.shape[1])
        _require(linear.shape == shape, "linear", str(list(shape)), linear)
    return cotangents.shape[1], features.shape[1]


def pool_statistics(feature_map: Tensor, *, rectify: bool = False) -> PoolStatistics:
    """Mean and maximum of every channel over H·W: what NAP and the penultimate features are made of.

    Args:
        feature_map: [N, D, H, W], any strides, fp32, fp16, bf16 or fp64; N may be 0.
        rectify: let NAP see ReLU(feature_map), for maps with negative values; `h` stays the mean of the map as it is.

    Returns:
        PoolStatistics(h, nap_mean, maximum), each [N, D]; fp64 for fp64 input, else fp32. NaN and Inf propagate.

    Raises:
        ValueError: not a floating point [N, D, H, W], or an empty axis other than N.
    """
    _check_feature_map(feature_map)
    return PoolStatistics(*ops.pool_statistics(feature_map.detach(), rectify))


def pool_nap(
    feature_map: Tensor, eps: float = 1.0, *, rectify: bool = False, return_ratios: bool = False
) -> tuple[Tensor, ...]:
    """Pooled features and the NAP score: S = (1/D) Σ_j (max_HW A_j / (mean_HW A_j + eps))² (arXiv 2402.18162).

    Args:
        feature_map: A [N, D, H, W], the post-ReLU map before global pooling; any strides, fp32, fp16, bf16 or fp64.
        eps: the paper's 1.0. It is part of the method, not a numerical guard: it decides where activations are small.
        rectify: NAP of ReLU(A), for signed maps; `h` stays the mean of A itself.
        return_ratios: also return the ratios max / (mean + eps), [N, D].

    Returns:
        (h [N, D], nap [N]) or (h, nap, ratios [N, D]); fp64 for fp64 input, else fp32. Higher = more in-distribution.
        A row with NaN or Inf in its map, or with mean + eps ≤ 0 in some channel, has a NaN score.

    Raises:
        ValueError: not a floating point [N, D, H, W], or an empty axis other than N.
    """
    _check_feature_map(feature_map)
    if not return_ratios:
        h, nap = ops.pool_nap(feature_map.detach(), eps, rectify)
        return h, nap
    statistics = pool_statistics(feature_map, rectify=rectify)
    nap, ratios = reference.nap_from_statistics(statistics.nap_mean, statistics.maximum, eps)
    return statistics.h, nap, ratios


def masked_energy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_mask: Tensor | None = None,
    neuron_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy of a linear head, and of the same head with weights and neurons pruned (OPNP, arXiv 2402.10062).

    lse = log Σ_c exp(z_c) with z = h Wᵀ + b; pruned lse the same with W ∘ weight_mask and h ∘ neuron_mask, bias kept,
    nothing rescaled; p = softmax(z) of the unpruned head.

    Args:
        h: [N, D] penultimate features.
        weight: [C, D].
        bias: [C] or None.
        weight_mask: bool [C, D], True = keep; None keeps all.
        neuron_mask: bool [D], True = keep; None keeps all.

    Returns:
        (lse [N], pruned lse [N], p [N, C]); fp64 where h or weight is fp64, else fp32. Higher = more in-distribution.
        A row with NaN or Inf among its features, even in a pruned neuron, is NaN in all three.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _require(h.ndim == 2 and h.is_floating_point(), "h", "floating point features [N, D]", h)
    width = h.shape[1]
    fits = weight.ndim == 2 and weight.shape[1] == width and 0 not in weight.shape
    _require(fits and weight.is_floating_point(), "weight", f"a floating point [C, {width}], C and D > 0", weight)
    if bias is not None:
        fits = bias.shape == weight.shape[:1] and bias.is_floating_point()
        _require(fits, "bias", f"a floating point [{weight.shape[0]}]", bias)
        bias = bias.detach()
    if weight_mask is not None:
        fits = weight_mask.shape == weight.shape and weight_mask.dtype == torch.bool
        _require(fits, "weight_mask", f"bool {list(weight.shape)}", weight_mask)
    if neuron_mask is not None:
        fits = neuron_mask.shape == weight.shape[1:] and neuron_mask.dtype == torch.bool
        _require(fits, "neuron_mask", f"bool [{width}]", neuron_mask)
    lse, pruned_lse, p = ops.masked_energy(h.detach(), weight.detach(), bias, weight_mask, neuron_mask)
    return lse, pruned_lse, p


def project_gradients(p: Tensor, h: Tensor, basis: BasisTensors | HasBasisTensors) -> Tensor:
    """Coordinates of the last-layer gradient in a low-dimensional subspace (arXiv 2310.17163), in closed form.

    The gradient of a scalar of the logits with respect to weight and bias is G = a ⊗ h̃ with h̃ = [h; 1]; for the
    energy a = p. Returned are the centred coordinates ⟨G - Ḡ, V_k⟩, for a PCA basis those of PCA on the materialised
    gradients up to sign.

    Args:
        p: softmax [N, C] of the unpruned head.
        h: [N, D] penultimate features.
        basis: a fitted basis of `ood_engine.subspace`, or its DualTensors / ExplicitTensors.

    Returns:
        g_low [N, K]; fp64 where p, h, the coefficients or the components are fp64, else fp32. A row whose p or h holds
        NaN or Inf has no finite coordinate.

    Raises:
        ValueError: shapes or dtypes that do not fit the basis, a basis whose tensors do not fit together, an unknown
            cotangent.
    """
    tensors = basis.tensors() if isinstance(basis, HasBasisTensors) else basis
    if not isinstance(tensors, DualTensors | ExplicitTensors):
        expected = "DualTensors, ExplicitTensors or an object with .tensors()"
        raise ValueError(f"basis: expected {expected}, got {type(tensors).__name__}")
    classes, width = _check_basis(tensors)
    _require(p.ndim == 2 and p.shape[1] == classes and p.is_floating_point(), "p", f"softmax [N, {classes}]", p)
    _require(h.shape == (p.shape[0], width) and h.is_floating_point(), "h", f"features [{p.shape[0]}, {width}]", h)
    h = h.detach()
    a = reference.cotangent(p.detach(), tensors.cotangent)
    if isinstance(tensors, DualTensors):
        shift, linear = (None if part is None else part.detach() for part in (tensors.shift, tensors.linear))
        return ops.project_dual(a, h, *(part.detach() for part in tensors[:4]), tensors.bias, shift, linear)
    return ops.project_explicit(a, h, tensors.components.detach(), tensors.constants.detach(), tensors.bias)


def score(
    feature_map: Tensor,
    head: Head,
    basis: BasisTensors | HasBasisTensors | None = None,
    eps: float = 1.0,
    *,
    rectify: bool = False,
) -> ScoreOutputs:
    """NAP, energy, pruned energy and gradient coordinates of one batch from its feature map alone.

    Args:
        feature_map: [N, D, H, W] before global pooling; the head must act on its mean over H·W.
        head: Head(weight [C, D], bias, weight_mask, neuron_mask).
        basis: gradient subspace as for `project_gradients`; None leaves g_low empty.
        eps: of NAP, see `pool_nap`.
        rectify: NAP of ReLU(feature_map), see `pool_nap`.

    Returns:
        ScoreOutputs(h, nap, lse, pruned_lse, p, g_low).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    h, nap = pool_nap(feature_map, eps, rectify=rectify)
    lse, pruned_lse, p = masked_energy(h, *head)
    g_low = h.new_empty((h.shape[0], 0)) if basis is None else project_gradients(p, h, basis)
    return ScoreOutputs(h, nap, lse, pruned_lse, p, g_low)
