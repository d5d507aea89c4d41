"""Low-dimensional gradients (arXiv 2310.17163): the last-layer gradient, projected onto few directions, then judged.

The paper differentiates all parameters; here it is the last layer, where the gradient has a closed form (see `ood_kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..fitting import FitData
from ..signals import Signals
from ..subspace import DualBasis, check_n_components
from .base import Detector, register
from .vector_heads import KNearestNeighbours, LinearProbe, Mahalanobis

__all__ = ["HEADS", "LowDimGradient"]

HEADS = ("probe_energy", "probe_msp", "knn", "mahalanobis", "residual")
"""How the coordinates are judged."""


_Head = LinearProbe | KNearestNeighbours | Mahalanobis


def _make_head(head: str, k: int, epochs: int) -> _Head | None:
    if head in ("probe_energy", "probe_msp"):
        return LinearProbe(head.removeprefix("probe_"), epochs)
    if head == "residual":
        return None
    return KNearestNeighbours(k) if head == "knn" else Mahalanobis()


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
@register("low_dim_gradient_knn", fixed=("head",), head="knn")
@register("low_dim_gradient_mahalanobis", fixed=("head",), head="mahalanobis")
@register("low_dim_gradient_residual", fixed=("head",), head="residual")
@register("low_dim_gradient_ensemble", head="probe_energy", a=1.0)
class LowDimGradient(Detector):
    """A detector on g_low = ⟨G - Ḡ, V_k⟩, plus, with `a` > 0, the same detector on the forward side: S = S_low + a · S_forward.

    The subspace is found from anchors, at most half of the ID samples; the head is fitted on the others (see `FitData.split`).
    Heads: `probe_energy`, `probe_msp` (a linear probe; forward side Energy, MSP of the model's logits), `knn`, `mahalanobis`
    (forward side the same on the penultimate features), `residual` (-‖(I - VVᵀ)(G - Ḡ)‖; no forward side).

    Args:
        head: one of `HEADS`; that `low_dim_gradient` by itself takes mahalanobis is ours.
        n_components: K as a number, or the share of gradient variance to explain. The paper takes 200 on CIFAR; 0.99 is ours.
        cotangent: the scalar that is differentiated; "energy" is the paper's.
        max_anchors: most anchors.
        k: neighbour of the `knn` head; the paper's code takes 5 and 10.
        epochs: of training the probe; the paper's code takes 10.
        a: weight of the forward side; the paper's value is not known, 1 in `low_dim_gradient_ensemble` is ours.
    """

    def __init__(
        self,
        *,
        head: str = "mahalanobis",
        n_components: int | float = 0.99,
        cotangent: str = "energy",
        max_anchors: int = 4096,
        k: int = 10,
        epochs: int = 10,
        a: float = 0.0,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise InputError(f"head={head!r}: expected one of {', '.join(HEADS)}")
        if not isinstance(max_anchors, int) or max_anchors < 2:
            raise InputError(f"max_anchors={max_anchors!r}: expected a whole number of at least 2")
        check_n_components(n_components)
        self._head = head
        self._max_anchors = max_anchors
        self._options = {"n_components": n_components, "cotangent": cotangent}
        self.basis = DualBasis(cotangent=cotangent)
        self.low = _make_head(head, k, epochs)
        self.forward_side = _make_head(head, k, epochs) if head in ("knn", "mahalanobis") and a != 0 else None
        self._set_a(a)

    def fit(self, data: FitData) -> None:
        """Find the subspace from the anchors and fit the heads on the other samples."""
        anchors, others = data.split(self._max_anchors)
        key = ("dual basis", self._max_anchors, *self._options.values())
        self.basis = data.shared(key, lambda: self._fit_basis(data, anchors)).to(self._place.device)
        if self.low is not None:
            coordinates = torch.cat([signals.coordinates(self.basis) for signals in data.signals(others)])
            _fit_head(self.low, coordinates, data, others)
        if self.forward_side is not None:
            _fit_head(
                self.forward_side, torch.cat([signals.features for signals in data.signals(others)]), data, others
            )

    def _fit_basis(self, data: FitData, anchors: Tensor) -> DualBasis:
        if len(anchors) < 2:
            raise InputError(
                f"{len(data)} ID samples, {data.distinct} of them different: expected at least 4 different ones, half of them"
                " anchors of the subspace; fit on more"
            )
        parts = [(signals.probabilities, signals.features) for signals in data.signals(anchors)]
        p, h = (torch.cat(column) for column in zip(*parts, strict=True))
        basis = DualBasis.fit(p, h, max_anchors=len(anchors), **self._options)  # type: ignore[arg-type]
        return basis

    def forward(self, signals: Signals) -> Tensor:
        """[N] score on the coordinates, plus a times that of the forward side."""
        if self.low is None:
            return -self.basis.residual_norm(signals.probabilities, signals.features)
        score: Tensor = self.low(signals.coordinates(self.basis))
        return score if self._a == 0 else score + self._a * self._forward_score(signals)

    def _forward_score(self, signals: Signals) -> Tensor:
        if self._head == "probe_energy":
            return signals.lse
        if self._head == "probe_msp":
            return signals.probabilities.amax(1)
        assert self.forward_side is not None
        score: Tensor = self.forward_side(signals.features)
        return score

    def grid(self) -> Sequence[dict[str, Any]]:
        """The weight of the forward side, where there is one: 0.1 to 10 in steps of about 3; ours."""
        return [{"a": a} for a in (0.1, 0.3, 1.0, 3.0, 10.0)] if self._a != 0 else ()

    def configure(self, **settings: Any) -> None:
        """Change the weight of the forward side."""
        if settings["a"] > 0 and self._head in ("knn", "mahalanobis") and self.forward_side is None:
            raise InputError(f"a={settings['a']!r}: the forward side was not fitted; use refit(a=...) instead")
        self._set_a(settings["a"])
        super().configure(**settings)

    def _set_a(self, a: float) -> None:
        if not isinstance(a, (int, float)) or not 0 <= a < float("inf"):
            raise InputError(f"a={a!r}: expected a finite weight of at least 0")
        if a > 0 and self._head == "residual":
            raise InputError(f"a={a!r} with the residual head: it has no forward side; use a=0 or another head")
        self._a = float(a)
