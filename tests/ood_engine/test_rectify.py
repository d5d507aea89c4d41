"""Whether NAP is computed on the ReLU of the map, decided by `fit`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import DetectorUnavailableError, InputError, OodEngineWarning


def identity_map():
    """A model whose map is the image."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


def batches(*lowest):
    """A batch of positive images for each value, which one of its pixels has."""
    found = []
    for seed, value in enumerate(lowest):
        images = torch.rand((16, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
        images[3, 1, 2, 2] = value
        found.append(images)
    return found


def nap(images):
    return (images.amax((2, 3)) / (images.mean((2, 3)) + 1)).square().mean(1)


@pytest.mark.parametrize("lowest", [(-0.5, 0.1), (0.1, -0.5)], ids=["first", "last"])
def test_a_negative_value_in_any_batch_decides_for_the_relu_and_is_told(lowest, tmp_path):
    data, later = batches(*lowest), batches(-0.3)[0]
    with pytest.warns(
        OodEngineWarning, match=r"feature map '0' has negative values \(down to -0.5\), so that NAP is computed on"
    ):
        engine = oe.Engine(identity_map(), ["nap"]).fit(data)
    torch.testing.assert_close(engine.score(later)["nap"], nap(later.relu()))
    torch.testing.assert_close(engine.scorer.score_cache(engine.cache)["nap"], nap(torch.cat(data).relu()))
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", identity_map())
    assert torch.equal(loaded.score(later)["nap"], engine.score(later)["nap"])


@pytest.mark.parametrize("lowest", [0.1, -5e-33, -1e-7])
@pytest.mark.parametrize("cache_limit_bytes", [2**20, 0])
def test_without_one_scores_are_those_of_the_map_for_ever(lowest, cache_limit_bytes):
    data, later = batches(0.1, lowest), batches(-0.3)[0]
    engine, plain = (oe.Engine(identity_map(), ["nap", "energy"], **options) for options in ({}, {"rectify": False}))
    for one in (engine, plain):
        one.fit(data, cache_limit_bytes=cache_limit_bytes)
        assert not one.scorer.rectify
        assert one.cache.rows.nap_mean.shape[1] == 0
    for name, score in plain.score(later).items():
        assert torch.equal(engine.score(later)[name], score)
    assert torch.equal(engine.cache.rows.maximum, plain.cache.rows.maximum)


def test_a_refit_decides_again_and_a_failed_one_changes_nothing():
    signed, positive = batches(-0.5), batches(0.1)
    engine = oe.Engine(identity_map(), ["nap"]).fit(positive)
    with pytest.raises(InputError):
        engine.fit([*signed, torch.zeros(2, 5)])
    assert not engine.scorer.rectify
    with pytest.warns(OodEngineWarning, match="negative"):
        assert engine.fit(signed).scorer.rectify
    assert not engine.fit(positive).scorer.rectify


def test_precomputed_features_are_rectified_where_they_hold_both_means():
    signed = batches(-0.5)
    with pytest.warns(OodEngineWarning, match="negative"):
        engine = oe.Engine(identity_map(), ["nap"]).fit(signed)
    with pytest.warns(OodEngineWarning, match="negative"):
        other = oe.Engine(identity_map(), ["nap"]).fit_features(engine.cache, signed[0])
    assert torch.equal(other.score(signed[0])["nap"], engine.score(signed[0])["nap"])
    assert other.scorer.rectify
    rows = engine.cache.rows
    plain = oe.features.cache.FeatureCache.from_features(rows.features, maximum=rows.maximum)
    with pytest.raises(DetectorUnavailableError, match="pass rectify=True to score its ReLU"):
        oe.Engine(identity_map(), ["nap"]).fit_features(plain, signed[0])
    with pytest.raises(
        InputError, match=r"nap: expected a cache with the mean of each channel .* by engine\.extract\(loader\)"
    ):
        oe.Engine(identity_map(), ["nap"], rectify=True).fit_features(plain, signed[0])
    extracted = engine.extract(signed)
    forced = oe.Engine(identity_map(), ["nap"], rectify=True).fit_features(extracted, signed[0])
    assert torch.equal(forced.score(signed[0])["nap"], engine.score(signed[0])["nap"])


def test_another_value_is_refused():
    with pytest.raises(InputError, match="rectify='yes': expected True, False or 'auto'"):
        oe.Engine(identity_map(), ["nap"], rectify="yes")
