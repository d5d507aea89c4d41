"""A gradient subspace inside a product of two smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_shapes, unfit
from ..types import compute_dtype
from .explicit import project_explicit

__all__ = ["FactoredTensors", "project_factored"]


class FactoredTensors(NamedTuple):
    """A gradient subspace inside a product of two smaller ones: V_k = class_factors · core_k · feature_factorsᵀ.

    Attributes:
        class_factors: [C, R], the directions U_p that the cotangents are reduced to.
        feature_factors: [D̃, Q], the directions U_h that h̃ is reduced to, with D̃ = D + 1 where `bias`, else D.
        core: [K, R, Q], the vectors in the coordinates of the two.
        constants: [K], subtracted so that the coordinates are centred.
        cotangent: which scalar was differentiated, see `ood_kernels.reference.cotangent`.
        bias: whether the gradient of the bias is part of the space (h̃ = [h; 1]).
    """

    class_factors: Tensor
    feature_factors: Tensor
    core: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True

    @property
    def kind(self) -> str:
        """Its name in `BASES` and in the operators."""
        return "factored"

    @property
    def n_components(self) -> int:
        """K."""
        return self.constants.shape[0]

    def parts(self) -> list[Tensor | None]:
        """Its tensors."""
        return [*self[:4]]

    @classmethod
    def from_parts(
        cls, parts: Sequence[Tensor | None], cotangent: str = "energy", bias: bool = True
    ) -> FactoredTensors:
        """The basis with these tensors, see `parts`."""
        return cls._make([*parts, cotangent, bias])

    def to(self, dtype: torch.dtype) -> FactoredTensors:
        """The same with factors and core stored in another dtype."""
        return FactoredTensors._make([*(part.to(dtype) for part in self[:3]), *self[3:]])

    def check(self) -> tuple[int, int]:
        """Classes C and features D; raises ValueError where the tensors do not fit together."""
        sizes = check_shapes(self, class_factors="CR", feature_factors="DQ", core="KRQ", constants="K")
        if sizes["D"] == self.bias:
            raise unfit("feature_factors", "[D + 1, Q], for the bias takes a row", self.feature_factors)
        return sizes["C"], sizes["D"] - self.bias

    def project(self, a: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates [N, K], see `project_factored`."""
        return project_factored(a, h, *self[:4], self.bias)


def project_factored(
    a: Tensor,
    h: Tensor,
    class_factors: Tensor,
    feature_factors: Tensor,
    core: Tensor,
    constants: Tensor,
    bias: bool = True,
) -> Tensor:
    """Centred coordinates [N, K] in a factored basis: (aᵀ U_p) core_k (U_hᵀ h̃) - constant_k.

    The Kronecker form of a last-layer gradient, G = a ⊗ h̃, is kept by U_pᵀ G U_h = (U_pᵀ a) ⊗ (U_hᵀ h̃): after two small
    products it is an explicit projection with R for C and Q for D̃, 2·(C·R + D̃·Q + K·R·Q) flops a sample.
    """
    dtype = compute_dtype(a, h, class_factors, feature_factors, core, constants)
    feature_factors = feature_factors.to(dtype)
    reduced = h.to(dtype) @ feature_factors[: h.shape[1]]
    if bias:
        reduced += feature_factors[-1]
    return project_explicit(a.to(dtype) @ class_factors.to(dtype), reduced, core, constants, bias=False)
