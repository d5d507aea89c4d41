"""A few ID samples and synthetic inputs stored with their scores, to detect what changed when a state is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import Calibration
from ..identity import SyntheticInputs
from .cache import CacheRows, FeatureCache

__all__ = ["SYNTHETIC_TOLERANCE", "Canary"]

_SAMPLES = 16
_TOLERANCE = 0.01
SYNTHETIC_TOLERANCE = 0.25
"""Largest move of a score on synthetic inputs, relative to its spread on ID samples or its distance from them; our choice.

On a small CNN, weights of 8 bits move the worst detector by 3 to 16 %, another first convolution by 65 to 88 %.
"""


@dataclass
class Canary:
    """Cached rows of a few ID samples, synthetic inputs of the whole model, and the scores of both at the time of saving."""

    rows: CacheRows
    scores: Mapping[str, Tensor]
    inputs: SyntheticInputs
    synthetic: Mapping[str, Tensor]

    @property
    def is_decisive(self) -> bool:
        """Whether a synthetic input has a score: where none has, as none agrees with the model's own, any backbone moves none."""
        return any(bool(torch.isfinite(scores).any()) for scores in self.synthetic.values())

    @staticmethod
    def choose(cache: FeatureCache) -> CacheRows:
        """The samples with the largest fingerprints; the anchors of a basis have the smallest."""
        return cache.rows.select(torch.argsort(cache.rows.fingerprints, descending=True)[:_SAMPLES])

    def drift(self, now: Mapping[str, Tensor], calibrations: Mapping[str, Calibration]) -> list[str]:
        """One line per detector whose scores moved by more than 1 % of the canaries' spread, or whose decisions changed."""
        reports = []
        for name, before in self.scores.items():
            difference = float((now[name] - before).abs().max())
            allowed = _TOLERANCE * _spread(before)
            if not difference <= allowed:
                reports.append(f"{name}: scores moved by up to {difference:.3g}, where {allowed:.3g} is allowed")
            if name in calibrations:
                decide = calibrations[name].is_out_of_distribution
                changed = int((decide(now[name]) != decide(before)).sum())
                if changed:
                    reports.append(f"{name}: {changed} of {len(before)} decisions changed")
        return reports

    def synthetic_drift(self, now: Mapping[str, Tensor]) -> tuple[float, str]:
        """The largest move of a score on the synthetic inputs relative to its spread on the ID samples or its distance from their
        mean, the larger; and the detector's name.
        """
        moves = {}
        for name, before in self.synthetic.items():
            lost = torch.isnan(before) | torch.isnan(now[name])
            both = torch.isnan(before) & torch.isnan(now[name])
            moved = (now[name].double() - before.double()).abs().masked_fill(lost, torch.inf).masked_fill(both, 0)
            distance = float((before - self.scores[name].mean()).nan_to_num().abs().max())
            moves[name] = float(moved.max()) / max(_spread(self.scores[name]), distance)
        name = max(moves, key=lambda one: moves[one])
        return moves[name], name


def _spread(scores: Tensor) -> float:
    """Largest minus smallest, at least 1e-3 of the largest magnitude."""
    return max(float(scores.max() - scores.min()), 1e-3 * float(scores.abs().max()), 1e-30)
