"""Cosine similarity to the k-th nearest ID vector."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...features.fit_data import FitData
from .base import VectorHead

__all__ = ["KNearestNeighbours"]

_BLOCK_ELEMENTS = 4 * 2**20


class KNearestNeighbours(VectorHead):
    """Cosine similarity to the k-th nearest of a bank of ID vectors (arXiv 2204.06507).

    On L2-normalised vectors it equals 1 - r_k²/2 with r_k the distance to the k-th neighbour: the same ranking as -r_k, and well
    conditioned for small r_k.

    Args:
        k: rank of the neighbour; the code of arXiv 2310.17163 uses 5 and 10.

    Raises:
        InputError: a k below 1.
    """

    def __init__(self, k: int = 10) -> None:
        super().__init__("bank")
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k={k!r}: expected a whole number of at least 1")
        self.k = k

    def fit(self, x: Tensor) -> None:
        """Store the normalised vectors x [m, K].

        Raises:
            InputError: fewer than k vectors.
        """
        if x.shape[0] < self.k:
            raise InputError(
                f"k={self.k} neighbours with a bank of {x.shape[0]}: expected at least k ID samples; fit on more"
            )
        self.set_fitted(bank=F.normalize(x, dim=1))

    def fit_samples(self, x: Tensor, data: FitData, index: Tensor) -> None:
        """Fit on the vectors x [m, K] of the ID samples at `index`, without labels."""
        self.fit(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N] similarity, in [-1, 1]."""
        bank = self.fitted("bank")
        rows = max(1, _BLOCK_ELEMENTS // bank.shape[0])
        normalised = F.normalize(x.to(bank.dtype), dim=1)
        scores = x.new_empty(x.shape[0], dtype=bank.dtype)
        for start in range(0, x.shape[0], rows):
            scores[start : start + rows] = (normalised[start : start + rows] @ bank.T).topk(self.k, dim=1).values[:, -1]
        return scores
