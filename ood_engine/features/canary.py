"""A few ID features kept with their scores, replayed wherever a state is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import Calibration
from ..errors import StateDriftWarning
from ..scorer import Pipeline
from .cache import CacheRows, FeatureCache

__all__ = ["Canary"]

_SAMPLES = 16
_TOLERANCE = 0.01


@dataclass
class Canary:
    """Cached rows of a few ID samples and the scores they had when the state was saved."""

    rows: CacheRows
    scores: dict[str, Tensor]

    @classmethod
    def take(cls, pipeline: Pipeline, cache: FeatureCache) -> Canary:
        """The samples with the largest fingerprints, scored now; anchors of a basis are those with the smallest."""
        rows = cache.rows.select(torch.argsort(cache.rows.fingerprints, descending=True)[:_SAMPLES])
        return cls(rows, dict(pipeline.score_rows(FeatureCache(rows))))

    def replay(self, pipeline: Pipeline, calibrations: dict[str, Calibration]) -> list[str]:
        """Score again on this device and dtype; warn about, and return, what came out differently.

        Reported is a score that moved by more than 1 % of the canaries' own spread, and a decision that changed.
        """
        reports = []
        now = pipeline.score_rows(FeatureCache(self.rows))
        for name, before in self.scores.items():
            drift = float((now[name] - before).abs().max())
            spread = float(before.max() - before.min())
            allowed = _TOLERANCE * max(spread, 1e-3 * float(before.abs().max()))
            if not drift <= allowed:
                reports.append(f"{name}: scores moved by up to {drift:.3g}, where {allowed:.3g} is allowed")
            if name in calibrations:
                decide = calibrations[name].cpu().is_out_of_distribution
                changed = int((decide(now[name]) != decide(before)).sum())
                if changed:
                    reports.append(f"{name}: {changed} of {len(before)} decisions changed")
        if reports:
            place = f"{pipeline.tap.device}, {pipeline.tap.head.weight.dtype}"
            warnings.warn(
                f"the loaded state drifts on this machine ({place}): {'; '.join(reports)}; fit again here, or load with the"
                " device and dtype it was fitted on",
                StateDriftWarning,
                stacklevel=4,
            )
        return reports
