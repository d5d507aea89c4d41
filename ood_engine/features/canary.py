"""A few ID samples stored with their scores, to detect numerical drift when a state is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import Calibration
from .cache import CacheRows, FeatureCache

__all__ = ["Canary"]

_SAMPLES = 16
_TOLERANCE = 0.01


@dataclass
class Canary:
    """Cached rows of a few ID samples and their scores at the time of saving."""

    rows: CacheRows
    scores: Mapping[str, Tensor]

    @staticmethod
    def choose(cache: FeatureCache) -> CacheRows:
        """The samples with the largest fingerprints; the anchors of a basis have the smallest."""
        return cache.rows.select(torch.argsort(cache.rows.fingerprints, descending=True)[:_SAMPLES])

    def drift(self, now: Mapping[str, Tensor], calibrations: Mapping[str, Calibration]) -> list[str]:
        """One line per detector whose scores moved by more than 1 % of the canaries' spread, or whose decisions changed."""
        reports = []
        for name, before in self.scores.items():
            difference = float((now[name] - before).abs().max())
            spread = float(before.max() - before.min())
            allowed = _TOLERANCE * max(spread, 1e-3 * float(before.abs().max()))
            if not difference <= allowed:
                reports.append(f"{name}: scores moved by up to {difference:.3g}, where {allowed:.3g} is allowed")
            if name in calibrations:
                decide = calibrations[name].is_out_of_distribution
                changed = int((decide(now[name]) != decide(before)).sum())
                if changed:
                    reports.append(f"{name}: {changed} of {len(before)} decisions changed")
        return reports
