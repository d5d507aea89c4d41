"""Sums over samples from which a subspace is fitted, exact to merge: several workers, several sessions, one result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ood_kernels import reference

from ..errors import InputError, StateError
from .base import extend

__all__ = ["FitStatistics"]

_SUMS = ("gradient_sum", "cotangent_moment", "feature_moment", "square_sum", "class_counts", "class_feature_sums")
_ANCHORS = ("anchor_fingerprints", "anchor_p", "anchor_h", "anchor_labels")


class FitStatistics:
    """Counts, means and moments of last-layer gradients, and an anchor sample, over any number of batches.

    Sums are in fp64. The anchors are the `max_anchors` samples with the smallest fingerprints, so they depend neither on the order
    of the samples nor on how these were shared out, and equal images count once.

    Args:
        classes: C.
        features: D.
        max_anchors: most anchors to keep.
        cotangent: the scalar that is differentiated, see `ood_kernels.reference.cotangent`.
        bias: take the gradients of weight and bias together.

    Attributes:
        count: samples seen.
        gradient_sum: [C, D̃] Σ a h̃ᵀ.
        cotangent_moment: [C, C] Σ a aᵀ.
        feature_moment: [D̃, D̃] Σ h̃ h̃ᵀ.
        square_sum: 0-d Σ ‖a‖² ‖h̃‖².
        class_counts: [C] samples of each class, where labels came.
        class_feature_sums: [C, D̃] Σ h̃ over the samples of each class.
    """

    def __init__(
        self, classes: int, features: int, *, max_anchors: int = 4096, cotangent: str = "energy", bias: bool = True
    ) -> None:
        reference.check_cotangent(cotangent)
        if max_anchors < 0:
            raise InputError(f"max_anchors={max_anchors!r}: expected a whole number of at least 0")
        width = features + bias
        self.classes, self.features, self.max_anchors = classes, features, max_anchors
        self.cotangent, self.bias = cotangent, bias
        self.count = 0
        self.gradient_sum = torch.zeros(classes, width, dtype=torch.float64)
        self.cotangent_moment = torch.zeros(classes, classes, dtype=torch.float64)
        self.feature_moment = torch.zeros(width, width, dtype=torch.float64)
        self.square_sum = torch.zeros((), dtype=torch.float64)
        self.class_counts = torch.zeros(classes, dtype=torch.int64)
        self.class_feature_sums = torch.zeros(classes, width, dtype=torch.float64)
        self.anchor_fingerprints = torch.empty(0, dtype=torch.int64)
        self.anchor_p = torch.empty(0, classes)
        self.anchor_h = torch.empty(0, features)
        self.anchor_labels = torch.empty(0, dtype=torch.int64)

    def update(self, p: Tensor, h: Tensor, fingerprints: Tensor, labels: Tensor | None = None) -> FitStatistics:
        """Add a batch.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            fingerprints: int64 [n], see `ood_engine.features.cache.fingerprint`.
            labels: int64 [n], negative where there is none; None without any.

        Returns:
            Itself.

        Raises:
            InputError: shapes that do not fit, or values that are not finite.
        """
        samples = len(p)
        if p.shape != (samples, self.classes) or h.shape != (samples, self.features) or len(fingerprints) != samples:
            raise InputError(
                f"statistics of C = {self.classes}, D = {self.features}: expected p [n, C], h [n, D] and n fingerprints, got"
                f" {list(p.shape)}, {list(h.shape)} and {list(fingerprints.shape)}"
            )
        if not bool(torch.isfinite(p).all() & torch.isfinite(h).all()):
            raise InputError("samples with NaN or infinite p or h: expected finite samples; leave them out")
        p, h = p.detach().cpu(), h.detach().cpu()
        labels = torch.full((samples,), -1) if labels is None else labels.detach().cpu()
        a, extended = reference.cotangent(p.double(), self.cotangent), extend(h.double(), self.bias)
        self.count += samples
        self.gradient_sum += a.T @ extended
        self.cotangent_moment += a.T @ a
        self.feature_moment += extended.T @ extended
        self.square_sum += (a.square().sum(1) * extended.square().sum(1)).sum()
        known = labels >= 0
        self.class_counts += torch.bincount(labels[known], minlength=self.classes)
        self.class_feature_sums.index_add_(0, labels[known], extended[known])
        self._keep_anchors(fingerprints.detach().cpu(), p, h, labels)
        return self

    def merge(self, other: FitStatistics) -> FitStatistics:
        """The statistics of both parts together; neither is changed.

        Raises:
            InputError: parts of other sizes or settings.
        """
        ours, theirs = self._settings(), other._settings()
        if ours != theirs:
            raise InputError(f"statistics cannot be merged: expected equal settings, got {ours} and {theirs}")
        merged = FitStatistics(
            self.classes, self.features, max_anchors=self.max_anchors, cotangent=self.cotangent, bias=self.bias
        )
        merged.count = self.count + other.count
        for name in _SUMS:
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        for part in (self, other):
            merged._keep_anchors(part.anchor_fingerprints, part.anchor_p, part.anchor_h, part.anchor_labels)
        return merged

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient Ḡ."""
        return self.gradient_sum / max(1, self.count)

    @property
    def variance(self) -> float:
        """Σ ‖G - Ḡ‖² / n, the trace of the gradients' covariance."""
        return float(self.square_sum / max(1, self.count) - self.mean.square().sum())

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, from which a later session goes on; the old file stays until the new one is whole."""
        names = (*_SUMS, *_ANCHORS)
        metadata = {key: str(value) for key, value in self._settings().items()} | {"count": str(self.count)}
        partial = Path(f"{path}.partial")
        save_file({name: getattr(self, name).contiguous() for name in names}, partial, metadata=metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> FitStatistics:
        """Statistics from a file.

        Raises:
            StateError: not such a file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                statistics = cls(
                    int(header["classes"]),
                    int(header["features"]),
                    max_anchors=int(header["max_anchors"]),
                    cotangent=header["cotangent"],
                    bias=header["bias"] == "True",
                )
                statistics.count = int(header["count"])
                for name in (*_SUMS, *_ANCHORS):
                    setattr(statistics, name, file.get_tensor(name))
        except Exception as error:
            raise StateError(
                f"{path}: expected statistics written by FitStatistics.save ({type(error).__name__}); fit them again"
            ) from error
        return statistics

    def _settings(self) -> dict[str, int | str | bool]:
        names = ("classes", "features", "max_anchors", "cotangent", "bias")
        return {name: getattr(self, name) for name in names}

    def _keep_anchors(self, fingerprints: Tensor, p: Tensor, h: Tensor, labels: Tensor) -> None:
        """Of the anchors so far and these samples, those with the smallest fingerprints."""
        if len(self.anchor_fingerprints) == self.max_anchors and self.max_anchors:
            # Most of a large batch cannot get in: what cannot is not copied.
            chance = fingerprints < self.anchor_fingerprints[-1]
            fingerprints, p, h, labels = fingerprints[chance], p[chance], h[chance], labels[chance]
        together = torch.cat([self.anchor_fingerprints, fingerprints])
        order = torch.argsort(together, stable=True)
        ordered = together[order]
        first = torch.ones(len(ordered), dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        order = order[first][: self.max_anchors]
        self.anchor_fingerprints = together[order]
        self.anchor_p = torch.cat([self.anchor_p.to(p.dtype), p])[order]
        self.anchor_h = torch.cat([self.anchor_h.to(h.dtype), h])[order]
        self.anchor_labels = torch.cat([self.anchor_labels, labels])[order]
