"""Anchors against a dense Gram matrix of materialised gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError
from ood_engine.subspace import DualBasis
from ood_engine.subspace.anchors import ANCHOR_METHODS, choose_anchors
from ood_kernels.reference import COTANGENTS, cotangent


def gradients_of(p, h, kind, bias):
    extended = torch.cat([h, torch.ones_like(h[:, :1])], 1) if bias else h
    return (cotangent(p, kind)[:, :, None] * extended[:, None, :]).flatten(1)


def residual_of(gradients, index):
    """1 - the share of Σ‖G‖² inside the span of the rows at `index`."""
    _, s, v = torch.linalg.svd(gradients[index], full_matrices=False)
    inside = v[s > 1e-9 * s[0]]
    return 1 - float((gradients @ inside.T).square().sum() / gradients.square().sum())


@pytest.mark.pairwise(method=ANCHOR_METHODS, bias=[True, False], kind=COTANGENTS)
def test_residual_is_that_of_projecting_materialised_gradients(method, bias, kind, make_problem):
    p, h, *_ = make_problem(40, 4)
    found = choose_anchors(p, h, 9, method=method, cotangent=kind, bias=bias)
    assert len(found.index) == len(found.index.unique()) == 9
    assert abs(float(found.residual) - residual_of(gradients_of(p, h, kind, bias), found.index)) < 1e-10


def test_pivots_are_those_of_greedy_elimination(make_problem):
    p, h, *_ = make_problem(30, 4)
    gradients = gradients_of(p, h, "energy", True)
    left, expected = gradients.clone(), []
    for _ in range(8):
        expected.append(int(left.square().sum(1).argmax()))
        direction = left[expected[-1]] / left[expected[-1]].norm()
        left = left - torch.outer(left @ direction, direction)
    found = choose_anchors(p, h, 8, method="pivoted")
    assert found.index.tolist() == expected
    assert float(found.residual) < float(choose_anchors(p, h, 8).residual)


def test_first_and_everything(make_problem):
    p, h, *_ = make_problem(10)
    assert choose_anchors(p, h, 3).index.tolist() == [0, 1, 2]
    for method in ANCHOR_METHODS:
        for count in (10, 11):
            everything = choose_anchors(p, h, count, method=method)
            assert everything.index.tolist() == list(range(10))
            assert everything.residual is None


def test_class_balanced_takes_equal_numbers_and_what_a_small_class_lacks_from_others(make_problem):
    p, h, *_ = make_problem(12)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 3])
    assert choose_anchors(p, h, 5, method="class_balanced", labels=labels).index.tolist() == [0, 1, 6, 7, 11]
    found = choose_anchors(p, h, 9, method="class_balanced", labels=labels).index
    assert found.tolist() == [*range(4), *range(6, 10), 11]


def test_class_balanced_takes_predicted_classes_where_labels_are_missing(make_problem):
    p, h, *_ = make_problem(40)
    predicted = p.argmax(1)
    partly = torch.where(torch.arange(40) % 2 == 0, predicted, -1)
    expected = choose_anchors(p, h, 8, method="class_balanced", labels=predicted).index
    assert predicted[expected].bincount().tolist() == [2, 2, 2, 2]
    for labels in (None, partly):
        assert torch.equal(choose_anchors(p, h, 8, method="class_balanced", labels=labels).index, expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), distinct=st.integers(1, 6), method=st.sampled_from(ANCHOR_METHODS))
def test_duplicates_leave_nothing_out_and_never_a_nan(make_problem, seed, distinct, method):
    p, h, *_ = make_problem(distinct, 3, 5, seed=seed)
    p, h = p.repeat(4, 1), h.repeat(4, 1)
    found = choose_anchors(p, h, 4 * distinct - 1, method=method)
    assert len(found.index.unique()) == 4 * distinct - 1
    assert 0 <= float(found.residual) < 1e-10


@pytest.mark.parametrize("method", ANCHOR_METHODS)
def test_gradients_that_are_all_zero(method):
    p, h = torch.full((6, 2), 0.5), torch.zeros(6, 3)
    found = choose_anchors(p, h, 2, method=method, bias=False)
    assert found.index.tolist() == [0, 1]
    assert float(found.residual) == 0


def test_bad_arguments(make_problem):
    p, h, *_ = make_problem(6)
    with pytest.raises(InputError, match="anchors='random': expected one of first, class_balanced, pivoted"):
        choose_anchors(p, h, 3, method="random")
    for count in (0, True, 2.0):
        with pytest.raises(InputError, match="expected a whole number of at least 1"):
            choose_anchors(p, h, count)
    with pytest.raises(InputError, match="labels: expected whole numbers"):
        choose_anchors(p, h, 3, method="class_balanced", labels=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InputError, match="NaN or infinite"):
        choose_anchors(p, h * torch.nan, 3)


@pytest.mark.parametrize("method", ANCHOR_METHODS)
def test_dual_basis_over_chosen_anchors(method, make_problem):
    p, h, *_ = make_problem(40)
    labels = torch.arange(40) % 4
    options = {"n_components": 5, "cotangent": "predicted"}
    basis = DualBasis.fit(p, h, labels=labels, max_anchors=12, anchors=method, **options)
    chosen = choose_anchors(p, h, 12, method=method, labels=labels, cotangent="predicted")
    expected = DualBasis.fit(p[chosen.index], h[chosen.index], **options)
    assert torch.equal(basis.project(p, h), expected.project(p, h))
    assert torch.equal(basis.residual, chosen.residual)
    assert expected.residual is None
    loaded = DualBasis(cotangent="predicted")
    loaded.load_state_dict(basis.state_dict())
    assert torch.equal(loaded.residual, basis.residual)
    loaded.load_state_dict(expected.state_dict())
    assert loaded.residual is None
