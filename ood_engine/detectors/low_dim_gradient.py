"""Low-dimensional gradients (arXiv 2310.17163): the last-layer gradient, projected onto few directions, then judged.

The paper differentiates all parameters; here it is the last layer, where the gradient has a closed form (see `ood_kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ood_kernels.reference import compute_dtype

from ..errors import InputError
from ..features.fit_data import FitData
from ..features.signals import Signals
from ..subspace import BASES, Basis, ClassAverageBasis, DualBasis, ExplicitBasis, check_n_components, plan_of
from ..subspace.anchors import check_anchor_method
from ..subspace.class_average import MAX_BYTES, class_means_bytes
from .base import Detector, register
from .heads.linear_probe import LinearProbe
from .heads.vector_heads import KNearestNeighbours, Mahalanobis

__all__ = ["HEADS", "LowDimGradient"]

HEADS = (
    "probe_energy",
    "probe_msp",
    "probe_react",
    "probe_bats",
    "knn",
    "mahalanobis",
    "mahalanobis_pp",
    "residual",
    "vim",
    "projected_norm",
)
"""How the coordinates are judged."""

_NORMALISATIONS = {
    "explicit": ("none", "nfk", "nfk-separable"),
    "class_average": ("none", "nfk", "nfk-separable"),
}

_FORWARD_VECTORS = ("knn", "mahalanobis", "mahalanobis_pp")
"""Heads that judge the penultimate features in the same way."""

_Head = LinearProbe | KNearestNeighbours | Mahalanobis


def _make_head(head: str, k: int, epochs: int, **probe: Any) -> _Head | None:
    if head.startswith("probe"):
        kind = head.removeprefix("probe_")
        clamp = kind if kind in ("react", "bats") else "none"
        score = "msp" if kind == "msp" else "energy"
        return LinearProbe(score, epochs, clamp=clamp, **probe)
    if head.startswith("mahalanobis"):
        return Mahalanobis(normalise=head == "mahalanobis_pp")
    return KNearestNeighbours(k) if head == "knn" else None


def _fit_head(head: _Head, x: Tensor, data: FitData, index: Tensor) -> None:
    """Fit on the vectors x of the samples at `index`; labels are asked for only where the head reads them."""
    if isinstance(head, KNearestNeighbours):
        head.fit(x)
    elif isinstance(head, Mahalanobis):
        head.fit(x, data.labels(index))
    else:
        head.fit(x, data.labels(index), data.head.weight.shape[0], data.seed)


@register("low_dim_gradient")
@register("low_dim_gradient_probe_energy", fixed=("head",), head="probe_energy")
@register("low_dim_gradient_probe_msp", fixed=("head",), head="probe_msp")
@register("low_dim_gradient_probe_react", fixed=("head",), head="probe_react")
@register("low_dim_gradient_probe_bats", fixed=("head",), head="probe_bats")
@register("low_dim_gradient_knn", fixed=("head",), head="knn")
@register("low_dim_gradient_mahalanobis", fixed=("head",), head="mahalanobis")
@register("low_dim_gradient_mahalanobis_pp", fixed=("head",), head="mahalanobis_pp")
@register("low_dim_gradient_residual", fixed=("head",), head="residual")
@register("low_dim_gradient_vim", fixed=("head",), head="vim")
@register("low_dim_gradient_projected_norm", fixed=("head",), head="projected_norm")
@register("low_dim_gradient_ensemble", head="probe_energy", a=1.0)
class LowDimGradient(Detector):
    """A detector on g_low = ⟨G - Ḡ, V_k⟩, plus, with `a` > 0, the same detector on the forward side: S = S_low + a · S_forward.

    The subspace is found from anchors, at most half of the ID samples; the head is fitted on the others (see `FitData.split`).
    Heads, of which those not named as the paper's are ours or another paper's turned to gradients:

    - `probe_energy`, `probe_msp`, `probe_react`, `probe_bats`: a linear probe, see `LinearProbe`; forward side Energy (MSP) of the
      model's logits.
    - `knn`, `mahalanobis`, `mahalanobis_pp` (of normalised coordinates, arXiv 2505.18032): forward side the same on the features.
    - `residual`: -‖(I - VVᵀ)(G - Ḡ)‖, what lies outside the subspace; no forward side.
    - `vim`: lse - α ‖(I - VVᵀ)(G - Ḡ)‖ with α = Σ max logit / Σ residual over ID samples, ViM (arXiv 2203.10807) with the
      gradient's residual; no further forward side.
    - `projected_norm`: ‖g_low‖, how much of the gradient lies within the subspace of ID gradients; no forward side.

    Args:
        head: one of `HEADS`; that `low_dim_gradient` by itself takes mahalanobis is ours.
        n_components: K as a number, or the share of gradient variance to explain. The paper takes 200 on CIFAR; 0.99 is ours.
        cotangent: the scalar that is differentiated; "energy" is the paper's.
        basis: the subspace and its form. "dual", "explicit" and "factored" are PCA, as the paper takes it on CIFAR, written over
            anchors, as vectors, or inside a product of two smaller subspaces that loses at most 1 % of the variance; "auto" takes
            the cheaper of the first two by `ood_engine.subspace.plan`, for batches of 64. "class_average", the paper's on ImageNet,
            takes the mean gradient of every true class and no n_components.
        normalisation: "none" (ours), "nfk" (the paper's, for "explicit" and "class_average") or "nfk-separable" (near it, for all).
        max_anchors: most anchors; class averages, where they take at most 2 GiB, are over half of all samples instead.
        anchors: how they are chosen, see `ood_engine.subspace.choose_anchors`: "first" is a random choice, for any basis;
            "class_balanced" and "pivoted" choose from 16 times as many samples, for "dual" and "auto". All are ours.
        k: neighbour of the `knn` head; the paper's code takes 5 and 10.
        epochs: of training the probe; the paper's code takes 10.
        a: weight of the forward side; the paper's value is not known, 1 in `low_dim_gradient_ensemble` is ours.
        react_from: first coordinate that `probe_react` clips; the paper's code takes 10 on CIFAR, 950 on ImageNet.
        validation_share: of the samples, held out to stop the training of a probe early; the paper holds out none.
    """

    def __init__(
        self,
        *,
        head: str = "mahalanobis",
        n_components: int | float = 0.99,
        cotangent: str = "energy",
        basis: str = "auto",
        normalisation: str = "none",
        max_anchors: int = 4096,
        anchors: str = "first",
        k: int = 10,
        epochs: int = 10,
        a: float = 0.0,
        react_from: int = 10,
        validation_share: float = 0.0,
    ) -> None:
        super().__init__(*(["alpha"] if head == "vim" else []))
        if head not in HEADS:
            raise InputError(f"head={head!r}: expected one of {', '.join(HEADS)}")
        if not isinstance(max_anchors, int) or max_anchors < 2:
            raise InputError(f"max_anchors={max_anchors!r}: expected a whole number of at least 2")
        check_n_components(n_components)
        self._head = head
        self._max_anchors = max_anchors
        if basis not in ("auto", *BASES):
            raise InputError(f"basis={basis!r}: expected one of auto, {', '.join(BASES)}")
        if normalisation not in _NORMALISATIONS.get(basis, ("none", "nfk-separable")):
            raise InputError(
                f"normalisation={normalisation!r} with basis={basis!r}: expected one of"
                f" {', '.join(_NORMALISATIONS.get(basis, ('none', 'nfk-separable')))}"
            )
        check_anchor_method(anchors)
        if anchors != "first" and basis not in ("auto", "dual"):
            raise InputError(
                f"anchors={anchors!r} with basis={basis!r}: expected 'first'; others need the auto or dual basis"
            )
        self._form, self._anchors = basis, anchors
        self._options: dict[str, Any] = {
            "n_components": n_components,
            "cotangent": cotangent,
            "normalisation": normalisation,
        }
        self.basis: Basis = BASES.get(basis, DualBasis)(cotangent=cotangent)
        probe = {"react_from": react_from, "validation_share": validation_share}
        self.low = _make_head(head, k, epochs, **probe)
        self.forward_side = _make_head(head, k, epochs, **probe) if head in _FORWARD_VECTORS and a != 0 else None
        self._set_a(a)

    @property
    def head(self) -> str:
        """How the coordinates are judged."""
        return self._head

    def fit(self, data: FitData) -> None:
        """Find the subspace from the anchors and fit the heads on the other samples."""
        candidates = self._candidates(data)
        anchors, others = data.split(candidates)
        key = (self._form, self._anchors, self._max_anchors, *self._options.values())
        self.basis = data.shared(("basis", key), lambda: self._fit_basis(data, anchors)).to(self._place.device)
        if self.low is not None:
            coordinates = data.collect(key, others, lambda signals: signals.coordinates(self.basis))
            _fit_head(self.low, coordinates, data, others)
        if self.forward_side is not None:
            features = data.collect(("features", candidates), others, lambda signals: signals.features)
            _fit_head(self.forward_side, features, data, others)
        if self._head == "vim":
            self.set_fitted(alpha=self._virtual_logit_scale(data, others))

    def _candidates(self, data: FitData) -> int:
        """Most samples that the basis may be found from; at most half are, see `FitData.split`."""
        if self._form == "class_average" and self._holds_class_means(data):
            return len(data)
        return self._max_anchors if self._anchors == "first" else 16 * self._max_anchors

    def _holds_class_means(self, data: FitData) -> bool:
        """Whether C class means can be held; what is decided must not depend on how many classes the samples happen to show."""
        classes, features = data.head.weight.shape
        return class_means_bytes(classes, classes, features + 1, compute_dtype(data.head.weight)) <= MAX_BYTES

    def _fit_basis(self, data: FitData, anchors: Tensor) -> Basis:
        if len(anchors) < 2:
            raise InputError(
                f"{len(data)} ID samples, {data.distinct} of them different: expected at least 4 different ones, half of them"
                " anchors of the subspace; fit on more"
            )
        p = data.collect(("p", len(anchors)), anchors, lambda signals: signals.probabilities)
        h = data.collect(("h", len(anchors)), anchors, lambda signals: signals.features)
        if self._form == "class_average":
            labels = data.labels(anchors).to(p.device)
            # nfk is exact over class means alone, and says so where they are too large.
            needs_means = self._holds_class_means(data) or self._options["normalisation"] == "nfk"
            limits: dict[str, Any] = {"max_anchors": self._max_anchors, "max_bytes": MAX_BYTES if needs_means else 0}
            return ClassAverageBasis.fit(p, h, labels=labels, **limits, **self._options)
        if self._form not in ("auto", "dual"):
            return BASES[self._form].fit(p, h, max_anchors=self._max_anchors, **self._options)
        chosen: dict[str, Any] = {"max_anchors": self._max_anchors, "anchors": self._anchors}
        if self._anchors == "class_balanced":
            chosen["labels"] = data.labels(anchors).to(p.device)
        basis = DualBasis.fit(p, h, **chosen, **self._options)
        if self._form == "dual":
            return basis
        return basis.to_explicit() if plan_of(basis, samples=64).choice == "explicit" else basis

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._form == "auto":
            # Which form was the cheaper one when it was fitted shows in the names of its tensors.
            form = ExplicitBasis if f"{prefix}basis.components" in state_dict else DualBasis
            self.basis = form(cotangent=self.basis.cotangent).to(self._place.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _virtual_logit_scale(self, data: FitData, index: Tensor) -> Tensor:
        """α of ViM: the sum of the largest logits over that of the residuals."""
        logits, residuals = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for signals in data.signals(index):
            logits = logits + (signals.lse + signals.probabilities.amax(1).log()).double().sum().cpu()
            residuals = residuals + self._residual(signals).sum().cpu()
        if not residuals > 0:
            raise InputError(
                "the vim head: the subspace holds all of the gradients, so there is no residual; ask for fewer components"
            )
        return logits / residuals

    def _residual(self, signals: Signals) -> Tensor:
        return self.basis.residual_norm(signals.probabilities, signals.features)

    @property
    def gradient_basis(self) -> Basis | None:
        """The subspace; None for the heads that look at what lies outside it."""
        return None if self._head in ("residual", "vim") else self.basis

    def forward(self, signals: Signals) -> Tensor:
        """[N] score on the coordinates, plus a times that of the forward side."""
        if self._head == "residual":
            return -self._residual(signals)
        if self._head == "vim":
            return signals.lse - self.fitted("alpha") * self._residual(signals)
        coordinates = signals.coordinates(self.basis)
        if self._head == "projected_norm":
            return coordinates.norm(dim=1)
        assert self.low is not None
        score: Tensor = self.low(coordinates)
        return score if self._a == 0 else score + self._a * self._forward_score(signals)

    def _forward_score(self, signals: Signals) -> Tensor:
        if self._head.startswith("probe"):
            return signals.probabilities.amax(1) if self._head == "probe_msp" else signals.lse
        assert self.forward_side is not None
        score: Tensor = self.forward_side(signals.features)
        return score

    def grid(self) -> Sequence[dict[str, Any]]:
        """The weight of the forward side, where there is one: 0.1 to 10 in steps of about 3; ours."""
        return [{"a": a} for a in (0.1, 0.3, 1.0, 3.0, 10.0)] if self._a != 0 else ()

    def configure(self, **settings: Any) -> None:
        """Change the weight of the forward side."""
        if settings["a"] > 0 and self._head in _FORWARD_VECTORS and self.forward_side is None:
            raise InputError(f"a={settings['a']!r}: the forward side was not fitted; use refit(a=...) instead")
        self._set_a(settings["a"])
        super().configure(**settings)

    def _set_a(self, a: float) -> None:
        if not isinstance(a, (int, float)) or not 0 <= a < float("inf"):
            raise InputError(f"a={a!r}: expected a finite weight of at least 0")
        if a > 0 and self._head in ("residual", "vim", "projected_norm"):
            raise InputError(f"a={a!r} with the {self._head} head: it has no forward side; use a=0 or another head")
        self._a = float(a)
