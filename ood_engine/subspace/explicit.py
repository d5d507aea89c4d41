"""A basis as its vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..errors import InputError
from . import nfk
from .base import extend
from .dual import DualBasis
from .metric import MetricBasis
from .samples import check_n_components

if TYPE_CHECKING:
    from .factored import FactoredBasis

__all__ = ["ExplicitBasis"]


class ExplicitBasis(MetricBasis):
    """A gradient subspace as its vectors V [K, C, D̃]: 2·K·C·D̃ flops a sample, for few classes or few components.

    The only form that holds the paper's normalisation exactly: it stores I ∘ V.

    Args:
        cotangent: the scalar that is differentiated, see `ood_kernels.reference.cotangent`.
        bias: take the gradients of weight and bias together.
    """

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        super().__init__("components", "mean_gradient", cotangent=cotangent, bias=bias)

    @classmethod
    def fit(
        cls,
        p: Tensor,
        h: Tensor,
        *,
        labels: Tensor | None = None,
        n_components: int | float = 0.99,
        cotangent: str = "energy",
        normalisation: str = "none",
        max_anchors: int = 4096,
        bias: bool = True,
        max_bytes: int = 2 * 2**30,
    ) -> ExplicitBasis:
        """The PCA of `DualBasis.fit`, written out; or, with normalisation="nfk", PCA of the gradients normalised exactly.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: not used by PCA.
            n_components: K as a number (fewer, with a warning, where the anchors span fewer), or the share of the gradient variance
                to explain, in (0, 1).
            cotangent: the scalar that is differentiated.
            normalisation: "none", our default; "nfk", that of all runs in the paper's README, at 2·n²·C·D̃ flops; "nfk-separable".
            max_anchors: most samples that PCA reads, the first of them.
            bias: take the gradients of weight and bias together.
            max_bytes: most memory for the components of "nfk"; 2 GiB is ours.

        Returns:
            The fitted basis, in fp64 where p or h is, else fp32.

        Raises:
            InputError: gradients that are all equal, values that are not finite, components beyond `max_bytes`, or an unknown
                option.
        """
        if normalisation in ("none", "nfk-separable"):
            dual = DualBasis.fit(
                p,
                h,
                n_components=n_components,
                cotangent=cotangent,
                normalisation=normalisation,
                max_anchors=max_anchors,
                bias=bias,
            )
            return dual.to_explicit()
        check_n_components(n_components)
        basis = cls(cotangent=cotangent, bias=bias).to(p.device)
        nfk.check_fit(p, h, normalisation, ("none", "nfk", "nfk-separable"), max_anchors)
        dtype = reference.compute_dtype(p, h)
        a = reference.cotangent(p.detach()[:max_anchors].double(), cotangent)
        features = extend(h.detach()[:max_anchors].double(), bias)
        mean, spread = nfk.mean_and_deviation(a, features)
        found = nfk.pca(a, features, mean, spread, n_components, dtype, max_bytes)
        scale = nfk.inverse(spread).to(dtype)
        nfk.check_finite(scale)
        basis.set_fitted(
            components=found.components,
            constants=found.constants.to(dtype),
            explained=found.explained.to(dtype),
            mean_gradient=mean.to(dtype),
            inverse_deviation=scale,
        )
        return basis

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient."""
        return self.fitted("mean_gradient")

    def flops(self, samples: int) -> int:
        """Floating point operations of projecting `samples` gradients."""
        return 2 * samples * self.fitted("components").numel()

    def tensors(self) -> ok.ExplicitTensors:
        """Components and constants."""
        return ok.ExplicitTensors(
            components=self.fitted("components"),
            constants=self.fitted("constants"),
            cotangent=self.cotangent,
            bias=self.bias,
        )

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64."""
        components = self.fitted("components")
        total = torch.zeros(components.shape[1:], dtype=torch.float64, device=components.device)
        for weight, component in zip(weights.double(), components, strict=True):
            total += weight * component.double()
        return total

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._along_mean(a, h), self.tensors().project(a, h)

    def to_explicit(self) -> ExplicitBasis:
        """Itself."""
        return self

    def to_factored(self, tolerance: float = 0.01) -> FactoredBasis:
        """The same vectors inside a product of two smaller spaces, that keep all but `tolerance` of their explained variance.

        Raises:
            InputError: the basis is normalised with "nfk", whose scales are no product.
        """
        from .factored import factor

        if self.normalisation == "nfk":
            raise InputError(
                "normalisation='nfk' scales every entry of a gradient by itself, which no product of two spaces can hold:"
                " expected 'none' or 'nfk-separable'; fit a FactoredBasis with one of them"
            )
        weights = self.fitted("explained").double()
        classes, width = self.mean.shape
        left, right = weights.new_zeros((classes, classes)), weights.new_zeros((width, width))
        for weight, vector in zip(weights, self._vectors(), strict=True):
            left += weight * vector @ vector.T
            right += weight * vector.T @ vector
        return factor(self, left, right, lambda p, q: torch.stack([p.T @ v @ q for v in self._vectors()]), tolerance)

    def _vectors(self) -> Iterator[Tensor]:
        """One [C, D̃] after another in fp64, in the space of the normalised gradients."""
        class_scale, feature_scale = self.scales()
        return (vector.double() / class_scale[:, None] / feature_scale for vector in self.fitted("components"))
