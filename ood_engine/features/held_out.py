"""Are calibration and evaluation images those of `fit`?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError, InputError
from .cache import CacheRows, FeatureCache

__all__ = ["HeldOut"]


class HeldOut:
    """Images held against those of `fit` by their fingerprints, batch by batch, so that the first duplicate ends a long pass.

    Args:
        used: int64 [n] fingerprints of the images of `fit`.
        overlap: "refuse" or "drop" images used in `fit`.

    Raises:
        InputError: another `overlap`.
    """

    def __init__(self, used: Tensor, overlap: str = "refuse") -> None:
        if overlap not in ("refuse", "drop"):
            raise InputError(f"overlap={overlap!r}: expected 'refuse' or 'drop'")
        self._used = used
        self._overlap = overlap
        self._count = 0

    def check(self, rows: CacheRows) -> None:
        """Raise CalibrationError for a batch that holds an image of `fit`, unless these are dropped."""
        used = torch.isin(rows.fingerprints.cpu(), self._used)
        if used.any() and self._overlap == "refuse":
            raise CalibrationError(
                f"calibration image {self._count + int(used.nonzero()[0])} was used in fit: expected fresh ID images; hold some"
                " out, or pass overlap='drop'"
            )
        self._count += len(used)

    def kept(self, cache: FeatureCache) -> FeatureCache:
        """The samples that were not used in `fit`; raises CalibrationError if there are none."""
        used = torch.isin(cache.rows.fingerprints, self._used)
        if used.all():
            raise CalibrationError(
                f"all {len(cache)} calibration images were used in fit: expected fresh ID images; hold some out"
            )
        return FeatureCache(cache.rows.select((~used).nonzero().flatten())) if used.any() else cache
