from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import ood_kernels as ok
from ood_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1, 1, 1), (3, 5, 1, 1), (2, 7, 7, 7), (4, 3, 1, 9), (5, 2, 5, 3), (1, 33, 2, 2), (0, 4, 3, 3))


def truth(feature_map, eps=1.0, rectify=False):
    """Pooled features, mean and maximum that NAP sees, ratios and NAP in fp64 numpy, a channel at a time."""
    values = feature_map.double().numpy()
    seen = np.maximum(values, 0) if rectify else values
    samples, channels = values.shape[:2]
    h, mean, maximum = (np.empty((samples, channels)) for _ in range(3))
    for i in range(samples):
        for j in range(channels):
            h[i, j] = values[i, j].sum() / values[i, j].size
            mean[i, j] = seen[i, j].sum() / seen[i, j].size
            maximum[i, j] = seen[i, j].max()
    ratios = maximum / (mean + eps)
    return h, mean, maximum, ratios, (ratios**2).sum(1) / channels


def tolerance(feature_map):
    """Rounding of the sums alone, since the truth starts from the already rounded input.

    A mean of H·W values of size 1 is off by less than H·W/2 units in the last place, a ratio by that and two more, a square twice.
    """
    unit = torch.finfo(torch.float64 if feature_map.dtype == torch.float64 else torch.float32).eps
    return unit * (feature_map[0, 0].numel() + 8 if len(feature_map) else 1)


def random_map(shape, dtype=torch.float32, seed=0, signed=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values / 4 if signed else values.relu()).to(dtype)


@pytest.mark.pairwise(shape=SHAPES, dtype=DTYPES, rectify=(False, True))
def test_equals_fp64_truth_in_every_dtype_and_shape(shape, dtype, rectify):
    feature_map = random_map(shape, dtype, signed=True)
    eps = 2.0  # keeps mean + eps well above zero for a signed map
    expected = truth(feature_map, eps, rectify)
    close = {"rtol": 4 * tolerance(feature_map), "atol": 2 * tolerance(feature_map)}

    statistics = ok.pool_statistics(feature_map, rectify=rectify)
    h, nap, ratios = ok.pool_nap(feature_map, eps, rectify=rectify, return_ratios=True)
    fused_h, fused_nap = ok.pool_nap(feature_map, eps, rectify=rectify)

    for value, right in zip(statistics, expected[:3], strict=True):
        assert_allclose(value, right, **close)
    assert_allclose(statistics.maximum, expected[2], rtol=0, atol=0)
    assert_allclose(h, expected[0], **close)
    assert_allclose(ratios, expected[3], **close)
    assert_allclose(nap, expected[4], **close)
    assert torch.equal(fused_h, h)
    assert torch.equal(fused_nap, nap)
    assert h.shape == ratios.shape == shape[:2]
    assert nap.shape == shape[:1]


def test_the_papers_epsilon_is_the_default():
    feature_map = random_map((3, 8, 4, 4))
    assert torch.equal(ok.pool_nap(feature_map)[1], ok.pool_nap(feature_map, 1.0)[1])


@pytest.mark.parametrize("eps", [1.0, 0.25, 1e-6, 3.0])
@pytest.mark.parametrize(("value", "side"), [(0.0, 4), (1e-3, 7), (0.5, 1), (1.0, 7), (17.0, 1), (1e4, 7)])
def test_constant_map(value, side, eps):
    h, nap = ok.pool_nap(torch.full((2, 5, side, side), value, dtype=torch.float64), eps)
    assert_allclose(nap, (value / (value + eps)) ** 2, rtol=1e-14)
    assert_allclose(h, value, rtol=1e-14)


def test_square_comes_before_the_mean_over_channels():
    feature_map = torch.tensor([[[[1.0]], [[3.0]]]])  # ratios 1/2 and 3/4
    assert ok.pool_nap(feature_map)[1].item() == pytest.approx((0.25 + 0.5625) / 2, rel=1e-6)


@pytest.mark.parametrize("mean", [-1.0, -1.5])
def test_signed_map_without_a_positive_denominator_is_nan(mean):
    feature_map = random_map((3, 4, 2, 2))
    feature_map[1, 2] = torch.tensor([[mean - 1, mean + 1], [mean, mean]])
    h, nap, ratios = ok.pool_nap(feature_map, return_ratios=True)
    assert nap.isnan().tolist() == [False, True, False]
    assert ratios.isnan().nonzero().tolist() == [[1, 2]]
    assert h[1, 2].item() == mean


def test_rectify_leaves_the_pooled_features_alone():
    feature_map = torch.tensor([[[[-6.0, 2.0], [0.0, 0.0]], [[-1.0, -1.0], [-1.0, -1.0]]]])
    statistics = ok.pool_statistics(feature_map, rectify=True)
    assert statistics.h.tolist() == [[-1.0, -1.0]]
    assert statistics.nap_mean.tolist() == [[0.5, 0.0]]
    assert statistics.maximum.tolist() == [[2.0, 0.0]]
    assert ok.pool_nap(feature_map)[1].isnan().all()
    h, nap = ok.pool_nap(feature_map, rectify=True)
    assert h.tolist() == [[-1.0, -1.0]]
    assert nap.item() == pytest.approx((2 / 1.5) ** 2 / 2, rel=1e-6)


def test_rectify_changes_nothing_in_a_map_without_negative_values():
    feature_map = random_map((3, 8, 4, 4))
    for plain, rectified in zip(ok.pool_nap(feature_map), ok.pool_nap(feature_map, rectify=True), strict=True):
        assert torch.equal(plain, rectified)


@pytest.mark.parametrize(("dtype", "rectify"), [(torch.bfloat16, False), (torch.float32, True), (torch.float16, True)])
def test_copies_for_casting_and_rectifying_stay_within_the_workspace(monkeypatch, largest_tensor, dtype, rectify):
    feature_map = random_map((9, 4, 5, 5), dtype)
    monkeypatch.setattr(reference, "_WORKSPACE_ELEMENTS", 250)
    assert largest_tensor(lambda: reference.pool_statistics(feature_map, rectify=rectify)) == 200


@pytest.mark.parametrize("rectify", [False, True])
def test_tokens_are_a_map_whose_channels_come_last(rectify):
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    feature_map = tokens.transpose(1, 2).reshape(3, 5, 7, 1)
    options = {"rectify": rectify, "return_ratios": True}
    for ours, right in zip(ok.pool_nap(tokens, **options), ok.pool_nap(feature_map, **options), strict=True):
        torch.testing.assert_close(ours, right, equal_nan=True)
    assert_allclose(ok.pool_statistics(tokens).h, tokens.mean(1), rtol=1e-5, atol=1e-6)
