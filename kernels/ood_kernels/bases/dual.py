"""Dual basis: a gradient subspace spanned by anchor samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_shapes
from ..types import compute_dtype

__all__ = ["DualTensors", "linear_part"]


class DualTensors(NamedTuple):
    """A gradient subspace spanned by n anchor samples: V_k = Σ_i coefficients[i, k] · (a_i ⊗ h̃_i).

    Attributes:
        anchor_cotangents: [n, C], the a_i (the softmax of anchor i for the energy cotangent).
        anchor_features: [n, D], the h_i.
        coefficients: [n, K].
        constants: [K], subtracted to centre the coordinates.
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: whether the space includes the gradient of the bias (h̃ = [h; 1]).
        shift: [D] or None, subtracted from h before the Gram product; ideally the anchors' mean feature. A large common mean
            makes Gram entries large and nearly equal, which low precision rounds away.
        linear: [C, K] or None, together with `shift`: the per-class coordinates of a ⊗ [shift; 1], see `linear_part`.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> p, h = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 3.0]])
        >>> basis = ok.DualTensors(p, h, coefficients=torch.ones(1, 1), constants=torch.zeros(1))
        >>> ok.project_gradients(p, h, basis)  # squared norm of the anchor's own gradient
        tensor([[5.5000]])
    """

    anchor_cotangents: Tensor
    anchor_features: Tensor
    coefficients: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True
    shift: Tensor | None = None
    linear: Tensor | None = None

    @property
    def kind(self) -> str:
        """Name of the basis kind in `BASES` and in the operators."""
        return "dual"

    @property
    def n_components(self) -> int:
        """Subspace dimension K."""
        return self.constants.shape[0]

    def parts(self) -> list[Tensor | None]:
        """The tensors, shift and linear last."""
        return [*self[:4], *self[6:]]

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor | None], cotangent: str = "energy", bias: bool = True) -> DualTensors:
        """The basis made of these tensors, in the order of `parts`."""
        return cls._make([*parts[:4], cotangent, bias, *parts[4:]])

    def to(self, dtype: torch.dtype) -> DualTensors:
        """A copy with the large tensors in another dtype; constants, shift and linear are unchanged."""
        return DualTensors._make([*(part.to(dtype) for part in self[:3]), *self[3:]])

    def check(self) -> tuple[int, int]:
        """Classes C and features D; raises ValueError for incompatible shapes."""
        if (self.shift is None) != (self.linear is None):
            raise ValueError("shift and linear of a dual basis belong together: expected both or neither, got one")
        sizes = check_shapes(
            self,
            anchor_cotangents="nC",
            anchor_features="nD",
            coefficients="nK",
            constants="K",
            shift="D",
            linear="CK",
        )
        return sizes["C"], sizes["D"]

    def project(self, a: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates [N, K]: ((A Aₐᵀ) ∘ (H̃ H̃ₐᵀ)) · coefficients - constants.

        The Gram entry of two rank-one gradients is ⟨a ⊗ h̃, a_i ⊗ h̃_i⟩ = (a·a_i)(h̃·h̃_i), so three matrix products replace
        a tensor of [N, C, D]: 2·n·(C + D̃ + K) flops per sample. With a shift μ, G = a ⊗ [h - μ; 0] + a ⊗ [μ; 1], and `a @ linear`
        is the second term's coordinates: the same result from a Gram matrix without the common offset of its entries.
        """
        dtype = compute_dtype(a, h, *self.parts())
        a, h = a.to(dtype), h.to(dtype)
        kernel = (h if self.shift is None else h - self.shift.to(dtype)) @ self.anchor_features.to(dtype).T
        if self.bias and self.shift is None:
            kernel += 1
        kernel *= a @ self.anchor_cotangents.to(dtype).T
        coordinates = kernel @ self.coefficients.to(dtype) - self.constants.to(dtype)
        return coordinates if self.linear is None else coordinates + a @ self.linear.to(dtype)


def linear_part(
    anchor_cotangents: Tensor, anchor_features: Tensor, coefficients: Tensor, shift: Tensor, bias: bool = True
) -> Tensor:
    """Coordinates [C, K] of e_c ⊗ [shift; 1] in a dual basis, Σ_i α_ik a_ic (h_i·shift + 1): its `linear`."""
    inner = anchor_features @ shift + bias
    return (anchor_cotangents * inner[:, None]).T @ coefficients
