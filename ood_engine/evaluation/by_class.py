"""The share of calibration samples that each detector flags, by predicted class."""

from __future__ import annotations

from typing import Any

import torch

from ..scorer import Scorer

__all__ = ["flagged_by_class"]


def flagged_by_class(scorer: Scorer) -> list[dict[str, Any]]:
    """One row per predicted class with its number of calibration samples, and detector → share of them that it flags.

    A false-alarm rate holds for all ID inputs together: rare classes can lie far above it, and frequent ones below.

    Args:
        scorer: a calibrated scorer.

    Returns:
        Rows {"class", "samples", "flagged"} in the order of the classes; none if the calibration features are not in memory.
    """
    cache, calibrations = scorer.calibration_cache, scorer.calibrations
    if cache is None or not calibrations:
        return []
    with torch.inference_mode(False), torch.no_grad():
        predicted = torch.cat([signals.probabilities.argmax(1).cpu() for signals in scorer.cached_signals(cache)])
        scores = scorer.score_cache(cache)
    flagged = {name: one.is_out_of_distribution(scores[name]).double() for name, one in calibrations.items()}
    rows = []
    for number in predicted.unique().tolist():
        members = predicted == number
        shares = {name: float(flags[members].mean()) for name, flags in flagged.items()}
        rows.append({"class": number, "samples": int(members.sum()), "flagged": shares})
    return rows
