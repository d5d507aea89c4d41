"""PCA of gradients over anchor samples, without forming a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from . import nfk
from .anchors import check_anchor_method, choose_anchors
from .base import Basis, extend, outer_sums, tensors_of
from .eigen import LARGEST_EIGENPROBLEM, gram_pca
from .explicit import ExplicitBasis
from .samples import check_fit, check_n_components

__all__ = ["DualBasis"]

_ANCHOR_BLOCK = 256


class DualBasis(Basis):
    """PCA of last-layer gradients, expressed over its n anchor samples: V_k = Σ_i α_ik (a_i ⊗ h̃_i).

    Exact: coordinates equal those of PCA on the materialised gradients of the anchors up to sign, at 2·(n·(C + D + K) + C·K)
    flops per sample instead of 2·K·C·D̃. The mean gradient is that of the anchors.

    Args:
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: use the gradients of weight and bias together.

    Raises:
        InputError: an unknown cotangent.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> p, h = torch.rand(32, 4, generator=generator).softmax(1), torch.rand(32, 8, generator=generator)
        >>> basis = DualBasis.fit(p, h, n_components=3)
        >>> basis.project(p, h).shape
        torch.Size([32, 3])
    """

    _optional_names = (*Basis._optional_names, "residual", "weights")

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        names = ("anchor_cotangents", "anchor_features", "coefficients", "shift", "linear", "mean_square")
        super().__init__(*names, cotangent=cotangent, bias=bias)

    residual: Tensor | None
    """0-d: share of Σ ‖G‖² over all samples outside the span of the anchors; None if all samples are anchors."""
    weights: Tensor | None
    """[n] in fp64, of the anchors in the mean gradient; None if uniform."""

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
        anchors: str = "first",
    ) -> DualBasis:
        """Fit the subspace on ID samples, at most `max_anchors` of which become anchors.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: classes [n] for anchors="class_balanced"; None: predicted classes.
            n_components: K (reduced with a warning if the anchors span fewer dimensions), or the explained share of the gradient
                variance, in (0, 1). The paper uses 200 on CIFAR; 0.99 is our default.
            cotangent: the differentiated scalar.
            normalisation: "none", our default: centring only; "nfk-separable": the closest rank-one approximation of the "nfk" of
                all runs in the paper's README (exact in `ExplicitBasis`), with relative error `separable_error`.
            max_anchors: maximum number of samples in the Gram matrix, at most 8192.
            bias: use the gradients of weight and bias together.
            anchors: selection among more samples, see `choose_anchors`: "first", "class_balanced" or "pivoted", all
                chosen here. `residual` measures what they miss. Mean and PCA are those of the anchors, and inherit the bias of a
                non-random selection.

        Returns:
            The fitted basis, in fp64 if p or h is, else fp32.

        Raises:
            InputError: equal gradients, non-finite values, more than 8192 anchors, or an unknown option.
        """
        check_n_components(n_components)
        basis = cls(cotangent=cotangent, bias=bias).to(p.device)
        check_fit(p, h, normalisation, cls.normalisations, max_anchors, LARGEST_EIGENPROBLEM)
        p, h = p.detach(), h.detach()
        dtype = reference.compute_dtype(p, h)
        check_anchor_method(anchors)
        if len(p) > max_anchors:
            chosen = choose_anchors(p, h, max_anchors, method=anchors, labels=labels, cotangent=cotangent, bias=bias)
            p, h = p[chosen.index], h[chosen.index]
            assert chosen.residual is not None
            basis.set_fitted(residual=chosen.residual)
        anchor_a, anchor_h = reference.cotangent(p.double(), cotangent), h.double()
        shift = anchor_h.mean(0).to(dtype)
        if normalisation == "nfk-separable":
            basis.set_separable(nfk.separate(nfk.mean_and_deviation(anchor_a, extend(anchor_h, bias))[1], bias))
        anchor_a, anchor_h = basis.scaled(anchor_a, anchor_h)
        extended = extend(anchor_h, bias)
        found = gram_pca((anchor_a @ anchor_a.T) * (extended @ extended.T), n_components)
        # ⟨u∘a ⊗ v∘h̃, u∘a_i ⊗ v∘h̃_i⟩ = ⟨a ⊗ h̃, u²∘a_i ⊗ v²∘h̃_i⟩: scaling the anchors twice leaves samples unscaled.
        anchor_a, anchor_h = basis.scaled(anchor_a, anchor_h)
        linear = reference.linear_part(anchor_a, anchor_h, found.coefficients, shift.double(), bias)
        basis.set_fitted(
            anchor_cotangents=anchor_a.to(dtype),
            anchor_features=anchor_h.to(dtype),
            coefficients=found.coefficients.to(dtype),
            constants=found.constants.to(dtype),
            shift=shift,
            linear=linear.to(dtype),
            explained=found.explained.to(dtype),
            mean_square=found.mean_square,
        )
        nfk.check_finite(*(basis.fitted(name) for name in ("anchor_cotangents", "anchor_features", "linear")))
        return basis

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient of the anchors."""
        a, h = self.scaled(*self.anchors(), power=-2)
        return (a * self._mean_weights()[:, None]).T @ extend(h, self.bias)

    def anchors(self) -> tuple[Tensor, Tensor]:
        """Stored anchor cotangents [n, C] and features [n, D], with u² and v² folded in, in fp64."""
        return self.fitted("anchor_cotangents").double(), self.fitted("anchor_features").double()

    def _mean_weights(self) -> Tensor:
        """[n] in fp64: Ḡ = Σ_i weight_i G_i."""
        if self.weights is not None:
            return self.weights
        anchors = self.fitted("anchor_features")
        return torch.full((len(anchors),), 1 / len(anchors), dtype=torch.float64, device=anchors.device)

    def tensors(self) -> ok.DualTensors:
        """Anchors, coefficients, constants and shift."""
        return tensors_of(self, ok.DualTensors, self.cotangent, self.bias)

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64: the direction in gradient space with these coordinates."""
        a, h = self.anchors()
        along = self.fitted("coefficients").double() @ weights.double()
        return (a * along[:, None]).T @ extend(h, self.bias)

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        names = ("anchor_cotangents", "anchor_features", "coefficients")
        stored = (*(self.fitted(name) for name in names), self._mean_weights())
        along_mean, coordinates = torch.zeros_like(a[:, 0]), -self.fitted("constants").double()
        # In chunks, since fp64 doubles the size of the anchors.
        for block in zip(*(tensor.split(_ANCHOR_BLOCK) for tensor in stored), strict=True):
            anchor_a, anchor_h, coefficients, weights = (part.double() for part in block)
            kernel = (a @ anchor_a.T) * (h @ anchor_h.T + self.bias)
            along_mean = along_mean + kernel @ weights
            coordinates = coordinates + kernel @ coefficients
        return along_mean, coordinates

    def _mean_square(self) -> Tensor:
        return self.fitted("mean_square")

    def to_explicit(self) -> ExplicitBasis:
        """The same subspace as vectors [K, C, D̃]: K·C·D̃ numbers, 8 GB for ResNet-50 on ImageNet at K = 1000."""
        h = extend(self.fitted("anchor_features"), self.bias)
        return ExplicitBasis.of(self, outer_sums(self.fitted("anchor_cotangents"), h, self.fitted("coefficients")))
