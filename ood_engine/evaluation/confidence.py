"""Calibration of the head, unpruned and pruned (OPNP, arXiv 2402.10062)."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok

from ..features.cache import NO_LABEL
from ..runtime import Kernels, Masks
from .metrics import ece_from_confidence

__all__ = ["HeadConfidence"]


class HeadConfidence:
    """Confidence (largest softmax probability) and correctness of one head on labelled samples.

    A pruned head is judged by its own predictions; the engine itself keeps those of the unpruned head.

    Args:
        head: the unpruned head.
        kernels: kernels of the engine's runtime.
        masks: (weight mask bool [C, D], neuron mask bool [D]) of the pruned head, True = keep; None for the unpruned head.
    """

    def __init__(self, head: ok.Head, kernels: Kernels, masks: Masks | None = None) -> None:
        weight_mask, self._neuron_mask = masks or (None, None)
        self._head = ok.Head(head.weight if weight_mask is None else head.weight * weight_mask, head.bias)
        self._kernels = kernels
        self._confidence: list[Tensor] = []
        self._is_right: list[Tensor] = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features [n, D] and labels [n]; samples without a label or a finite confidence are skipped."""
        kept = features if self._neuron_mask is None else features * self._neuron_mask
        _, _, p = self._kernels.masked_energy(kept, self._head, None)
        confidence, predicted = (column.cpu() for column in p.max(1))
        counted = (labels != NO_LABEL) & torch.isfinite(confidence)
        self._confidence.append(confidence[counted])
        self._is_right.append((predicted == labels)[counted])

    @property
    def ece(self) -> float | None:
        """Expected calibration error over 15 bins, a fraction; None if no sample was added."""
        confidence = torch.cat(self._confidence) if self._confidence else torch.empty(0, device="cpu")
        return ece_from_confidence(confidence, torch.cat(self._is_right)) if len(confidence) else None
