"""Data of the figures: histograms over shared bins, and ROC curves thinned for drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Histogram", "histogram", "roc_curve"]

SHOWN_QUANTILES = (0.005, 0.995)
LARGEST, SMALLEST_SPAN = 1e300, 1e-300


@dataclass(frozen=True)
class Histogram:
    """Densities of ID and OOD scores over the same equal bins.

    Attributes:
        edges: [B + 1] bin edges.
        id_heights: [B] density of the ID scores, relative to the higher of the two peaks.
        ood_heights: [B] likewise for the OOD scores.
    """

    edges: np.ndarray
    id_heights: np.ndarray
    ood_heights: np.ndarray


def histogram(id_scores: np.ndarray, ood_scores: np.ndarray) -> Histogram | None:
    """Histogram of finite scores between the 0.5 % and 99.5 % quantiles of either set; None if a set is empty.

    Densities are relative to all scores of a set, including those outside the range shown. There are √n bins (n of the smaller
    set), clipped to 12 to 60.
    """
    if not id_scores.size or not ood_scores.size:
        return None
    id_scores, ood_scores = (np.clip(scores, -LARGEST, LARGEST) for scores in (id_scores, ood_scores))
    low, high = _shown_range(id_scores, ood_scores)
    n_bins = int(np.clip(math.isqrt(min(id_scores.size, ood_scores.size)), 12, 60))
    edges = np.linspace(low, high, n_bins + 1)
    heights = [np.histogram(scores, bins=edges)[0] / scores.size for scores in (id_scores, ood_scores)]
    peak = max(float(part.max()) for part in heights) or 1.0
    return Histogram(edges, heights[0] / peak, heights[1] / peak)


def _shown_range(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[float, float]:
    both, (lowest, highest) = (id_scores, ood_scores), SHOWN_QUANTILES
    low = min(float(np.quantile(scores, lowest, method="lower")) for scores in both)
    high = max(float(np.quantile(scores, highest, method="higher")) for scores in both)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, SMALLEST_SPAN):
        margin = max(0.5, 0.05 * size)
        return low - margin, high + margin
    return low, high


def roc_curve(
    id_scores: np.ndarray, ood_scores: np.ndarray, n_points: int = 300
) -> tuple[np.ndarray, np.ndarray] | None:
    """ROC curve of finite scores, ID as the positive class: (FPR, TPR), each [M] from 0 to 1; None if a set is empty.

    Every point is exact: the shares of OOD and ID scores at or above a threshold, with ties counted together. Long curves are
    thinned to about `n_points`, evenly spaced along the curve.
    """
    if not id_scores.size or not ood_scores.size:
        return None
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]
    tpr, fpr = (
        np.concatenate([[0.0], 1 - np.searchsorted(np.sort(scores), thresholds, side="left") / scores.size])
        for scores in (id_scores, ood_scores)
    )
    kept = np.unique(np.searchsorted(fpr + tpr, np.linspace(0.0, 2.0, n_points)))
    return fpr[kept], tpr[kept]
