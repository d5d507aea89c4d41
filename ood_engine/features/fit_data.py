"""The input of fitting: the feature cache in canonical order, split into anchors and the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property

import torch
from torch import Tensor

import ood_kernels as ok

from ..errors import InputError, OodEngineWarning
from ..fitted import aligned
from ..runtime import Kernels
from .cache import NO_LABEL, CacheRows, FeatureCache
from .loader import with_progress
from .signals import Shared, Signals, wide

__all__ = ["FitData", "signals_from_rows"]

_SHORT = 65536


def signals_from_rows(rows: CacheRows, head: ok.Head, kernels: Kernels) -> Signals:
    """Signals of cached samples, on the device of the head, without running the model."""
    features, maximum, nap_mean = (
        aligned(wide(column.to(head.weight.device))) for column in (rows.features, rows.maximum, rows.nap_mean)
    )
    if maximum.shape[1] == 0:
        return Signals(features, head, kernels)
    statistics = ok.PoolStatistics(features, nap_mean if nap_mean.shape[1] else features, maximum)
    return Signals(features, head, kernels, statistics=statistics)


class FitData(Shared):
    """ID samples in order of their fingerprints, so that fits do not depend on the order of the loader.

    Args:
        cache: the ID samples.
        head: the unpruned head.
        kernels: operators, the same as for scoring.
        seed: seed of every random choice in fitting.
        progress: show a progress bar for every pass over a cache of more than 65 536 samples.
        use_predicted: take the predicted classes as labels.

    Attributes:
        are_labels_read: whether any detector asked for labels.

    Raises:
        InputError: non-finite samples, or labels out of the head's range, unless they are not read.
    """

    def __init__(
        self,
        cache: FeatureCache,
        head: ok.Head,
        kernels: Kernels,
        seed: int = 0,
        progress: bool = False,
        *,
        use_predicted: bool = False,
    ) -> None:
        super().__init__()
        self.cache = cache
        self._use_predicted = use_predicted
        self.are_labels_read = False
        self._progress = progress and len(cache) > _SHORT
        self.head = head
        self.kernels = kernels
        self.seed = seed
        self._order = torch.argsort(cache.rows.fingerprints, stable=True)
        self._check()

    def _check(self) -> None:
        count, classes = len(self.cache), self.head.weight.shape[0]
        start = 0
        for rows in self.cache.batches():
            bad = ~torch.isfinite(rows.features).all(1)
            if bad.any():
                first = start + int(bad.nonzero()[0])
                raise InputError(
                    f"sample {first} of {count} has NaN or infinite features: expected finite ID images; check that image,"
                    " or leave it out"
                )
            start += rows.features.shape[0]
        labels = self.cache.rows.labels
        wrong = ((labels < 0) & (labels != NO_LABEL)) | (labels >= classes)
        if wrong.any() and not self._use_predicted:
            first = int(wrong.nonzero()[0])
            raise InputError(
                f"label {int(labels[first])} of sample {first} is out of range: expected 0 to {classes - 1}, as the head has"
                f" {classes} classes; map the labels to those of the model, or fit without them by labels='predicted'"
                " (--labels predicted)"
            )

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def distinct(self) -> int:
        """Number of distinct samples."""
        return int(self.cache.rows.fingerprints.unique().numel())

    def split(self, max_anchors: int) -> tuple[Tensor, Tensor]:
        """(anchors, others): indices of the samples that define a subspace, and of those its detectors are fitted on.

        Anchors are the samples with the smallest fingerprints, at most `max_anchors` and at most half; equal images stay on one
        side. Coordinates of anchors are biased optimistically, so no detector is fitted on them.
        """
        wanted = min(max_anchors, len(self) // 2)
        ordered = self.cache.rows.fingerprints[self._order]
        cut = int(torch.searchsorted(ordered, ordered[wanted]))
        return self._order[:cut], self._order[cut:]

    def signals(self, index: Tensor | None = None, size: int = 4096) -> Iterator[Signals]:
        """Signals of the samples at `index` (default: all, in canonical order), in chunks of `size`."""
        index = self._order if index is None else index
        batches = self.cache.batches(index, size)
        for rows in with_progress(batches, "reading features", self._progress, total=-(-len(index) // size)):
            yield signals_from_rows(rows, self.head, self.kernels)

    def collect(self, key: Hashable, index: Tensor, of: Callable[[Signals], Tensor]) -> Tensor:
        """[m, K] values of `of` on the samples at `index`, collected once per key for all detectors.

        On the head's device, or in a memory-mapped file next to those of a mapped cache.
        """
        return self.shared(("collected", key), lambda: self._collect(index, of))

    def _collect(self, index: Tensor, of: Callable[[Signals], Tensor]) -> Tensor:
        collected, start = torch.empty(0, device="cpu"), 0
        for signals in self.signals(index):
            part = of(signals)
            if start == 0:
                collected = self.cache.empty((len(index), part.shape[1]), part)
            collected[start : start + len(part)] = part
            start += len(part)
        return collected

    @cached_property
    def predicted(self) -> Tensor:
        """int64 [n] predicted classes in the order of the cache, on the CPU."""
        order = torch.arange(len(self), device="cpu")
        return torch.cat([signals.probabilities.argmax(1).cpu() for signals in self.signals(order)])

    def labels(self, index: Tensor) -> Tensor:
        """int64 labels of the samples at `index`, on the head's device; predicted classes for unlabelled samples."""
        self.are_labels_read = True
        labels = self.cache.rows.labels[index]
        missing = torch.ones_like(labels, dtype=torch.bool) if self._use_predicted else labels == NO_LABEL
        if missing.any():
            if not self._use_predicted:
                self.shared("missing labels", lambda: _warn_missing(int(missing.sum())))
            labels = torch.where(missing, self.predicted[index], labels)
        return labels.to(self.head.weight.device)


def _warn_missing(count: int) -> None:
    warnings.warn(
        f"{count} samples have no label, so their predicted classes are used; pass labels='predicted' to choose these, or a"
        " loader of (images, labels)",
        OodEngineWarning,
        stacklevel=2,
    )
