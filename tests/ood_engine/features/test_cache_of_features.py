"""Caches in half precision, caches of features that are there already, and what fitting collects beside them."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import ood_engine as oe
from ood_engine.errors import DetectorUnavailableError, InputError
from ood_engine.features.cache import NO_LABEL, CacheRows, CacheWriter, FeatureCache, fingerprint
from ood_engine.features.fit_data import FitData
from ood_engine.runtime import Kernels

HALF = (torch.float16, torch.bfloat16)


def rows_of(features: torch.Tensor) -> CacheRows:
    labels = torch.arange(len(features)) % 3
    return CacheRows(features, fingerprint(features), labels, features + 1, features[:, :0])


def features_of(count: int, width: int = 5) -> torch.Tensor:
    return torch.rand((count, width), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("dtype", HALF)
def test_a_cache_in_half_precision_rounds_features_alone(dtype, limit, tmp_path):
    writer = CacheWriter(limit, tmp_path, dtype)
    rows = rows_of(features_of(13))
    for part in (slice(0, 5), slice(5, 13)):
        writer.append(rows.select(part))
    cache = writer.finish()
    assert (cache.directory is None) == (limit > 0)
    assert torch.equal(cache.rows.features, rows.features.to(dtype))
    assert torch.equal(cache.rows.maximum, rows.maximum.to(dtype))
    assert torch.equal(cache.rows.fingerprints, rows.fingerprints)
    assert torch.equal(cache.rows.labels, rows.labels)
    assert cache.nbytes == 13 * (2 * 5 * 2 + 8 + 8)


def test_refuses_values_that_half_precision_cannot_hold():
    features = features_of(4)
    features[2, 1] = 70000.0
    with pytest.raises(InputError, match=r"features up to 7e\+04 do not fit torch.float16: expected at most 6.55e\+04"):
        CacheWriter(dtype=torch.float16).append(rows_of(features))
    CacheWriter(dtype=torch.bfloat16).append(rows_of(features))
    # Bad samples are told later, for what they are.
    features[2, 1] = torch.nan
    CacheWriter(dtype=torch.float16).append(rows_of(features))
    with pytest.raises(InputError, match=r"cache dtype torch.int8: expected one of torch.float16"):
        CacheWriter(dtype=torch.int8)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_an_engine_fitted_from_half_precision_is_near_the_other(
    limit, model, engine, id_batches, test_images, tmp_path
):
    # A probe is trained: rounding sends it elsewhere.
    names = [name for name in oe.available_detectors() if "probe" not in name and "ensemble" not in name]
    half = oe.Engine(model, names).fit(
        id_batches, cache_dtype=torch.float16, cache_limit_bytes=limit, cache_directory=tmp_path
    )
    assert half.cache.rows.features.dtype == torch.float16
    assert half.cache.nbytes < 0.7 * engine.cache.nbytes
    expected_scores = engine.score(test_images)
    for name, score in half.score(test_images).items():
        expected = expected_scores[name]
        assert score.dtype == torch.float32
        assert np.corrcoef(score.numpy(), expected.numpy())[0, 1] > 0.99, name


def unaligned(tensor):
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("place", [torch.clone, lambda tensor: tensor.T.contiguous().T, unaligned])
def test_features_in_any_layout_give_the_same_engine(place, model, engine, id_batches, test_images, assert_same_scores):
    rows = engine.cache.rows
    features, maximum = place(rows.features), place(rows.maximum)
    cache = FeatureCache.from_features(features, rows.labels, maximum=maximum, fingerprints=rows.fingerprints)
    assert cache.rows.features.data_ptr() == features.data_ptr()
    other = oe.Engine(model, oe.available_detectors()).fit_features(cache, id_batches[0][0])
    assert_same_scores(other.score(test_images), engine.score(test_images), 0)
    assert_same_scores(other.scorer.score_cache(cache), engine.scorer.score_cache(engine.cache), 0)


def test_features_of_a_mapped_file(model, id_batches, test_images, tmp_path):
    features = oe.Engine(model, ["energy"]).fit(id_batches).cache.rows.features
    np.save(tmp_path / "features.npy", features.half().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c"))
    cache = oe.FeatureCache.from_features(mapped, directory=tmp_path)
    assert cache.rows.features.data_ptr() == mapped.data_ptr()
    assert (cache.rows.labels == NO_LABEL).all()
    assert torch.equal(cache.rows.fingerprints, fingerprint(features.half()))
    engine = oe.Engine(model, ["low_dim_gradient_knn"]).fit_features(cache, next(iter(id_batches))[0])
    assert engine.score(test_images)["low_dim_gradient_knn"].isfinite().all()
    del cache, engine
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == ["features.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.zeros(3)}, r"features: expected floating point \[n, D\]"),
        ({"features": torch.zeros((3, 2), dtype=torch.int32)}, r"got torch.int32 \[3, 2\]"),
        ({"features": torch.zeros((0, 2))}, "n and D of at least 1"),
        ({"features": torch.zeros((3, 2)), "labels": torch.zeros(3)}, r"labels: expected whole numbers \[3\]"),
        ({"features": torch.zeros((3, 2)), "labels": torch.zeros(2, dtype=torch.int64)}, r"got torch.int64 \[2\]"),
        (
            {"features": torch.zeros((3, 2)), "maximum": torch.zeros((3, 3))},
            r"maximum: expected floating point \[3, 2\]",
        ),
        ({"features": torch.zeros((3, 2)), "fingerprints": torch.zeros(3)}, r"fingerprints: expected int64 \[3\]"),
    ],
)
def test_refuses_other_features(arguments, message):
    with pytest.raises(InputError, match=message):
        FeatureCache.from_features(**arguments)


def test_fit_features_asks_for_what_its_detectors_read(model, id_batches):
    images = next(iter(id_batches))[0]
    width = oe.Engine(model, ["energy"]).fit(id_batches).head.weight.shape[1]
    with pytest.raises(
        InputError, match=rf"cache of {width + 1} features per sample: expected {width}, the width of the head"
    ):
        oe.Engine(model, ["energy"]).fit_features(FeatureCache.from_features(features_of(20, width + 1)), images)
    cache = FeatureCache.from_features(features_of(20, width))
    with pytest.raises(InputError, match="nap: expected a cache with the maximum of each channel"):
        oe.Engine(model, ["nap"]).fit_features(cache, images)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 4))
    with pytest.raises(DetectorUnavailableError):
        oe.Engine(flat, ["nap"]).fit_features(FeatureCache.from_features(features_of(9, images[0].numel())), images)


def test_what_is_collected_lies_where_the_cache_lies(tmp_path, model, id_batches):
    mapped = oe.Engine(model, ["energy"]).fit(id_batches, cache_limit_bytes=0, cache_directory=tmp_path)
    data = FitData(mapped.cache, mapped.head, Kernels())
    index = torch.arange(len(data)).flip(0)
    files = set(mapped.cache.directory.iterdir())
    collected = data.collect("features", index, lambda signals: signals.features)
    assert torch.equal(collected, mapped.cache.rows.features[index])
    assert collected.untyped_storage().filename is not None
    assert set(mapped.cache.directory.iterdir()) == files
    assert data.collect("features", index, lambda signals: signals.lse[:, None]) is collected
    in_memory = FitData(FeatureCache(mapped.cache.rows), mapped.head, Kernels())
    assert in_memory.collect("features", index, lambda signals: signals.features).untyped_storage().filename is None


def test_class_averages_are_over_half_of_all_samples(model, id_batches):
    settings = {"basis": "class_average", "max_anchors": 20}
    engine = oe.Engine(model, ["low_dim_gradient"], settings={"low_dim_gradient": settings}).fit(id_batches)
    data = FitData(engine.cache, engine.head, Kernels())
    anchors, _ = data.split(len(data))
    assert len(anchors) > 20
    signals = next(data.signals(anchors))
    expected = oe.subspace.ClassAverageBasis.fit(signals.probabilities, signals.features, labels=data.labels(anchors))
    found = engine.detectors["low_dim_gradient"].basis
    assert torch.equal(found.fitted("components"), expected.fitted("components"))


def test_a_long_pass_shows_a_bar(model, id_batches, monkeypatch):
    engine = oe.Engine(model, ["energy"]).fit(id_batches)
    shown = []

    def with_progress(batches, what, progress, total=None):
        shown.append((what, progress, total))
        return batches

    monkeypatch.setattr("ood_engine.features.fit_data.with_progress", with_progress)
    count = len(engine.cache)
    batches = -(-count // 100)
    for short, progress, expected in ((count, True, False), (count - 1, True, True), (count - 1, False, False)):
        monkeypatch.setattr("ood_engine.features.fit_data._SHORT", short)
        assert len(list(FitData(engine.cache, engine.head, Kernels(), 0, progress).signals(size=100))) == batches
        assert shown[-1] == ("reading features", expected, batches)


def test_class_means_too_large_to_hold_are_written_over_anchors(model, id_batches, monkeypatch):
    settings = {"low_dim_gradient": {"basis": "class_average", "max_anchors": 20}}
    classes, width = oe.Engine(model, ["energy"]).fit(id_batches).head.weight.shape
    # Of the head's classes all would have to fit, whichever of them the samples show.
    few = [(images[labels < 2], labels[labels < 2]) for images, labels in id_batches]
    limit = classes * classes * (width + 1) * 4
    for most, held in ((limit, True), (limit - 1, False)):
        monkeypatch.setattr("ood_engine.detectors.gradient_subspace.MAX_BYTES", most)
        basis = oe.Engine(model, ["low_dim_gradient"], settings=settings).fit(few).detectors["low_dim_gradient"].basis
        assert basis.n_components == 2
        assert (basis.components is not None) == held
        assert held or len(basis.fitted("anchor_features")) <= 20
