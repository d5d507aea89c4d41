"""A basis stored as vectors."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from . import nfk
from .base import Basis, extend, outer_sums, tensors_of
from .eigen import LARGEST_EIGENPROBLEM, gram_pca
from .samples import check_fit, check_n_components

__all__ = ["ExplicitBasis"]


class ExplicitBasis(Basis):
    """A gradient subspace as vectors V [K, C, D̃]: 2·K·C·D̃ flops per sample, for few classes or few components.

    It stores I ∘ V, and represents the paper's normalisation exactly.

    Args:
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: use the gradients of weight and bias together.

    Raises:
        InputError: an unknown cotangent.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> p, h = torch.rand(32, 4, generator=generator).softmax(1), torch.rand(32, 8, generator=generator)
        >>> basis = ExplicitBasis.fit(p, h, n_components=3)
        >>> basis.project(p, h).shape
        torch.Size([32, 3])
    """

    normalisations = ("none", "nfk", "nfk-separable")

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
        """The PCA of `DualBasis.fit` as explicit vectors; with normalisation="nfk", PCA of exactly normalised gradients.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: unused by PCA.
            n_components: K (reduced with a warning if the anchors span fewer dimensions), or the explained share of the gradient
                variance, in (0, 1).
            cotangent: the differentiated scalar.
            normalisation: "none", our default; "nfk", as in all runs of the paper's README, at 2·n²·C·D̃ flops; "nfk-separable".
            max_anchors: maximum number of samples for PCA, the first ones, at most 8192.
            bias: use the gradients of weight and bias together.
            max_bytes: memory limit of the components of "nfk"; 2 GiB is our default; the paper gives none.

        Returns:
            The fitted basis, in fp64 if p or h is, else fp32.

        Raises:
            InputError: equal gradients, non-finite values, more than 8192 anchors, components beyond `max_bytes`, or an unknown
                option.
        """
        check_n_components(n_components)
        basis = cls(cotangent=cotangent, bias=bias).to(p.device)
        check_fit(p, h, normalisation, cls.normalisations, max_anchors, LARGEST_EIGENPROBLEM)
        dtype = reference.compute_dtype(p, h)
        a = reference.cotangent(p.detach()[:max_anchors].double(), cotangent)
        features = extend(h.detach()[:max_anchors].double(), bias)
        mean, spread = nfk.mean_and_deviation(a, features)
        if normalisation == "nfk":
            components, constants, explained = nfk.pca(a, features, mean, spread, n_components, dtype, max_bytes)
            basis.set_fitted(inverse_deviation=nfk.inverse(spread).to(dtype))
        else:
            if normalisation == "nfk-separable":
                basis.set_separable(nfk.separate(spread, bias))
            a, features = basis.scaled(a, features)
            coefficients, _, explained, constants, _ = gram_pca((a @ a.T) * (features @ features.T), n_components)
            a, features = basis.scaled(a, features)
            components = outer_sums(a.to(dtype), features.to(dtype), coefficients.to(dtype))
        basis.set_fitted(
            components=components,
            constants=constants.to(dtype),
            explained=explained.to(dtype),
            mean_gradient=mean.to(dtype),
        )
        nfk.check_finite(components, *basis.metric().values())
        return basis

    @classmethod
    def of(cls, basis: Basis, components: Tensor) -> ExplicitBasis:
        """The subspace of another basis from its vectors [K, C, D̃], with the same mean, shares and scales."""
        explicit = cls(cotangent=basis.cotangent, bias=basis.bias).to(components.device)
        explicit.set_fitted(
            components=components,
            mean_gradient=basis.mean.to(components.dtype, copy=True),
            constants=basis.fitted("constants").clone(),
            explained=basis.fitted("explained").clone(),
            **basis.metric(),
        )
        return explicit

    def tensors(self) -> ok.ExplicitTensors:
        """Components and constants."""
        return tensors_of(self, ok.ExplicitTensors, self.cotangent, self.bias)

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64: the direction in gradient space with these coordinates."""
        components = self.fitted("components")
        total = torch.zeros(components.shape[1:], dtype=torch.float64, device=components.device)
        for weight, component in zip(weights.double(), components, strict=True):
            total += weight * component.double()
        return total

    def to_explicit(self) -> ExplicitBasis:
        """The basis itself."""
        return self
