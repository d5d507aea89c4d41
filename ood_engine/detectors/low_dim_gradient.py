"""Low-dimensional gradients (arXiv 2310.17163): a head on the last-layer gradient projected onto a small subspace.

The paper uses the gradient of all parameters; here it is that of the last layer, in closed form (see `ood_kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, one_of
from ..features.fit_data import FitData
from ..features.signals import Signals
from ..subspace import Basis
from .base import Detector, register
from .gradient_subspace import GradientSubspace
from .heads import VECTOR_HEADS, HeadKind, HeadSettings

__all__ = ["HEADS", "LowDimGradient"]

_RESIDUAL_HEADS = ("residual", "vim")
HEADS = (*VECTOR_HEADS, *_RESIDUAL_HEADS, "projected_norm")
"""Scores of a gradient: a head on its coordinates, its residual outside the subspace, or the norm of its coordinates."""


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
    """A head on g_low = ⟨G - Ḡ, V_k⟩; with `a` > 0 an ensemble with the same head in forward space, S = S_low + a · S_forward.

    The subspace is fitted on anchors, at most half of the ID samples; the head on the others (see `FitData.split`). Heads:

    - `probe_energy`, `probe_msp`, `probe_react`, `probe_bats`: a linear probe, see `LinearProbe`; forward: Energy (MSP) of the
      model's logits.
    - `knn`, `mahalanobis`, `mahalanobis_pp` (normalised coordinates, arXiv 2505.18032): forward: the same on the features.
    - `residual`: -‖(I - VVᵀ)(G - Ḡ)‖, the part outside the subspace; no forward score.
    - `vim`: lse - α ‖(I - VVᵀ)(G - Ḡ)‖ with α = Σ max logit / Σ residual over ID samples: ViM (arXiv 2203.10807) on the
      gradient's residual; no separate forward score.
    - `projected_norm`: ‖g_low‖, the part within the subspace of ID gradients; no forward score.

    Args:
        head: one of `HEADS`; mahalanobis is our default.
        n_components: K, or the explained share of the gradient variance. The paper uses 200 on CIFAR; 0.99 is our default.
        cotangent: the differentiated scalar; "energy" is the paper's.
        basis: form of the subspace. "dual", "explicit" and "factored" are PCA, as in the paper on CIFAR: over anchors, as explicit
            vectors, or in a product of two smaller subspaces that loses at most 1 % of the variance; "auto" is the cheaper of the
            first two for batches of 64, see `ood_engine.subspace.plan`. "class_average", as in the paper on ImageNet, is the mean
            gradient of each true class, and ignores n_components.
        normalisation: "none" (our default), "nfk" (the paper's, for "explicit" and "class_average") or "nfk-separable" (its
            separable approximation, for all).
        max_anchors: maximum number of anchors, up to 8192 for "auto", "dual" and "explicit"; class averages up to 2 GiB are over
            half of all samples instead.
        anchors: selection method, see `ood_engine.subspace.anchors.choose_anchors`: "first" is a random choice, for any basis;
            "class_balanced" and "pivoted" choose among 16 times as many samples, for "dual" and "auto". All chosen here.
        k: neighbour of the `knn` head; the paper's code uses 5 and 10.
        epochs: training epochs of the probe; the paper's code uses 10.
        a: weight of the forward score, tuned in the paper with values unknown to us; 1 is our default in
            `low_dim_gradient_ensemble`.
        react_from: first coordinate clipped by `probe_react`; the paper's code uses 10 on CIFAR, 950 on ImageNet.

    Raises:
        InputError: settings that are unknown, out of range or incompatible.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["low_dim_gradient"]).fit([torch.rand(64, 1, 8, 8)], labels="predicted")
        >>> engine.score(torch.rand(2, 1, 8, 8))["low_dim_gradient"].shape
        torch.Size([2])
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
    ) -> None:
        super().__init__(*(["alpha"] if head == "vim" else []))
        if head not in HEADS:
            raise InputError(f"head={head!r}: {one_of(head, HEADS)}")
        self._head = head
        self._subspace = GradientSubspace(basis, n_components, cotangent, normalisation, max_anchors, anchors)
        self._subspace.check()
        self.basis: Basis = self._subspace.unfitted()
        kind, settings = self._kind, HeadSettings(k, epochs, react_from)
        self.low = kind.make(settings) if kind else None
        self.forward_side = kind.make(settings) if kind and self._judges_features and a != 0 else None
        self._set_a(a)

    @property
    def head(self) -> str:
        """Name of the head."""
        return self._head

    @property
    def _kind(self) -> HeadKind | None:
        """The head on the coordinates; None for a residual or norm."""
        return VECTOR_HEADS.get(self._head)

    @property
    def _judges_features(self) -> bool:
        """Whether the forward score is the same head on the features."""
        return self._kind is not None and self._kind.forward_score is None

    def fit(self, data: FitData) -> None:
        """Fit the subspace on the anchors, and the heads on the other samples."""
        candidates = self._subspace.candidates(data)
        anchors, others = data.split(candidates)
        self.basis = self._subspace.fit(data, anchors).to(self._place.device)
        if self.low is not None:
            coordinates = data.collect(self._subspace, others, lambda signals: signals.coordinates(self.basis))
            self.low.fit_samples(coordinates, data, others)
        if self.forward_side is not None:
            features = data.collect(("features", candidates), others, lambda signals: signals.features)
            self.forward_side.fit_samples(features, data, others)
        if self._head == "vim":
            key = ("virtual logit scale", self._subspace)
            self.set_fitted(alpha=data.shared(key, lambda: self._virtual_logit_scale(data, others)))

    def _virtual_logit_scale(self, data: FitData, index: Tensor) -> Tensor:
        """α of ViM: the sum of the largest logits over that of the residuals."""
        logits, residuals = (torch.zeros((), dtype=torch.float64, device="cpu") for _ in range(2))
        for signals in data.signals(index):
            logits = logits + (signals.lse + signals.probabilities.amax(1).log()).double().sum().cpu()
            residuals = residuals + self._residual(signals).sum().cpu()
        if not residuals > 0:
            raise InputError(
                "the vim head: the subspace contains all gradients, so there is no residual; use fewer components"
            )
        return logits / residuals

    def _residual(self, signals: Signals) -> Tensor:
        """[N] residual norm in fp64, shared by all detectors on the same subspace."""
        key = ("residual norm", self.basis)
        return signals.shared(key, lambda: self.basis.residual_norm(signals.probabilities, signals.features))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        below = f"{prefix}basis."
        stored = {name.removeprefix(below) for name in state_dict if name.startswith(below)}
        self.basis = self._subspace.unfitted(stored).to(self._place.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def gradient_basis(self) -> Basis | None:
        """The subspace; None for heads on the residual."""
        return None if self._head in _RESIDUAL_HEADS else self.basis

    def forward(self, signals: Signals) -> Tensor:
        """[N] score of the gradient, plus a times the forward score."""
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
        kind = self._kind
        if kind and kind.forward_score:
            return kind.forward_score(signals)
        assert self.forward_side is not None
        score: Tensor = self.forward_side(signals.features)
        return score

    def grid(self) -> Sequence[dict[str, Any]]:
        """Weights of the forward score, if any: 0.1 to 10 in steps of about 3, chosen here."""
        return [{"a": a} for a in (0.1, 0.3, 1.0, 3.0, 10.0)] if self._a != 0 else ()

    def configure(self, **settings: Any) -> None:
        """Change the weight of the forward score."""
        if settings["a"] > 0 and self._judges_features and self.forward_side is None:
            raise InputError(f"a={settings['a']!r}: the forward side was not fitted; use refit(a=...) instead")
        self._set_a(settings["a"])
        super().configure(**settings)

    def _set_a(self, a: float) -> None:
        if not isinstance(a, (int, float)) or not 0 <= a < float("inf"):
            raise InputError(f"a={a!r}: expected a finite weight of at least 0")
        if a > 0 and self._kind is None:
            raise InputError(f"a={a!r} with the {self._head} head: it has no forward side; use a=0 or another head")
        self._a = float(a)
