"""NAP, the neural activation prior (arXiv 2402.18162): in-distribution inputs excite a channel at few places, strongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..features.signals import Signals
from .base import Detector, register

__all__ = ["NAP", "NAPMSP", "NAPEnergy", "combine"]

_SMALLEST_BASE = 1e-6


@register("nap")
class NAP(Detector):
    """S = (1/D) Σ_j (max_HW A_j / (mean_HW A_j + eps))².

    Args:
        eps: the paper's 1.0; part of the method, not a numerical guard.
    """

    needs_map = True

    def __init__(self, *, eps: float = 1.0) -> None:
        super().__init__()
        self._eps = check_eps(eps)

    @property
    def eps(self) -> float:
        """The constant in the ratio."""
        return self._eps

    def forward(self, signals: Signals) -> Tensor:
        """[N] NAP score."""
        return signals.nap(self._eps)


class _Combined(Detector):
    """S = B^w · S_NAP^(1-w) with a base score B > 0."""

    needs_map = True

    def __init__(self, *, eps: float = 1.0, w: float = 0.5) -> None:
        super().__init__()
        self._eps = check_eps(eps)
        self._w = check_weight(w)

    @property
    def eps(self) -> float:
        """The constant in the NAP ratio."""
        return self._eps

    def base(self, signals: Signals) -> Tensor:
        """[N] base score B."""
        raise NotImplementedError

    def forward(self, signals: Signals) -> Tensor:
        """[N] weighted geometric mean of base score and NAP."""
        return combine(self.base(signals), signals.nap(self._eps), self._w, signals, self.name)

    def grid(self) -> Sequence[dict[str, Any]]:
        """W in steps of 0.1, our reading of the paper's search."""
        return W_GRID

    def configure(self, **settings: Any) -> None:
        """Change w."""
        self._w = check_weight(settings["w"])
        super().configure(**settings)


@register("nap_energy")
class NAPEnergy(_Combined):
    """NAP with Energy: B = lse.

    Args:
        eps: the paper's 1.0.
        w: weight of the energy; the paper's 0.4 for CIFAR and 0.6 for ImageNet, chosen on pseudo-OOD data (`Engine.tune`);
            the default 0.5 is ours.
    """

    def __init__(self, *, eps: float = 1.0, w: float = 0.5) -> None:
        super().__init__(eps=eps, w=w)

    def base(self, signals: Signals) -> Tensor:
        """[N] lse."""
        return signals.lse


@register("nap_msp")
class NAPMSP(_Combined):
    """NAP with MSP: B = max p, our reading of the paper.

    Args:
        eps: the paper's 1.0.
        w: weight of MSP; the paper's 0.5 for CIFAR-10, 0.3 for CIFAR-100 and ImageNet; the default 0.3 follows the latter.
    """

    def __init__(self, *, eps: float = 1.0, w: float = 0.3) -> None:
        super().__init__(eps=eps, w=w)

    def base(self, signals: Signals) -> Tensor:
        """[N] largest probability."""
        return signals.probabilities.amax(1)


W_GRID: tuple[dict[str, Any], ...] = tuple({"w": step / 10} for step in range(11))


def combine(base: Tensor, nap: Tensor, w: float, signals: Signals, name: str) -> Tensor:
    """B^w · NAP^(1-w), [N].

    A base of 0 or less, which the paper does not cover, is clamped to 1e-6 and counted; w = 1 is the base itself, so there
    nothing is clamped.
    """
    if w == 1:
        # 0 · NAP keeps the NaN of a bad row, which NAP^0 = 1 would lose.
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
