"""Heads by name: scores of vectors such as gradient coordinates or features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...features.signals import Signals
from .base import VectorHead
from .knn import KNearestNeighbours
from .linear_probe import LinearProbe
from .mahalanobis import Mahalanobis

__all__ = ["VECTOR_HEADS", "HeadKind", "HeadSettings", "KNearestNeighbours", "LinearProbe", "Mahalanobis", "VectorHead"]


class HeadSettings(NamedTuple):
    """Settings of all heads; each uses its own. Values of the paper are those of the code of arXiv 2310.17163.

    Attributes:
        k: neighbour of `knn`; 5 and 10 in the paper.
        epochs: training epochs of a probe; 10 in the paper.
        react_from: first coordinate clipped by `probe_react`; 10 on CIFAR, 950 on ImageNet in the paper.
    """

    k: int = 10
    epochs: int = 10
    react_from: int = 10


class HeadKind(NamedTuple):
    """A head by name.

    Attributes:
        make: settings → unfitted head.
        forward_score: signals → [N], the matching score of the model's logits; None if the forward score is the same head on
            the features.
    """

    make: Callable[[HeadSettings], VectorHead]
    forward_score: Callable[[Signals], Tensor] | None = None


def _probe(score: str, clamp: str = "none") -> Callable[[HeadSettings], VectorHead]:
    return lambda settings: LinearProbe(score, settings.epochs, clamp=clamp, react_from=settings.react_from)


VECTOR_HEADS: dict[str, HeadKind] = {
    "probe_energy": HeadKind(_probe("energy"), lambda signals: signals.lse),
    "probe_msp": HeadKind(_probe("msp"), lambda signals: signals.probabilities.amax(1)),
    "probe_react": HeadKind(_probe("energy", "react"), lambda signals: signals.lse),
    "probe_bats": HeadKind(_probe("energy", "bats"), lambda signals: signals.lse),
    "knn": HeadKind(lambda settings: KNearestNeighbours(settings.k)),
    "mahalanobis": HeadKind(lambda settings: Mahalanobis()),
    "mahalanobis_pp": HeadKind(lambda settings: Mahalanobis(normalise=True)),
}
"""A new head takes one file here and one line in this table."""
