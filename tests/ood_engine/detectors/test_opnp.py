"""OPNP: sensitivities against autograd, masks against quantiles, scores against Energy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_engine.detectors import create_detector
from ood_engine.detectors.opnp import keep_mask, sensitivity, sensitivity_ranks
from ood_engine.errors import InputError
from ood_engine.features.cache import CacheRows, FeatureCache
from ood_engine.features.fit_data import FitData
from ood_engine.runtime import Kernels


@pytest.fixture
def problem(make_problem):
    """(FitData of signed features, their gradients' ingredients)."""
    _, h, weight, bias = make_problem(60)
    nothing = h[:, :0]
    rows = CacheRows(h, torch.arange(60), torch.full((60,), -1), nothing, nothing)
    return FitData(FeatureCache(rows), ok.Head(weight, bias), Kernels()), h, weight, bias


def test_sensitivity_is_autograds_mean_absolute_gradient(problem, autograd_gradients):
    data, h, weight, bias = problem
    gradients = autograd_gradients(h, weight, bias, "energy", False)
    expected = gradients.abs().mean(0)
    assert (sensitivity(data) - expected).abs().max() < 1e-10
    assert (expected - gradients.mean(0).abs()).abs().max() > 0.05  # the mean of signed gradients is something else


def test_neurons_are_ranked_by_the_mean_of_their_weights(problem):
    data, h, *_ = problem
    detector = create_detector("opnp")
    detector.fit(data)
    expected = h.abs().mean(0) / 4
    assert (sensitivity(data).mean(0) - expected).abs().max() < 1e-10
    assert torch.equal(detector.fitted("neuron_ranks"), expected.argsort().argsort().to(torch.int32))
    assert torch.equal(detector.fitted("weight_ranks"), sensitivity_ranks(sensitivity(data)))


# Values with many ties and many zeros, as dead neurons give.
tied_values = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8]).map(float), min_size=1, max_size=60)
fractions = st.fractions(0, 1, max_denominator=64)


def is_clear(fraction: Fraction, count: int) -> bool:
    """Whether ρ(m - 1) is either whole in floating point too or far from whole, so that rounding decides nothing."""
    exact = fraction * (count - 1)
    return exact.denominator > 1 or float(fraction) * (count - 1) == exact


@settings(deadline=None, max_examples=100)
@given(values=tied_values, low=fractions, high=fractions)
def test_masks_from_ranks_equal_masks_from_quantiles(values, low, high):
    assume(low < high and is_clear(low, len(values)) and is_clear(high, len(values)))
    array = np.array(values)
    lower, upper = np.quantile(array, [float(low), float(high)], method="linear")
    expected = array <= upper
    if low > 0:
        expected &= array > lower
    ranks = sensitivity_ranks(torch.tensor(values))
    assert ranks.dtype == torch.int32
    assert keep_mask(ranks, (float(low), float(high))).tolist() == expected.tolist()


@settings(deadline=None, max_examples=50)
@given(values=tied_values)
def test_ranks_count_what_is_smaller(values):
    assert sensitivity_ranks(torch.tensor(values)).tolist() == [sum(a < b for a in values) for b in values]
    assert keep_mask(sensitivity_ranks(torch.tensor(values)), (0.0, 1.0)).all()


@pytest.mark.parametrize("name", ["opnp", "opp", "onp"])
def test_keeping_everything_is_energy_bitwise(name, make_engine, test_images):
    parts = [part for part in ("weight_range", "neuron_range") if part in create_detector(name).settings]
    engine = make_engine(("energy", name), settings={name: dict.fromkeys(parts, (0.0, 1.0))})
    scores = engine.score(test_images)
    assert torch.equal(scores[name], scores["energy"])


def test_scores_are_the_energies_of_the_pruned_head(engine, test_images):
    features = engine.scorer.signals(engine.scorer.run(test_images).feature_map, None).features.double()
    weight, bias = engine.head.weight.double(), engine.head.bias.double()
    scores = engine.score(test_images)
    opnp = engine.detectors["opnp"]
    weight_mask, neuron_mask = opnp.masks
    assert not weight_mask.all()
    assert not neuron_mask.all()
    for name, masks in {
        "opnp": (weight_mask, neuron_mask),
        "opp": (weight_mask, torch.ones_like(neuron_mask)),
        "onp": (torch.ones_like(weight_mask), neuron_mask),
    }.items():
        expected = ((features * masks[1]) @ (weight * masks[0]).T + bias).logsumexp(1)
        assert (scores[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_configure_changes_the_masks_without_a_fit(engine):
    original = engine.detectors["opnp"]
    detector = create_detector("opnp")
    detector.load_state_dict(original.state_dict())
    detector.configure(weight_range=(0.5, 1.0))
    assert torch.equal(detector.fitted("weight_mask"), keep_mask(original.fitted("weight_ranks"), (0.5, 1.0)))
    assert torch.equal(detector.fitted("neuron_mask"), original.fitted("neuron_mask"))
    assert detector.settings["weight_range"] == (0.5, 1.0)
    detector.configure(neuron_range=(0.5, 0.9))
    assert torch.equal(detector.fitted("neuron_mask"), keep_mask(original.fitted("neuron_ranks"), (0.5, 0.9)))
    assert torch.equal(detector.fitted("weight_mask"), keep_mask(original.fitted("weight_ranks"), (0.5, 1.0)))


def test_grids_are_valid_and_reach_no_pruning():
    for name in ("opnp", "opp", "onp"):
        grid = create_detector(name).grid()
        assert len(grid) == 20
        assert all(create_detector(name, **entry).settings.items() >= entry.items() for entry in grid)
        assert any(all(keep == (0.0, 1.0) for keep in entry.values()) for entry in grid)


@pytest.mark.parametrize(
    "keep", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1), (5, 99.5), (0.1,), (math.nan, 1.0), 0.5, None, "ab"]
)
def test_ranges_are_two_fractions(keep):
    for name, part in (("opnp", "weight_range"), ("opnp", "neuron_range"), ("onp", "neuron_range")):
        with pytest.raises(InputError, match=rf"{part}=.*: expected two fractions with 0 ≤ lower < upper ≤ 1"):
            create_detector(name, **{part: keep})


@pytest.mark.parametrize(("has_map", "operator"), [(True, "score"), (False, "masked_energy")])
def test_masks_are_computed_in_the_pass_of_the_plain_energy(has_map, operator, engine, test_images, monkeypatch):
    calls = []
    for name in ("score", "masked_energy", "pool_nap", "project_gradients"):
        original = getattr(ok, name)
        count = lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k)  # noqa: E731
        monkeypatch.setattr(ok, name, count)
    captured = engine.scorer.run(test_images)
    signals = engine.scorer.signals(*((captured.feature_map, None) if has_map else (None, captured.head_input)))
    pruner = next(detector for detector in engine.detectors.values() if detector.prunes)
    signals.lse, signals.probabilities, signals.pruned_lse(pruner)
    assert calls == [operator]
