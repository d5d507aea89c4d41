"""Statistics of a feature cache of any size: read in blocks, shown as it goes, and resumed where it stopped."""

from __future__ import annotations

from pathlib import Path

import ood_kernels as ok

from ..errors import InputError
from ..features.cache import FeatureCache
from ..features.loader import with_progress
from ..features.signals import wide
from .statistics import FitStatistics

__all__ = ["gather"]

_CHECKPOINT_BLOCKS = 16


def gather(
    cache: FeatureCache,
    head: ok.Head,
    *,
    max_anchors: int = 4096,
    cotangent: str = "energy",
    bias: bool = True,
    block: int = 4096,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> FitStatistics:
    """`FitStatistics` of a whole cache.

    At no time are more than `block` samples in memory beside the sums (C·D̃ + C² + D̃² numbers of fp64) and the anchors, so the
    memory does not grow with the cache, which may be mapped from a file and may hold its features in fp16.

    Args:
        cache: the ID samples.
        head: the unpruned head, from which the softmax is computed again.
        max_anchors: most anchors to keep.
        cotangent: the scalar that is differentiated.
        bias: take the gradients of weight and bias together.
        block: samples read at a time.
        checkpoint: a file that is written every 16 blocks and read at the start, so that a broken run goes on; the same cache,
            head and settings are the caller's to keep. None keeps nothing.
        progress: show a bar.

    Raises:
        InputError: features that are not finite, or a checkpoint of other settings or of a larger cache.
        StateError: a checkpoint that cannot be read.
    """
    classes, features = head.weight.shape
    statistics = FitStatistics(classes, features, max_anchors=max_anchors, cotangent=cotangent, bias=bias)
    if checkpoint is not None and Path(checkpoint).exists():
        # Merging refuses another width, cotangent or number of anchors.
        statistics = statistics.merge(FitStatistics.load(checkpoint))
    done = statistics.count
    if done > len(cache):
        raise InputError(
            f"{checkpoint}: holds {done} samples, the cache {len(cache)}: expected a checkpoint of this cache; remove the file"
        )
    starts = range(done, len(cache), block)
    for number, start in enumerate(with_progress(starts, "gathering", progress), 1):
        rows = cache.rows.select(slice(start, start + block))
        h = wide(rows.features)
        p = ok.masked_energy(h.to(head.weight.device), head.weight, head.bias)[2]
        statistics.update(p, h, rows.fingerprints, rows.labels)
        if checkpoint is not None and number % _CHECKPOINT_BLOCKS == 0:
            statistics.save(checkpoint)
    if checkpoint is not None:
        statistics.save(checkpoint)
    return statistics
