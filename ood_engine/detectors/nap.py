"""NAP, the neural activation prior (arXiv 2402.18162): ID inputs activate a channel strongly at few positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..features.signals import Signals
from .base import Detector, register

__all__ = ["NAP", "NAPMSP", "Combined", "NAPEnergy", "combine"]

_SMALLEST_BASE = 1e-6


@register("nap")
class NAP(Detector):
    """S = (1/D) Σ_j (max_HW A_j / (mean_HW A_j + eps))².

    Args:
        eps: 1.0 in the paper; part of the method, not a numerical safeguard.

    Raises:
        InputError: an eps that is not positive.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["nap"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["nap"].shape
        torch.Size([2])
    """

    needs_map = True
    assumes_one_class = False

    def __init__(self, *, eps: float = 1.0, **others: Any) -> None:
        super().__init__(**others)
        self._eps = check_eps(eps)

    @property
    def eps(self) -> float:
        """The constant in the denominator."""
        return self._eps

    def forward(self, signals: Signals) -> Tensor:
        """[N] NAP score."""
        return signals.nap(self._eps)


class Combined(NAP):
    """S = B^w · S_NAP^(1-w) with a base score B > 0; `others` are the settings of the base, if it is a detector itself."""

    assumes_one_class = True

    def __init__(self, *, eps: float = 1.0, w: float = 0.5, **others: Any) -> None:
        super().__init__(eps=eps, **others)
        self._w = check_weight(w)

    def base(self, signals: Signals) -> Tensor:
        """[N] base score B."""
        raise NotImplementedError

    def forward(self, signals: Signals) -> Tensor:
        """[N] weighted geometric mean of base score and NAP."""
        return combine(self.base(signals), signals.nap(self._eps), self._w, signals, self.name)

    def grid(self) -> Sequence[dict[str, Any]]:
        """Weights from 0 to 1 in steps of 0.1, our reading of the paper's search."""
        return [{"w": step / 10} for step in range(11)]

    def configure(self, **settings: Any) -> None:
        """Change w."""
        self._w = check_weight(settings.get("w", self._w))
        super().configure(**settings)


@register("nap_energy")
class NAPEnergy(Combined):
    """NAP with Energy: S = B^w · S_NAP^(1-w) with B = lse.

    Args:
        eps: 1.0 in the paper.
        w: weight of the energy; 0.4 for CIFAR and 0.6 for ImageNet in the paper, selected on pseudo-OOD data (`Engine.tune`);
            0.5 is our default.

    Raises:
        InputError: an eps that is not positive, or w outside [0, 1].

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["nap_energy"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["nap_energy"].shape
        torch.Size([2])
    """

    def base(self, signals: Signals) -> Tensor:
        """[N] lse."""
        return signals.lse


@register("nap_msp")
class NAPMSP(Combined):
    """NAP with MSP: S = B^w · S_NAP^(1-w) with B = max p, our reading of the paper.

    Args:
        eps: 1.0 in the paper.
        w: weight of MSP; 0.5 for CIFAR-10, 0.3 for CIFAR-100 and ImageNet in the paper; the default follows the latter.

    Raises:
        InputError: an eps that is not positive, or w outside [0, 1].

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["nap_msp"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["nap_msp"].shape
        torch.Size([2])
    """

    def __init__(self, *, eps: float = 1.0, w: float = 0.3) -> None:
        super().__init__(eps=eps, w=w)

    def base(self, signals: Signals) -> Tensor:
        """[N] largest probability."""
        return signals.probabilities.amax(1)


def combine(base: Tensor, nap: Tensor, w: float, signals: Signals, name: str) -> Tensor:
    """B^w · NAP^(1-w), [N].

    A base ≤ 0, not covered by the paper, is clamped to 1e-6 and counted; w = 1 is the base itself, without clamping.
    """
    if w == 1:
        # 0 · NAP propagates NaN, which NAP^0 = 1 would not.
        return base + 0 * nap
    if w == 0:
        return nap + 0 * base
    signals.count_clamped(name, base <= 0)
    return torch.clamp_min(base, _SMALLEST_BASE).pow(w) * nap.pow(1 - w)


def check_eps(eps: float) -> float:
    """Raise InputError unless eps is a positive number."""
    if not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
        raise InputError(f"eps={eps!r}: expected a positive number; the paper's is 1.0")
    return float(eps)


def check_weight(w: float) -> float:
    """Raise InputError unless w lies in [0, 1]."""
    if not isinstance(w, (int, float)) or not 0 <= w <= 1:
        raise InputError(f"w={w!r}: expected a number in [0, 1]")
    return float(w)
