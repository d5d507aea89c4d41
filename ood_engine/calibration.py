"""Conformal p-values and thresholds from held-out ID data alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import CalibrationError
from .fitted import FittedModule

__all__ = ["Calibration"]


class Calibration(FittedModule):
    """Sorted calibration scores of one detector, and the decision rule they define.

    The p-value of a score s is p = (1 + #{calibration ≤ s}) / (n + 1), and s is out-of-distribution iff p ≤ α. The expected
    false-alarm rate on new ID data is at most α for any distribution.

    Args:
        false_alarm_rate: α, in (0, 1).

    Raises:
        CalibrationError: α out of range.

    Example:
        >>> calibration = Calibration(0.25).fit(torch.arange(1.0, 8.0), "energy")
        >>> calibration.p_values(torch.tensor([1.0, 4.0]))
        tensor([0.2500, 0.6250], dtype=torch.float64)
        >>> calibration.is_out_of_distribution(torch.tensor([1.0, 4.0]))
        tensor([ True, False])
    """

    def __init__(self, false_alarm_rate: float = 0.05) -> None:
        super().__init__("scores")
        if not isinstance(false_alarm_rate, (int, float)) or not 0 < false_alarm_rate < 1:
            raise CalibrationError(f"false_alarm_rate={false_alarm_rate!r}: expected a share in (0, 1), such as 0.05")
        self.false_alarm_rate = false_alarm_rate

    def fit(self, scores: Tensor, name: str) -> Calibration:
        """Store the ID scores [n] of detector `name`. Returns self.

        Raises:
            CalibrationError: NaN or infinite scores, or n < 1/α - 1, too few to flag any score.
        """
        self.set_fitted(scores=scores.float().sort().values)
        return self.check(name)

    def check(self, name: str) -> Calibration:
        """Refuse scores of detector `name` from which no decision follows. Returns self.

        Raises:
            CalibrationError: not fp32 [n] in ascending order, or as `fit`.
        """
        scores = self.fitted("scores")
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            raise CalibrationError(
                f"{bad} of {len(scores)} calibration scores of {name!r} are NaN or infinite: expected finite ID images"
            )
        self.check_count(len(scores))
        if scores.dtype != torch.float32 or scores.ndim != 1 or (scores[1:] < scores[:-1]).any():
            raise CalibrationError(
                f"calibration scores of {name!r}: expected float32 [n] in ascending order, got {scores.dtype}"
                f" {list(scores.shape)}; calibrate again"
            )
        return self

    def check_count(self, count: int | None) -> None:
        """Raise CalibrationError for fewer than 1/α - 1 samples, too few to flag any score; None: an unknown number."""
        needed = math.ceil(1 / self.false_alarm_rate - 1 - 1e-9)
        if count is not None and count < needed:
            raise CalibrationError(
                f"{count} calibration samples for false_alarm_rate={self.false_alarm_rate}: expected at least {needed}; give more"
                " fresh ID images or a higher rate"
            )

    @property
    def threshold(self) -> Tensor:
        """0-d: the ⌊α(n + 1)⌋-th smallest calibration score; any score below it is out-of-distribution."""
        scores = self.fitted("scores")
        # The tolerance covers products such as 0.05 · 20 that round to just below an integer.
        return scores[math.floor(self.false_alarm_rate * (len(scores) + 1) + 1e-9) - 1]

    def p_values(self, scores: Tensor) -> Tensor:
        """Conformal p-values fp64 [N], NaN for a NaN score; small = unlike the calibration data.

        In fp32 a p-value equal to α rounds to above it for some n, and contradicts the decision.
        """
        calibration = self.fitted("scores").to(scores.device)
        at_most = torch.searchsorted(calibration, scores.float().contiguous(), right=True)
        p_values = (1 + at_most).double() / (len(calibration) + 1)
        return torch.where(torch.isnan(scores), torch.nan, p_values)

    def is_out_of_distribution(self, scores: Tensor) -> Tensor:
        """Bool [N], True = out-of-distribution; NaN scores are flagged."""
        return ~(scores >= self.threshold.to(scores.device))
