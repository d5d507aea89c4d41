"""Explicit basis: a gradient subspace given by its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_shapes
from ..types import compute_dtype

__all__ = ["ExplicitTensors"]

_WORKSPACE_ELEMENTS = 4 * 2**20
_LONGEST_SUM = 2**17


class ExplicitTensors(NamedTuple):
    """A gradient subspace given by its vectors V_k.

    Attributes:
        components: [K, C, D̃], with D̃ = D + 1 where `bias`, else D.
        constants: [K], subtracted to centre the coordinates.
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: whether the space includes the gradient of the bias (h̃ = [h; 1]).

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> basis = ok.ExplicitTensors(torch.ones(1, 2, 3), constants=torch.zeros(1))
        >>> basis.check()  # C, D
        (2, 2)
    """

    components: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True

    @property
    def kind(self) -> str:
        """Name of the basis kind in `BASES` and in the operators."""
        return "explicit"

    @property
    def n_components(self) -> int:
        """Subspace dimension K."""
        return self.constants.shape[0]

    def parts(self) -> list[Tensor | None]:
        """The tensors."""
        return [*self[:2]]

    @classmethod
    def from_parts(
        cls, parts: Sequence[Tensor | None], cotangent: str = "energy", bias: bool = True
    ) -> ExplicitTensors:
        """The basis made of these tensors, in the order of `parts`."""
        return cls._make([*parts, cotangent, bias])

    def to(self, dtype: torch.dtype) -> ExplicitTensors:
        """A copy with the components in another dtype."""
        return self._replace(components=self.components.to(dtype))

    def check(self) -> tuple[int, int]:
        """Classes C and features D; raises ValueError for incompatible shapes."""
        sizes = check_shapes(self, components="KCD", constants="K")
        return sizes["C"], sizes["D"] - self.bias

    def project(self, a: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates [N, K]: aᵀ V_k h̃ - constant_k, 2·K·C·D̃ flops per sample."""
        components, constants, bias = self.components, self.constants, self.bias
        dtype = compute_dtype(a, h, components, constants)
        a, h = a.to(dtype), h.to(dtype)
        n_components, classes, width = components.shape
        samples = a.shape[0]
        coordinates = a.new_empty((samples, n_components))
        # Chunks of materialised gradients as rows of one product, where they are smaller than the intermediate a @ V; longer sums
        # would lose digits.
        if classes < n_components and classes * width <= _LONGEST_SUM:
            rows = max(1, _WORKSPACE_ELEMENTS // max(1, classes * width))
            vectors = components.to(dtype).flatten(1)
            extended = torch.cat([h, h.new_ones((samples, 1))], 1) if bias else h
            for start in range(0, samples, rows):
                here = slice(start, start + rows)
                gradients = (a[here, :, None] * extended[here, None]).flatten(1)
                torch.mm(gradients, vectors.T, out=coordinates[here])
            return coordinates - constants.to(dtype)
        block = max(1, _WORKSPACE_ELEMENTS // max(1, samples * width))
        for start in range(0, n_components, block):
            left = a @ components[start : start + block].to(dtype)  # [block, N, D̃]
            features = left[..., :-1] if bias else left
            part = (features * h).sum(-1)
            coordinates[:, start : start + block] = (part + left[..., -1] if bias else part).T
        return coordinates - constants.to(dtype)
