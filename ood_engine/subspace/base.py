"""The interface of gradient bases, and the metric of normalised gradients."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..errors import InputError, one_of
from ..fitted import FittedModule
from .nfk import Separable
from .plan import Plan, matrix_elements, plan

__all__ = ["Basis", "extend", "outer_sums", "tensors_of", "whitening_of"]

_Tensors = TypeVar("_Tensors", ok.DualTensors, ok.ExplicitTensors, ok.FactoredTensors)
_METRIC = ("inverse_deviation", "class_scale", "feature_scale", "separable_error", "whitening")


class Basis(FittedModule):
    """A basis of the normalised gradients g̃ = I ∘ (G - Ḡ), with vectors V not necessarily orthonormal.

    The scales are folded into the stored tensors, so that projection applies to the plain G: ⟨g̃, V_k⟩ = ⟨G - Ḡ, I ∘ V_k⟩. Norms
    refer to g̃. Optional buffers record the normalisation: `inverse_deviation` I [C, D̃] (nfk); `class_scale` u [C] and
    `feature_scale` v [D̃] with I = u ⊗ v, and `separable_error`, 0-d (nfk-separable); `whitening` [K, r], from coordinates along V
    to those along an orthonormal basis of its span.
    """

    _optional_names: ClassVar[tuple[str, ...]] = _METRIC

    def __init__(self, *fitted: str, cotangent: str = "energy", bias: bool = True) -> None:
        super().__init__(*fitted, "constants", "explained")
        if cotangent not in reference.COTANGENTS:
            raise InputError(f"cotangent={cotangent!r}: {one_of(cotangent, reference.COTANGENTS)}")
        self.cotangent = cotangent
        self.bias = bias

    normalisations: ClassVar[tuple[str, ...]] = ("none", "nfk-separable")
    """The normalisations that it can be fitted with."""
    constants: Tensor
    explained: Tensor
    """[K] share of the anchors' gradient variance along each component."""
    inverse_deviation: Tensor | None
    class_scale: Tensor | None
    feature_scale: Tensor | None
    separable_error: Tensor | None
    """‖u ⊗ v ∘ (G - Ḡ) - I ∘ (G - Ḡ)‖ relative to ‖I ∘ (G - Ḡ)‖, root mean square over the anchors; None unless nfk-separable."""
    whitening: Tensor | None

    @property
    def n_components(self) -> int:
        """K."""
        return self.fitted("constants").shape[0]

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient Ḡ."""
        return self.fitted("mean_gradient")

    @property
    def normalisation(self) -> str:
        """Normalisation of the gradients: "none", "nfk" or "nfk-separable"."""
        if self.inverse_deviation is not None:
            return "nfk"
        return "none" if self.class_scale is None else "nfk-separable"

    @property
    def bytes(self) -> int:
        """Bytes read by a projection, besides its inputs."""
        return sum(part.nbytes for part in self.tensors().parts() if part is not None)

    def flops(self, samples: int) -> int:
        """Floating point operations of projecting `samples` gradients."""
        return 2 * samples * matrix_elements(self.tensors())

    def plan(self, samples: int = 64) -> Plan:
        """Cost of this basis and its alternatives for a batch, see `ood_engine.subspace.plan`."""
        return plan(self, samples=samples)

    def tensors(self) -> ok.BasisTensors:
        """The tensors for `ood_kernels.project_gradients`."""
        raise NotImplementedError

    def project(self, p: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates g_low [N, K] of the gradients at softmax p [N, C] and features h [N, D]."""
        return ok.project_gradients(p, h, self)

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64: the direction in gradient space with these coordinates."""
        raise NotImplementedError

    def to_explicit(self) -> Basis:
        """The same subspace as vectors [K, C, D̃], an `ExplicitBasis`: 8 GB for ResNet-50 on ImageNet at K = 1000."""
        raise NotImplementedError

    def residual_norm(self, p: Tensor, h: Tensor) -> Tensor:
        """Norm of the component of g̃ orthogonal to the span of V, [N] in fp64 because of cancellation."""
        a, h = reference.cotangent(p.double(), self.cotangent), h.double()
        along_mean, coordinates = self._inner_products(a, h)
        if self.whitening is not None:
            coordinates = coordinates @ self.whitening.double()
        total = self._square(a, h) - 2 * along_mean + self._mean_square()
        return (total - coordinates.square().sum(1)).clamp_min(0).sqrt()

    def metric(self) -> dict[str, Tensor]:
        """The metric buffers that are set."""
        return {name: value for name in _METRIC if (value := self._buffers[name]) is not None}

    def set_separable(self, found: Separable) -> None:
        """Set the metric to gradients scaled by u ⊗ v."""
        scales = {"class_scale": found.class_scale, "feature_scale": found.feature_scale}
        self.set_fitted(**scales, separable_error=found.error)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Scales u [C] and v [D̃] in fp64; [1] and 1 unless nfk-separable."""
        if self.class_scale is None or self.feature_scale is None:
            one = torch.ones(1, dtype=torch.float64, device=self._place.device)
            return one, one
        return self.class_scale, self.feature_scale

    def scaled(self, a: Tensor, h: Tensor, power: int = 1) -> tuple[Tensor, Tensor]:
        """u^power ∘ a and v^power ∘ h; v is 1 for the bias."""
        if self.class_scale is None or self.feature_scale is None:
            return a, h
        return a * self.class_scale**power, h * self.feature_scale[: h.shape[1]] ** power

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """⟨I ∘ G, I ∘ Ḡ⟩ [N] and the centred coordinates [N, K], in fp64."""
        return ((a @ self._metric_mean()) * extend(h, self.bias)).sum(1), self.tensors().project(a, h)

    def _square(self, a: Tensor, h: Tensor) -> Tensor:
        """‖I ∘ G‖² [N]."""
        if self.inverse_deviation is not None:
            squares = extend(h, self.bias).square()
            return ((a.square() @ self.inverse_deviation.double().square()) * squares).sum(1)
        if self.class_scale is not None:
            a, h = self.scaled(a, h)
        return a.square().sum(1) * (h.square().sum(1) + self.bias)

    def _mean_square(self) -> Tensor:
        """‖I ∘ Ḡ‖², 0-d in fp64."""
        return (self.mean.double() * self._metric_mean()).sum()

    def _metric_mean(self) -> Tensor:
        """I² ∘ Ḡ [C, D̃] in fp64, so that ⟨G, I² ∘ Ḡ⟩ is the inner product of the normalised."""
        mean = self.mean.double()
        if self.inverse_deviation is not None:
            return mean * self.inverse_deviation.double().square()
        class_scale, feature_scale = self.scales()
        return mean * class_scale.square()[:, None] * feature_scale.square()


def tensors_of(module: FittedModule, kind: type[_Tensors], cotangent: str, bias: bool = True) -> _Tensors:
    """The fitted buffers of a module that are named like the fields of a basis tuple, as that tuple."""
    parts: dict[str, Any] = {name: module.fitted(name) for name in kind._fields if name not in ("cotangent", "bias")}
    return kind(**parts, cotangent=cotangent, bias=bias)


def extend(h: Tensor, bias: bool) -> Tensor:
    """h̃ = [h; 1] where the bias is part of the gradient, else h."""
    return torch.cat([h, h.new_ones(h.shape[0], 1)], 1) if bias else h


def outer_sums(a: Tensor, h: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_i coefficients_ik a_i ⊗ h_i, [K, C, D̃], one component at a time."""
    sums = torch.empty((coefficients.shape[1], a.shape[1], h.shape[1]), dtype=h.dtype, device=h.device)
    for k, column in enumerate(coefficients.T):
        torch.matmul((a * column[:, None]).T, h, out=sums[k])
    return sums


def whitening_of(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, r] map from inner products with K vectors to coordinates along an orthonormal basis of their span.

    Args:
        gram: [K, K] inner products of the vectors, in fp64.
        dtype: storage dtype of the vectors; directions below its rounding error are dropped.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    kept = eigenvalues > len(gram) * torch.finfo(dtype).eps * eigenvalues[-1]
    return eigenvectors[:, kept] / eigenvalues[kept].sqrt()
