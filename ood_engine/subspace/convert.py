"""Conversions to a factored basis, registered for `Basis.to_factored`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import InputError
from .base import Basis, extend, outer_sums, to_factored, whitening_of
from .dual import DualBasis
from .explicit import ExplicitBasis
from .factored import FactoredBasis, leading_factors

__all__ = ["dual_to_factored", "explicit_to_factored"]


@to_factored.register(DualBasis)
def dual_to_factored(basis: DualBasis, tolerance: float) -> FactoredBasis:
    """From the anchors alone: with B = α diag(explained) αᵀ, Σ_k explained_k V_k V_kᵀ = Aᵀ (B ∘ H̃ H̃ᵀ) A."""
    a, h = basis.scaled(*basis.anchors(), power=-1)
    h, coefficients = extend(h, basis.bias), basis.fitted("coefficients").double()
    weights = (coefficients * basis.fitted("explained").double()) @ coefficients.T
    left, right = a.T @ (weights * (h @ h.T)) @ a, h.T @ (weights * (a @ a.T)) @ h
    return _factored(basis, left, right, lambda p, q: outer_sums(a @ p, h @ q, coefficients), tolerance)


@to_factored.register(ExplicitBasis)
def explicit_to_factored(basis: ExplicitBasis, tolerance: float) -> FactoredBasis:
    """From Σ_k explained_k V_k V_kᵀ, one component at a time.

    Raises:
        InputError: a basis with "nfk" normalisation, whose scales do not factorise.
    """
    if basis.normalisation == "nfk":
        raise InputError(
            "normalisation='nfk' scales every entry of a gradient individually, which a product of two spaces cannot"
            " represent: expected 'none' or 'nfk-separable'; fit a FactoredBasis with one of them"
        )
    weights = basis.fitted("explained").double()
    classes, width = basis.mean.shape
    left, right = weights.new_zeros((classes, classes)), weights.new_zeros((width, width))
    for weight, vector in zip(weights, _vectors(basis), strict=True):
        left += weight * vector @ vector.T
        right += weight * vector.T @ vector
    return _factored(basis, left, right, lambda p, q: torch.stack([p.T @ v @ q for v in _vectors(basis)]), tolerance)


def _factored(
    basis: Basis, left: Tensor, right: Tensor, reduce: Callable[[Tensor, Tensor], Tensor], tolerance: float
) -> FactoredBasis:
    """The vectors of `basis`, projected onto a product of two spaces fitted to them.

    Args:
        basis: source of mean, shares and scales.
        left: Σ_k explained_k V_k V_kᵀ [C, C] in the space of normalised gradients.
        right: Σ_k explained_k V_kᵀ V_k [D̃, D̃].
        reduce: (U_p, U_h) → core [K, R, Q] = U_pᵀ V_k U_h.
        tolerance: maximum loss as a share of Σ_k explained_k ‖V_k‖².
    """
    dtype, explained = basis.fitted("constants").dtype, basis.fitted("explained")
    class_factors, feature_factors = leading_factors(left, right, tolerance)
    core = reduce(class_factors, feature_factors)
    kept = explained.double() @ core.square().sum((1, 2))
    factored = FactoredBasis(cotangent=basis.cotangent, bias=basis.bias).to(core.device)
    factored.set_fitted(mean_gradient=basis.mean.to(dtype), explained=explained.clone(), **basis.metric())
    # Projections of orthonormal vectors are only nearly orthonormal.
    factored.set_fitted(whitening=whitening_of(core.flatten(1) @ core.flatten(1).T, dtype))
    factored.set_factors(class_factors, feature_factors, core, kept / left.diagonal().sum(), dtype)
    return factored


def _vectors(basis: ExplicitBasis) -> Iterator[Tensor]:
    """The vectors [C, D̃] in fp64, one by one, in the space of normalised gradients."""
    class_scale, feature_scale = basis.scales()
    return (vector.double() / class_scale[:, None] / feature_scale for vector in basis.fitted("components"))
