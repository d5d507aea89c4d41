"""Scores of the logits alone: Energy (arXiv 2010.03759), MSP (arXiv 1610.02136) and MaxLogit (arXiv 1911.11132)."""

from __future__ import annotations

from torch import Tensor

from ..features.signals import Signals
from .base import Detector, register

__all__ = ["MSP", "Energy", "MaxLogit"]


@register("energy")
class Energy(Detector):
    """S = log Σ_c exp(z_c), the negative free energy at temperature 1."""

    def forward(self, signals: Signals) -> Tensor:
        """[N] logsumexp of the logits."""
        return signals.lse


@register("msp")
class MSP(Detector):
    """S = max_c p_c, the maximum softmax probability."""

    def forward(self, signals: Signals) -> Tensor:
        """[N] largest probability, in (0, 1]."""
        return signals.probabilities.amax(1)


@register("max_logit")
class MaxLogit(Detector):
    """S = max_c z_c."""

    def forward(self, signals: Signals) -> Tensor:
        """[N] largest logit, from z_max = lse + log p_max: p_max is at least 1/C, so only lse is rounded."""
        return signals.lse + signals.probabilities.amax(1).log()
