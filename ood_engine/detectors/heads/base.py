"""The interface of heads: scores of vectors [N, K], such as gradient coordinates or features."""

from __future__ import annotations

from torch import Tensor

from ...features.fit_data import FitData
from ...fitted import FittedModule

__all__ = ["VectorHead"]


class VectorHead(FittedModule):
    """One score of vectors: `forward(x)` returns [N], higher = more in-distribution; the fitted state is its buffers."""

    def fit_samples(self, x: Tensor, data: FitData, index: Tensor) -> None:
        """Fit on the vectors x [m, K] of the ID samples at `index`; their labels are loaded only if used."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Score [N] of x [N, K]."""
        raise NotImplementedError
