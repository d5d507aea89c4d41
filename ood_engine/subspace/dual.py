"""PCA of gradients over anchor samples, without forming a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from . import nfk
from .anchors import check_anchor_method, choose_anchors
from .base import Basis, extend, outer_sums
from .eigen import LARGEST_EIGENPROBLEM, gram_pca
from .explicit import ExplicitBasis
from .samples import check_fit, check_n_components

__all__ = ["DualBasis"]

_ANCHOR_BLOCK = 256


class DualBasis(Basis):
    """PCA of last-layer gradients, written over the n anchor samples it was found from: V_k = Σ_i α_ik (a_i ⊗ h̃_i).

    Exact: coordinates equal those of PCA on the materialised gradients of the anchors up to sign, at 2·(n·(C + D + K) + C·K)
    flops a sample instead of 2·K·C·D̃. The mean gradient is the anchors' own.

    Args:
        cotangent: the scalar that is differentiated, see `ood_kernels.reference.cotangent`.
        bias: take the gradients of weight and bias together.
    """

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        names = ("anchor_cotangents", "anchor_features", "coefficients", "shift", "linear", "mean_square")
        super().__init__(*names, optional=("residual",), cotangent=cotangent, bias=bias)

    residual: Tensor | None
    """0-d: the share of Σ ‖G‖² over all samples that lies outside the span of the anchors; None where all are anchors."""

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
        """Find the subspace from ID samples, at most `max_anchors` of which become the anchors.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: classes [n], read by anchors="class_balanced" alone; predicted ones stand in.
            n_components: K as a number (fewer, with a warning, where the anchors span fewer), or the share of the gradient variance
                to explain, in (0, 1). The paper uses 200 for
                CIFAR; 0.99 is ours.
            cotangent: the scalar that is differentiated.
            normalisation: "none", our default: centred only; "nfk-separable", the nearest that keeps rank one to the "nfk" of all
                runs in the paper's README (exact in `ExplicitBasis`); `separable_error` is its relative error.
            max_anchors: most samples to build the Gram matrix from, at most 8192.
            bias: take the gradients of weight and bias together.
            anchors: how they are chosen where there are more samples, see `choose_anchors`: "first", "class_balanced" or "pivoted";
                the latter two are ours. `residual` says what they leave out. Mean and PCA are those of the anchors, so a choice
                that is not random weighs samples by it.

        Returns:
            The fitted basis, in fp64 where p or h is, else fp32.

        Raises:
            InputError: gradients that are all equal, values that are not finite, more than 8192 anchors, or an unknown option.
        """
        check_n_components(n_components)
        basis = cls(cotangent=cotangent, bias=bias).to(p.device)
        check_fit(p, h, normalisation, ("none", "nfk-separable"), max_anchors, LARGEST_EIGENPROBLEM)
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
        # ⟨u∘a ⊗ v∘h̃, u∘a_i ⊗ v∘h̃_i⟩ = ⟨a ⊗ h̃, u²∘a_i ⊗ v²∘h̃_i⟩: with the scales twice on the anchors, none is left on samples.
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
        """Anchor cotangents [n, C] and features [n, D] as they are stored, with u² and v² folded in, in fp64."""
        return self.fitted("anchor_cotangents").double(), self.fitted("anchor_features").double()

    def _mean_weights(self) -> Tensor:
        """[n] in fp64: Ḡ = Σ_i weight_i G_i."""
        anchors = self.fitted("anchor_features")
        return torch.full((len(anchors),), 1 / len(anchors), dtype=torch.float64, device=anchors.device)

    def flops(self, samples: int) -> int:
        """Floating point operations of projecting `samples` gradients."""
        anchors, classes = self.fitted("anchor_cotangents").shape
        width = self.fitted("anchor_features").shape[1]
        return 2 * samples * (anchors * (classes + width + self.n_components) + classes * self.n_components)

    def tensors(self) -> ok.DualTensors:
        """Anchors, coefficients, constants and shift."""
        return ok.DualTensors(
            anchor_cotangents=self.fitted("anchor_cotangents"),
            anchor_features=self.fitted("anchor_features"),
            coefficients=self.fitted("coefficients"),
            constants=self.fitted("constants"),
            cotangent=self.cotangent,
            bias=self.bias,
            shift=self.fitted("shift"),
            linear=self.fitted("linear"),
        )

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64: the direction in gradient space with these coordinates."""
        a, h = self.anchors()
        along = self.fitted("coefficients").double() @ weights.double()
        return (a * along[:, None]).T @ extend(h, self.bias)

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        names = ("anchor_cotangents", "anchor_features", "coefficients")
        stored = (*(self.fitted(name) for name in names), self._mean_weights())
        along_mean, coordinates = torch.zeros_like(a[:, 0]), -self.fitted("constants").double()
        # A block at a time, for the anchors in fp64 are twice their size.
        for block in zip(*(tensor.split(_ANCHOR_BLOCK) for tensor in stored), strict=True):
            anchor_a, anchor_h, coefficients, weights = (part.double() for part in block)
            kernel = (a @ anchor_a.T) * (h @ anchor_h.T + self.bias)
            along_mean = along_mean + kernel @ weights
            coordinates = coordinates + kernel @ coefficients
        return along_mean, coordinates

    def _mean_square(self) -> Tensor:
        return self.fitted("mean_square")

    def to_explicit(self) -> ExplicitBasis:
        """The same subspace as its vectors [K, C, D̃]: K·C·D̃ numbers, 8 GB for ImageNet's ResNet-50 at K = 1000."""
        h = extend(self.fitted("anchor_features"), self.bias)
        return ExplicitBasis.of(self, outer_sums(self.fitted("anchor_cotangents"), h, self.fitted("coefficients")))
