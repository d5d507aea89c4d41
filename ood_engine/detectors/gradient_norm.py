"""Closed-form norms of the last-layer gradient: GradNorm (arXiv 2110.00218) and ExGrad (arXiv 2205.10439).

The gradient with respect to the weight is an outer product a ⊗ h with ‖a ⊗ h‖₁ = ‖a‖₁ ‖h‖₁: no backward pass, no loop over
samples or classes.
"""

from __future__ import annotations

from torch import Tensor

from ..features.signals import Signals
from .base import Detector, register

__all__ = ["ExGrad", "GradNorm"]


@register("gradnorm")
class GradNorm(Detector):
    """S = ‖∂ KL(u ‖ softmax z) / ∂W‖₁ with u uniform, = ‖h‖₁ · Σ_c |p_c - 1/C|; large for a peaked softmax and large features.

    Implementations that sum the cross-entropies over classes instead of averaging return C times this.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["gradnorm"]).fit([torch.rand(64, 1, 8, 8)])
        >>> score = engine.score(torch.rand(2, 1, 8, 8))["gradnorm"]
        >>> bool((score >= 0).all())
        True
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] norm."""
        p = signals.probabilities
        return signals.features.abs().sum(1) * (p - 1.0 / p.shape[1]).abs().sum(1)


@register("exgrad")
class ExGrad(Detector):
    """S = -E_{y ~ p} ‖∂(-log p_y) / ∂W‖₁ = -2 ‖h‖₁ · Σ_c p_c (1 - p_c), the negative expected norm over labels drawn from p.

    The published score has the opposite sign: higher means out-of-distribution.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["exgrad"]).fit([torch.rand(64, 1, 8, 8)])
        >>> score = engine.score(torch.rand(2, 1, 8, 8))["exgrad"]
        >>> bool((score <= 0).all())
        True
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] negative expected norm."""
        p = signals.probabilities
        return -2 * signals.features.abs().sum(1) * (p * (1 - p)).sum(1)
