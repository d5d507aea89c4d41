"""PCA of gradients in a product of two smaller spaces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..errors import InputError
from . import nfk
from .base import Basis, extend, outer_sums, tensors_of
from .eigen import LARGEST_EIGENPROBLEM, gram_pca
from .explicit import ExplicitBasis
from .samples import check_fit, check_n_components, count_components, fix_signs

__all__ = ["FactoredBasis"]

_WORKSPACE_ELEMENTS = 4 * 2**20


class FactoredBasis(Basis):
    """PCA of the gradients reduced to U_pᵀ G U_h = (U_pᵀ a) ⊗ (U_hᵀ h̃): V_k = U_p core_k U_hᵀ, with U_p [C, R] and U_h [D̃, Q].

    U_p and U_h are the leading eigenvectors of Σ (G - Ḡ)(G - Ḡ)ᵀ [C, C] and Σ (G - Ḡ)ᵀ(G - Ḡ) [D̃, D̃]: the higher-order singular
    value decomposition of the centred gradients, without forming them. The total loss is at most the sum of both truncations, so
    each gets half of the tolerance. Projection costs 2·(C·R + D̃·Q + K·R·Q) flops per sample, independent of the number of
    samples in the fit. With full ranks it is exact PCA.

    Args:
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: use the gradients of weight and bias together.

    Raises:
        InputError: an unknown cotangent.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> p, h = torch.rand(32, 4, generator=generator).softmax(1), torch.rand(32, 8, generator=generator)
        >>> basis = FactoredBasis.fit(p, h, n_components=3, ranks=(2, 4))
        >>> basis.project(p, h).shape, basis.ranks
        (torch.Size([32, 3]), (2, 4))
    """

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        names = ("class_factors", "feature_factors", "core", "mean_gradient", "captured")
        super().__init__(*names, cotangent=cotangent, bias=bias)

    captured: Tensor
    """0-d: share of Σ‖G - Ḡ‖² over the samples kept by the reduction."""

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
        tolerance: float = 0.01,
        ranks: tuple[int, int] | None = None,
    ) -> FactoredBasis:
        """Fit the two factors, then the subspace in their product.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: unused by PCA.
            n_components: K, or the explained share of the variance kept by the reduction, in (0, 1).
            cotangent: the differentiated scalar.
            normalisation: "none", our default, or "nfk-separable", see `DualBasis.fit`.
            max_anchors: maximum number of samples for PCA, the first ones; they are not stored.
            bias: use the gradients of weight and bias together.
            tolerance: maximum loss as a share of Σ‖G - Ḡ‖², in [0, 1), 0: rounding error only; 0.01 is our default; the paper
                gives none. See `captured`.
            ranks: (R, Q), instead of the tolerance.

        Returns:
            The fitted basis, in fp64 if p or h is, else fp32.

        Raises:
            InputError: equal gradients, non-finite values, an unknown option, a tolerance outside [0, 1), ranks beyond
                the sizes of the factors, or an eigenproblem beyond 8192.
        """
        check_n_components(n_components)
        basis = cls(cotangent=cotangent, bias=bias).to(p.device)
        check_fit(p, h, normalisation, cls.normalisations, max_anchors)
        a = reference.cotangent(p.detach()[:max_anchors].double(), cotangent)
        features = extend(h.detach()[:max_anchors].double(), bias)
        dtype = reference.compute_dtype(p, h)
        basis.set_fitted(mean_gradient=(a.T @ features / len(a)).to(dtype))
        if normalisation == "nfk-separable":
            basis.set_separable(nfk.separate(nfk.mean_and_deviation(a, features)[1], bias))
        class_scale, feature_scale = basis.scales()
        a, features = a * class_scale, features * feature_scale
        left, right = _scatters(a, features)
        class_factors, feature_factors = _leading_factors(left, right, tolerance, ranks)
        t, s = a @ class_factors, features @ feature_factors
        core, eigenvalues = _reduced_pca(t, s, n_components)
        total, kept = left.diagonal().sum(), _scatters(t, s)[0].diagonal().sum()
        class_factors, feature_factors = class_factors * class_scale[:, None], feature_factors * feature_scale[:, None]
        centre = class_factors.T @ basis.mean.double() @ feature_factors
        basis.set_fitted(
            class_factors=class_factors.to(dtype),
            feature_factors=feature_factors.to(dtype),
            core=core.to(dtype),
            constants=(core.flatten(1) @ centre.flatten()).to(dtype),
            explained=(eigenvalues / total).to(dtype),
            captured=(kept / total).clamp(0, 1),
        )
        nfk.check_finite(basis.class_factors, basis.feature_factors, basis.constants)
        return basis

    class_factors: Tensor
    feature_factors: Tensor

    @property
    def ranks(self) -> tuple[int, int]:
        """(R, Q)."""
        return self.fitted("class_factors").shape[1], self.fitted("feature_factors").shape[1]

    def tensors(self) -> ok.FactoredTensors:
        """Factors, core and constants."""
        return tensors_of(self, ok.FactoredTensors, self.cotangent, self.bias)

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64: the direction in gradient space with these coordinates."""
        core = torch.tensordot(weights.double(), self.fitted("core").double(), 1)
        return self.class_factors.double() @ core @ self.feature_factors.double().T

    def to_explicit(self) -> ExplicitBasis:
        """The same subspace as vectors [K, C, D̃], V_k = U_p core_k U_hᵀ."""
        tensors = self.tensors()
        return ExplicitBasis.of(self, (tensors.class_factors @ tensors.core) @ tensors.feature_factors.T)


def _scatters(a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (G - Ḡ)(G - Ḡ)ᵀ and Σ (G - Ḡ)ᵀ(G - Ḡ) of the gradients G_i = a_i ⊗ h_i."""
    mean = a.T @ h / len(a)
    left = (a * h.square().sum(1, keepdim=True)).T @ a - len(a) * mean @ mean.T
    right = (h * a.square().sum(1, keepdim=True)).T @ h - len(a) * mean.T @ mean
    return left, right


def _leading_factors(
    left: Tensor, right: Tensor, tolerance: float, ranks: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """U_p [C, R] and U_h [D̃, Q], orthonormal: the leading eigenvectors of `left` [C, C] and `right` [D̃, D̃]."""
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise InputError(f"tolerance={tolerance!r}: expected the largest share of the trace to lose, in [0, 1)")
    largest = (len(left), len(right))
    if ranks is not None and (len(ranks) != 2 or not all(1 <= r <= m for r, m in zip(ranks, largest, strict=True))):
        raise InputError(f"ranks={ranks!r}: expected (R, Q) from (1, 1) to {largest}")
    class_rank, feature_rank = ranks or (None, None)
    return _leading(left, tolerance / 2, class_rank), _leading(right, tolerance / 2, feature_rank)


def _leading(moment: Tensor, tolerance: float, rank: int | None) -> Tensor:
    """The `rank` leading eigenvectors, or as many as keep the loss within `tolerance` of the trace."""
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    eigenvalues = eigenvalues.clamp_min(0)
    if rank is None:
        rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
        left_out = eigenvalues.cumsum(0) <= max(tolerance, rounding) * eigenvalues.sum()
        rank = max(1, len(eigenvalues) - int(left_out.sum()))
    return eigenvectors.flip(1)[:, :rank]


def _reduced_pca(t: Tensor, s: Tensor, n_components: int | float) -> tuple[Tensor, Tensor]:
    """(core [K, R, Q], eigenvalues [K]) of the centred t_i ⊗ s_i, from the smaller of their covariance and Gram matrix."""
    samples, size = len(t), t.shape[1] * s.shape[1]
    if min(samples, size) > LARGEST_EIGENPROBLEM:
        raise InputError(
            f"{samples} samples and ranks {t.shape[1]} x {s.shape[1]} need an eigenproblem of size {min(samples, size)}:"
            f" expected at most {LARGEST_EIGENPROBLEM}; use max_anchors={LARGEST_EIGENPROBLEM} or a larger tolerance"
        )
    if size >= samples:
        found = gram_pca((t @ t.T) * (s @ s.T), n_components)
        return outer_sums(t, s, found.coefficients), found.eigenvalues
    covariance = t.new_zeros((size, size))
    for block in _centred_blocks(t, s):
        covariance += block.T @ block
    eigenvalues, vectors = (part.flip(-1) for part in torch.linalg.eigh(covariance))
    largest = (t.square().sum(1) * s.square().sum(1)).max().reshape(1, 1)
    # The other samples - size eigenvalues of their Gram matrix are 0.
    kept = count_components(torch.cat([eigenvalues, eigenvalues.new_zeros(samples - size)]), largest, n_components)
    coordinates = torch.cat([block @ vectors[:, :kept] for block in _centred_blocks(t, s)])
    return outer_sums(t, s, fix_signs(coordinates) / eigenvalues[:kept]), eigenvalues[:kept]


def _centred_blocks(t: Tensor, s: Tensor) -> Iterator[Tensor]:
    """The centred t_i ⊗ s_i as rows, in chunks of samples."""
    centre = t.T @ s / len(t)
    step = max(1, _WORKSPACE_ELEMENTS // centre.numel())
    for left, right in zip(t.split(step), s.split(step), strict=True):
        yield (left[:, :, None] * right[:, None, :] - centre).flatten(1)
