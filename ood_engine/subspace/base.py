"""What every basis of gradient space can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..errors import InputError
from ..fitted import FittedModule

if TYPE_CHECKING:
    from .explicit import ExplicitBasis
    from .plan import Plan

__all__ = ["Basis", "extend"]


class Basis(FittedModule):
    """What all forms share: projection, norms, size."""

    def __init__(self, *fitted: str, cotangent: str = "energy", bias: bool = True) -> None:
        super().__init__(*fitted, "constants", "explained")
        if cotangent not in reference.COTANGENTS:
            raise InputError(f"cotangent={cotangent!r}: expected one of {', '.join(reference.COTANGENTS)}")
        self.cotangent = cotangent
        self.bias = bias

    constants: Tensor
    explained: Tensor
    """[K] share of the anchors' total gradient variance along each component."""

    @property
    def n_components(self) -> int:
        """K."""
        return self.fitted("constants").shape[0]

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient Ḡ."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Bytes that a projection reads beside its inputs."""
        return sum(part.nbytes for part in self.tensors().parts() if part is not None)

    def plan(self, samples: int = 64) -> Plan:
        """What this form and the others of the same subspace cost for a batch, see `ood_engine.subspace.plan`."""
        from .plan import plan_of

        return plan_of(self, samples=samples)

    def tensors(self) -> ok.BasisTensors:
        """The tensors that `ood_kernels.project_gradients` takes."""
        raise NotImplementedError

    def project(self, p: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates g_low [N, K] of the gradients at softmax p [N, C] and features h [N, D]."""
        return ok.project_gradients(p, h, self)

    def to_explicit(self) -> ExplicitBasis:
        """The same subspace as its vectors [K, C, D̃]."""
        raise NotImplementedError

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64: the direction in gradient space with these coordinates."""
        raise NotImplementedError

    def flops(self, samples: int) -> int:
        """Floating point operations of projecting `samples` gradients."""
        raise NotImplementedError

    def centred_norm(self, p: Tensor, h: Tensor) -> Tensor:
        """‖G - Ḡ‖ [N] in fp64: ‖a‖²‖h̃‖² - 2 aᵀ Ḡ h̃ + ‖Ḡ‖², a difference of large numbers."""
        return self._norms(p, h)[0].sqrt()

    def residual_norm(self, p: Tensor, h: Tensor) -> Tensor:
        """‖(I - V Vᵀ)(G - Ḡ)‖ [N] in fp64: the part of the centred gradient outside the subspace; V has orthonormal columns."""
        total, inside = self._norms(p, h)
        return (total - inside).clamp_min(0).sqrt()

    def _norms(self, p: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """‖G - Ḡ‖² and ‖g_low‖², [N] each, in fp64."""
        a, h = reference.cotangent(p.double(), self.cotangent), h.double()
        along_mean, coordinates = self._inner_products(a, h)
        total = a.square().sum(1) * (h.square().sum(1) + self.bias) - 2 * along_mean + self._mean_square()
        return total.clamp_min(0), coordinates.square().sum(1)

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """⟨G, Ḡ⟩ [N] and the centred coordinates [N, K], in fp64."""
        raise NotImplementedError

    def _mean_square(self) -> Tensor:
        """‖Ḡ‖², 0-d in fp64."""
        raise NotImplementedError


def extend(h: Tensor, bias: bool) -> Tensor:
    """h̃ = [h; 1] where the bias is part of the gradient, else h."""
    return torch.cat([h, h.new_ones(h.shape[0], 1)], 1) if bias else h
