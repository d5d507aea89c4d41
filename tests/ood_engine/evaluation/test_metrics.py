from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError
from ood_engine.evaluation import metrics

tied_scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30)
SCORE_FUNCTIONS = [metrics.auroc, metrics.evaluate, metrics.fpr_at_tpr]
PAIRED_FUNCTIONS = [metrics.aupr, metrics.average_precision, metrics.fpr_at_tpr]


def pairwise_auroc(id_scores, ood_scores):
    wins = [(a > b) + 0.5 * (a == b) for a in id_scores for b in ood_scores]
    return sum(wins) / len(wins)


def operating_points(positives, negatives):
    """(true positives, false positives) at every threshold, strictest first, beginning with nothing accepted."""
    thresholds = sorted({*positives, *negatives}, reverse=True)
    counts = [(sum(p >= t for p in positives), sum(n >= t for n in negatives)) for t in thresholds]
    return [(0, 0), *counts]


def sweep(id_scores, ood_scores, positive):
    if positive == "id":
        return operating_points(id_scores, ood_scores), len(id_scores), len(ood_scores)
    return operating_points([-s for s in ood_scores], [-s for s in id_scores]), len(ood_scores), len(id_scores)


@settings(deadline=None, max_examples=50)
@given(tied_scores, tied_scores)
def test_auroc_is_the_share_of_ordered_pairs_with_ties_as_half(id_scores, ood_scores):
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(pairwise_auroc(id_scores, ood_scores), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(tied_scores, tied_scores, st.sampled_from(["id", "ood"]), st.sampled_from([0.01, 0.5, 0.8, 0.9, 0.95, 1.0]))
def test_fpr_is_the_smallest_of_a_threshold_sweep(id_scores, ood_scores, positive, tpr):
    points, n_positive, n_negative = sweep(id_scores, ood_scores, positive)
    expected = min(fp / n_negative for tp, fp in points if tp / n_positive >= tpr)
    assert metrics.fpr_at_tpr(id_scores, ood_scores, positive=positive, tpr=tpr) == expected


@settings(deadline=None, max_examples=50)
@given(tied_scores, tied_scores, st.sampled_from(["id", "ood"]))
def test_precision_recall_areas_equal_a_threshold_sweep(id_scores, ood_scores, positive):
    points, n_positive, _ = sweep(id_scores, ood_scores, positive)
    recalls = [tp / n_positive for tp, _ in points]
    precisions = [tp / (tp + fp) if tp + fp else 1.0 for tp, fp in points]
    steps = [b - a for a, b in pairwise(recalls)]
    rectangles = sum(step * p for step, p in zip(steps, precisions[1:], strict=True))
    trapezoids = sum(step * (a + b) / 2 for step, (a, b) in zip(steps, pairwise(precisions), strict=True))
    assert metrics.average_precision(id_scores, ood_scores, positive=positive) == pytest.approx(rectangles, abs=1e-12)
    assert metrics.aupr(id_scores, ood_scores, positive=positive) == pytest.approx(trapezoids, abs=1e-12)


def test_golden_values_by_hand():
    # Ranked: 4 id, 3 id+ood, 2 ood, 1 id. Pairs won: 4>3, 4>2, 3=3 (half), 3>2; 1 loses both.
    figures = metrics.evaluate([4.0, 3.0, 1.0], [3.0, 2.0])
    assert figures == pytest.approx(
        {
            "auroc": 3.5 / 6,
            # (recall, precision) = (0, 1) (1/3, 1) (2/3, 2/3) (2/3, 1/2) (1, 3/5)
            "aupr_id": (1 + 5 / 6 + 11 / 20) / 3,
            "average_precision_id": (1 + 2 / 3 + 3 / 5) / 3,
            # Ranked from the bottom: (0, 1) (0, 0) (1/2, 1/2) (1, 1/2) (1, 2/5)
            "aupr_ood": (1 / 4 + 1 / 2) / 2,
            "average_precision_ood": 1 / 2,
            "fpr95_id": 1.0,
            "fpr95_ood": 2 / 3,
        }
    )


def test_the_two_fpr_conventions_differ():
    id_scores, ood_scores = [0.0, *range(10, 29)], [5.0] * 9 + [100.0]
    assert metrics.fpr_at_tpr(id_scores, ood_scores, positive="id") == 0.1
    assert metrics.fpr_at_tpr(id_scores, ood_scores, positive="ood") == 1.0


def test_exactly_95_percent_is_enough():
    id_scores = list(range(20))
    assert metrics.fpr_at_tpr(id_scores, [0.5]) == 0.0
    assert metrics.fpr_at_tpr(id_scores, [0.5], tpr=0.951) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_tensors_arrays_and_sequences_give_the_same(dtype):
    id_scores, ood_scores = torch.tensor([4, 3, 1], dtype=dtype), torch.tensor([3, 2], dtype=dtype)
    expected = metrics.evaluate([4.0, 3.0, 1.0], [3.0, 2.0])
    assert metrics.evaluate(id_scores, ood_scores) == expected
    assert metrics.evaluate(id_scores.double().numpy(), (3, 2)) == expected
    if dtype.is_floating_point:
        assert metrics.evaluate(id_scores.clone().requires_grad_(), ood_scores) == expected
    assert id_scores.tolist() == [4, 3, 1]


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([1.0, math.nan, math.inf], [1.0], r"^id_scores holds 2 of 3 values that are NaN or infinite; .*$"),
        ([1.0], torch.tensor([-math.inf]), r"^ood_scores holds 1 of 1 values"),
        ([], [1.0], r"^id_scores must be 1-D and not empty, not of shape \[0\]$"),
        ([1.0], torch.zeros(2, 1), r"^ood_scores must be 1-D and not empty, not of shape \[2, 1\]$"),
        (1.0, [1.0], r"^id_scores must be 1-D"),
        (["a"], [1.0], r"^id_scores must hold real numbers, not <U1$"),
        ([True], [1.0], r"^id_scores must hold real numbers, not bool$"),
        (torch.zeros(2, dtype=torch.complex64), [1.0], r"^id_scores must hold real numbers, not complex64$"),
        ([[1.0], [1.0, 2.0]], [1.0], r"^id_scores cannot be read as an array of numbers: .*$"),
    ],
)
def test_bad_scores_are_refused_in_one_line(id_scores, ood_scores, message):
    for function in SCORE_FUNCTIONS:
        with pytest.raises(InputError, match=message) as caught:
            function(id_scores, ood_scores)
        assert "\n" not in str(caught.value)


def test_unknown_convention_and_tpr_outside_its_range_are_refused():
    for function in PAIRED_FUNCTIONS:
        with pytest.raises(InputError, match=r'^positive must be "id" or "ood", .* not \'in\'$'):
            function([1.0], [0.0], positive="in")
    for tpr in (0.0, -0.1, 1.01, 95, math.nan, "0.95"):
        with pytest.raises(InputError, match=r"^tpr must be a fraction in \(0, 1\], not .*; write 95 % as 0.95$"):
            metrics.fpr_at_tpr([1.0], [0.0], tpr=tpr)


def test_calibration_error_bins_are_closed_on_the_right():
    probabilities = [[0.5, 0.5], [0.25, 0.75]]
    # 0.5 is right and alone in (0, 0.5]; together in one bin the two surpluses +0.5 and -0.75 would cancel in part.
    assert metrics.expected_calibration_error(probabilities, [0, 0], n_bins=2) == pytest.approx((0.5 + 0.75) / 2)
    assert metrics.expected_calibration_error(probabilities, [0, 0], n_bins=1) == pytest.approx(0.25 / 2)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 40), st.integers(2, 5))
def test_calibration_error_equals_the_definition(seed, n_bins, n, n_classes):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet(np.ones(n_classes), n), rng.integers(n_classes, size=n)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for m in range(1, n_bins + 1):
        inside = (confidence > (m - 1) / n_bins) & (confidence <= m / n_bins)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.expected_calibration_error(probabilities, labels, n_bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_takes_half_precision_softmax():
    probabilities = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).softmax(1).bfloat16()
    assert 0 <= metrics.expected_calibration_error(probabilities, torch.zeros(50, dtype=torch.long)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0.5, 0.5]], [0], 0), r"^n_bins must be an integer of at least 1, not 0$"),
        (([0.5, 0.5], [0]), r"^probabilities must be 2-D and not empty, not of shape \[2\]$"),
        ((torch.zeros(0, 3), []), r"^probabilities must be 2-D and not empty, not of shape \[0, 3\]$"),
        (([[math.nan, 1.0]], [0]), r"^probabilities holds 1 of 2 values that are NaN"),
        (([[2.0, -1.0]], [0]), r"^probabilities must be >= 0 and sum to 1 in each row; apply a softmax"),
        (([[0.5, 0.4]], [0]), r"^probabilities must be >= 0 and sum to 1"),
        (([[0.5, 0.5]], [0, 1]), r"^labels must be 1 integers, one per row of .*, not int64 of shape \[2\]$"),
        (([[0.5, 0.5]], [0.0]), r"^labels must be 1 integers.* not float64"),
        (([[0.5, 0.5]], [2]), r"^labels must lie in \[0, 2\), .* not in \[2, 2\]$"),
        (([[0.5, 0.5]], [-1]), r"^labels must lie in \[0, 2\)"),
    ],
)
def test_bad_calibration_input_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        metrics.expected_calibration_error(*arguments)


@pytest.mark.parametrize(
    ("confidence", "is_right", "message"),
    [
        ([], [], r"^confidence must be 1-D and not empty"),
        ([1.2], [True], r"^confidence must lie in \[0, 1\], not in \[1.2, 1.2\]$"),
        ([-0.1, 0.5], [True, True], r"^confidence must lie in \[0, 1\]"),
        ([math.nan], [True], r"^confidence holds 1 of 1 values that are NaN"),
        ([0.5], [1], r"^is_right must be 1 booleans, one per confidence, not int64 of shape \[1\]$"),
        ([0.5, 0.5], [True], r"^is_right must be 2 booleans"),
    ],
)
def test_bad_confidences_are_refused(confidence, is_right, message):
    with pytest.raises(InputError, match=message):
        metrics.ece_from_confidence(confidence, is_right)
