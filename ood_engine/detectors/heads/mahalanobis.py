"""Mahalanobis distance to the nearest class mean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...features.fit_data import FitData
from .base import VectorHead

__all__ = ["Mahalanobis"]

_BLOCK_ROWS = 8192


class Mahalanobis(VectorHead):
    """S = -min_c (x - μ_c)ᵀ Σ⁻¹ (x - μ_c), with class means and one shared covariance (arXiv 1807.03888).

    Σ is whitened once, in fp64. Variances are floored at 1e-6 of the largest, for finite scores with fewer samples than
    dimensions (our default; the paper gives none).

    Args:
        normalise: L2-normalise the vectors first: Mahalanobis++ (arXiv 2505.18032).
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__("whitening", "means")
        self.normalise = normalise

    def fit(self, x: Tensor, labels: Tensor) -> None:
        """Estimate means and covariance from x [m, K] and labels [m].

        Raises:
            InputError: fewer than two samples, or no variation within classes beyond rounding.
        """
        if x.shape[0] < 2:
            raise InputError(
                f"a covariance of {x.shape[0]} samples: expected at least 2 ID samples besides the anchors; fit on more"
            )
        classes, index = labels.to(x.device).unique(return_inverse=True)
        means, largest_value = self._class_means(x, index, len(classes))
        covariance = torch.zeros((x.shape[1], x.shape[1]), dtype=torch.float64, device=x.device)
        for part, members in self._blocks(x, index):
            centred = part.double() - means[members]
            covariance += centred.T @ centred
        variances, directions = torch.linalg.eigh(covariance / x.shape[0])
        largest = float(variances[-1])
        rounding = torch.finfo(x.dtype).eps * largest_value
        if not largest > rounding**2:
            raise InputError(
                f"a covariance of {x.shape[0]} samples in {len(classes)} classes: expected some that differ within their class"
                " besides the anchors; fit on more, and more varied, ID samples"
            )
        variances = variances.clamp_min(largest * 1e-6)
        whitening = directions / variances.sqrt()
        self.set_fitted(whitening=whitening, means=means @ whitening)

    def fit_samples(self, x: Tensor, data: FitData, index: Tensor) -> None:
        """Fit on the vectors x [m, K] of the ID samples at `index` and their labels."""
        self.fit(x, data.labels(index))

    def forward(self, x: Tensor) -> Tensor:
        """[N] negative squared distance to the nearest class, computed in fp64."""
        whitened, means = self._prepare(x).double() @ self.fitted("whitening"), self.fitted("means")
        squared = whitened.square().sum(1, keepdim=True) - 2 * whitened @ means.T + means.square().sum(1)
        return -squared.amin(1).clamp_min(0)

    def _class_means(self, x: Tensor, index: Tensor, classes: int) -> tuple[Tensor, float]:
        """([classes, K] means in fp64, the largest magnitude)."""
        sums = torch.zeros((classes, x.shape[1]), dtype=torch.float64, device=x.device)
        largest = 0.0
        for part, members in self._blocks(x, index):
            sums.index_add_(0, members, part.double())
            largest = max(largest, float(part.abs().max()))
        return sums / torch.bincount(index, minlength=classes)[:, None], largest

    def _blocks(self, x: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """x, which may be memory-mapped and larger than memory, and the class of each row, in chunks."""
        for start in range(0, x.shape[0], _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            yield self._prepare(x[here]), index[here]

    def _prepare(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) if self.normalise else x
