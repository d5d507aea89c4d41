"""Factored basis: a gradient subspace inside the product of a class subspace and a feature subspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_shapes, unfit
from ..types import compute_dtype
from .explicit import ExplicitTensors

__all__ = ["FactoredTensors"]


class FactoredTensors(NamedTuple):
    """A gradient subspace inside the product of two smaller ones: V_k = class_factors · core_k · feature_factorsᵀ.

    Attributes:
        class_factors: [C, R], the class directions U_p.
        feature_factors: [D̃, Q], the feature directions U_h, with D̃ = D + 1 where `bias`, else D.
        core: [K, R, Q], the vectors in the coordinates of U_p and U_h.
        constants: [K], subtracted to centre the coordinates.
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: whether the space includes the gradient of the bias (h̃ = [h; 1]).

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> basis = ok.FactoredTensors(
        ...     class_factors=torch.tensor([[1.0], [0.0]]),
        ...     feature_factors=torch.tensor([[0.0], [1.0], [0.0]]),
        ...     core=torch.ones(1, 1, 1),
        ...     constants=torch.zeros(1),
        ... )
        >>> p, h = torch.tensor([[0.25, 0.75]]), torch.tensor([[1.0, 3.0]])
        >>> ok.project_gradients(p, h, basis)  # entry (0, 1) of the gradient
        tensor([[0.7500]])
    """

    class_factors: Tensor
    feature_factors: Tensor
    core: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True

    @property
    def kind(self) -> str:
        """Name of the basis kind in `BASES` and in the operators."""
        return "factored"

    @property
    def n_components(self) -> int:
        """Subspace dimension K."""
        return self.constants.shape[0]

    def parts(self) -> list[Tensor | None]:
        """The tensors."""
        return [*self[:4]]

    @classmethod
    def from_parts(
        cls, parts: Sequence[Tensor | None], cotangent: str = "energy", bias: bool = True
    ) -> FactoredTensors:
        """The basis made of these tensors, in the order of `parts`."""
        return cls._make([*parts, cotangent, bias])

    def to(self, dtype: torch.dtype) -> FactoredTensors:
        """A copy with factors and core in another dtype."""
        return FactoredTensors._make([*(part.to(dtype) for part in self[:3]), *self[3:]])

    def check(self) -> tuple[int, int]:
        """Classes C and features D; raises ValueError for incompatible shapes."""
        sizes = check_shapes(self, class_factors="CR", feature_factors="DQ", core="KRQ", constants="K")
        if sizes["D"] == self.bias:
            raise unfit("feature_factors", "[D + 1, Q] with a row for the bias", self.feature_factors)
        return sizes["C"], sizes["D"] - self.bias

    def project(self, a: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates [N, K]: (aᵀ U_p) core_k (U_hᵀ h̃) - constant_k.

        The reduction preserves the rank-one structure of G = a ⊗ h̃: U_pᵀ G U_h = (U_pᵀ a) ⊗ (U_hᵀ h̃). After two small products
        it is an explicit projection with R in place of C and Q in place of D̃: 2·(C·R + D̃·Q + K·R·Q) flops per sample.
        """
        dtype = compute_dtype(a, h, *self[:4])
        feature_factors = self.feature_factors.to(dtype)
        reduced = h.to(dtype) @ feature_factors[: h.shape[1]]
        if self.bias:
            reduced += feature_factors[-1]
        explicit = ExplicitTensors(self.core, self.constants, bias=False)
        return explicit.project(a.to(dtype) @ self.class_factors.to(dtype), reduced)
