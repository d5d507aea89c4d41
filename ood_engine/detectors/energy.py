"""Scores of the logits alone: Energy (arXiv 2010.03759), MSP (arXiv 1610.02136) and MaxLogit (arXiv 1911.11132)."""

from __future__ import annotations

from torch import Tensor

from ..features.signals import Signals
from .base import Detector, register

__all__ = ["MSP", "Energy", "MaxLogit"]


@register("energy")
class Energy(Detector):
    """S = log Σ_c exp(z_c), the negative free energy at temperature 1.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["energy"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["energy"].shape
        torch.Size([2])
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] logsumexp of the logits."""
        return signals.lse


@register("msp")
class MSP(Detector):
    """S = max_c p_c, the maximum softmax probability.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["msp"]).fit([torch.rand(64, 1, 8, 8)])
        >>> score = engine.score(torch.rand(2, 1, 8, 8))["msp"]
        >>> bool((score > 1 / 8).all() and (score < 1).all())
        True
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] largest probability, in (0, 1]."""
        return signals.probabilities.amax(1)


@register("max_logit")
class MaxLogit(Detector):
    """S = max_c z_c, the largest logit.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["max_logit"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["max_logit"].shape
        torch.Size([2])
    """

    def forward(self, signals: Signals) -> Tensor:
        """[N] largest logit as lse + log p_max, which is well conditioned since p_max ≥ 1/C."""
        return signals.lse + signals.probabilities.amax(1).log()
