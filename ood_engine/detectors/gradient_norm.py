"""Norms of the last-layer gradient in closed form: GradNorm (arXiv 2110.00218) and ExGrad (arXiv 2205.10439).

A gradient with respect to the weight is an outer product a ⊗ h, and ‖a ⊗ h‖₁ = ‖a‖₁ ‖h‖₁: no backward pass, and no loop over
samples or classes.
"""

from __future__ import annotations

from torch import Tensor

from ..features.signals import Signals
from .base import Detector, register

__all__ = ["ExGrad", "GradNorm"]


@register("gradnorm")
class GradNorm(Detector):
    """S = ‖∂ KL(u ‖ softmax z) / ∂W‖₁ with u uniform, = ‖h‖₁ · Σ_c |p_c - 1/C|; large for a peaked softmax of large features.

    Implementations that sum the cross-entropies over classes instead of averaging have C times this.
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] norm."""
        p = signals.probabilities
        return signals.features.abs().sum(1) * (p - 1.0 / p.shape[1]).abs().sum(1)


@register("exgrad")
class ExGrad(Detector):
    """S = -E_{y ~ p} ‖∂(-log p_y) / ∂W‖₁ = -2 ‖h‖₁ · Σ_c p_c (1 - p_c), the expected norm over labels drawn from the softmax.

    As published, higher means out-of-distribution; the sign is turned here.
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] negative expected norm."""
        p = signals.probabilities
        return -2 * signals.features.abs().sum(1) * (p * (1 - p)).sum(1)
