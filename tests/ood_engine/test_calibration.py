"""Conformal p-values and thresholds from calibration scores alone."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ood_engine.calibration import Calibration
from ood_engine.errors import CalibrationError, NotFittedError

few_values = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40)


@settings(deadline=None, max_examples=100)
@given(calibration=few_values, scores=few_values, percent=st.integers(1, 99))
def test_flagged_exactly_where_the_p_value_is_at_most_alpha(calibration, scores, percent):
    alpha = Fraction(percent, 100)
    assume(len(calibration) >= 1 / alpha - 1)
    fitted = Calibration(percent / 100).fit(torch.tensor(calibration), "x")
    expected = [Fraction(1 + sum(c <= s for c in calibration), len(calibration) + 1) for s in scores]
    p_values = fitted.p_values(torch.tensor(scores))
    assert p_values.dtype == torch.float64
    assert p_values.tolist() == [float(p) for p in expected]
    assert fitted.is_out_of_distribution(torch.tensor(scores)).tolist() == [p <= alpha for p in expected]


@pytest.mark.parametrize(
    ("count", "rate", "rank"), [(19, 0.05, 1), (39, 0.05, 2), (99, 0.07, 7), (9, 0.3, 3), (1, 0.5, 1)]
)
def test_threshold_is_a_calibration_score(count, rate, rank):
    calibration = Calibration(rate).fit(torch.randperm(count) + 1.0, "x")
    assert float(calibration.threshold) == rank
    assert calibration.is_out_of_distribution(torch.tensor([rank - 0.5, rank])).tolist() == [True, False]


@pytest.mark.parametrize(("count", "rate"), [(18, 0.05), (8, 0.1), (2, 0.25), (0, 0.5)])
def test_too_few_samples_are_refused(count, rate):
    needed = math.ceil(1 / rate - 1)
    message = rf"{count} calibration samples for false_alarm_rate={rate}: expected at least {needed}; give more"
    with pytest.raises(CalibrationError, match=message):
        Calibration(rate).fit(torch.zeros(count), "x")
    Calibration(rate).fit(torch.zeros(needed), "x")


def test_rates_are_shares_and_scores_finite():
    for rate in (0, 1, -0.1, 5, float("nan"), "5 %"):
        with pytest.raises(CalibrationError, match=r"false_alarm_rate=.*: expected a share in \(0, 1\)"):
            Calibration(rate)
    for value in (math.nan, math.inf, -math.inf):
        scores = torch.ones(50).index_fill_(0, torch.tensor([7]), value)
        with pytest.raises(CalibrationError, match="1 of 50 calibration scores of 'opnp' are NaN or infinite"):
            Calibration().fit(scores, "opnp")


def test_nan_is_flagged_and_has_no_p_value():
    calibration = Calibration(0.5).fit(torch.tensor([1.0, 2.0, 3.0]), "x")
    scores = torch.tensor([math.nan, 5.0])
    assert calibration.is_out_of_distribution(scores).tolist() == [True, False]
    assert calibration.p_values(scores).isnan().tolist() == [True, False]


def test_does_not_keep_the_callers_tensor():
    scores = torch.arange(10.0)
    calibration = Calibration(0.2).fit(scores, "x")
    scores.fill_(-1)
    assert calibration.fitted("scores").tolist() == list(range(10))


def test_not_fitted():
    with pytest.raises(NotFittedError, match="Calibration is not fitted"):
        Calibration().p_values(torch.zeros(3))


@pytest.mark.parametrize(
    "scores",
    [
        torch.arange(40.0).flip(0),
        torch.arange(40.0).view(20, 2),
        torch.arange(40.0).double(),
        torch.full((40,), torch.nan),
    ],
)
def test_scores_that_no_fit_leaves_are_refused(scores):
    calibration = Calibration(0.1)
    calibration.set_fitted(scores=scores)
    with pytest.raises(CalibrationError, match=r"'energy'.*: expected"):
        calibration.check("energy")


@pytest.mark.parametrize(("rate", "count"), [(0.05, 199), (0.1, 99), (0.3, 9), (0.07, 99), (1 / 3, 8)])
def test_p_values_never_contradict_the_decision_at_the_threshold(rate, count):
    calibration = Calibration(rate).fit(torch.arange(float(count)), "energy")
    scores = torch.cat([calibration.fitted("scores"), calibration.fitted("scores") - 0.5])
    p_values = calibration.p_values(scores)
    assert p_values.dtype == torch.float64
    assert torch.equal(p_values <= rate, calibration.is_out_of_distribution(scores))
