"""What scores must not depend on."""

from __future__ import annotations

import concurrent.futures
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_engine as oe
from ood_engine.runtime import Kernels


@settings(deadline=None, max_examples=12)
@given(size=st.integers(1, 33), seed=st.integers(0, 1000))
def test_batch_size_and_position(engine, test_images, assert_same_scores, size, seed):
    order = torch.randperm(33, generator=torch.Generator().manual_seed(seed))
    scores = engine.score_loader(test_images[order].split(size))
    back = order.argsort()
    assert_same_scores({name: score[back] for name, score in scores.items()}, engine.score(test_images))


@pytest.mark.parametrize("size", [240, 17])
def test_order_and_batches_of_the_fit(size, model, id_batches, test_images, images, engine, assert_same_scores):
    x, y = images(240, 1)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(size))
    batches = list(zip(x[order].split(size), y[order].split(size), strict=True))
    shuffled = oe.Engine(model, oe.available_detectors()).fit(batches)
    assert_same_scores(shuffled.score(test_images), engine.score(test_images), 1e-4)
    for name, detector in engine.detectors.items():
        found = shuffled.detectors[name].state_dict()
        for key, value in detector.state_dict().items():
            if value.is_floating_point():
                # Bounds that clamp nothing are infinite, and equal.
                difference = torch.where(found[key] == value, 0, (found[key] - value).abs())
                assert difference.max() <= 1e-3 * value.abs().max(), (name, key)
            else:
                assert torch.equal(found[key], value), (name, key)


def test_blocks_of_rows_bound_the_memory_and_change_no_bit(engine, monkeypatch):
    features = torch.rand((10, 12), generator=torch.Generator().manual_seed(0)).repeat(1000, 1)
    seen = []
    project = Kernels.project_gradients
    monkeypatch.setattr(Kernels, "project_gradients", lambda *of: seen.append(len(of[1])) or project(*of))
    names = [name for name, one in engine.detectors.items() if not one.needs_map]
    monkeypatch.setattr(engine.scorer, "detectors", {name: engine.detectors[name] for name in names})
    blocks = engine.score_features(None, features)
    assert max(seen) <= 4096
    monkeypatch.setattr("ood_engine.scorer._BLOCK", 10_000)
    whole = engine.score_features(None, features)
    assert max(seen) == 10_000
    assert all(torch.equal(blocks[name], whole[name]) for name in names)


def test_order_of_the_detectors(model, id_batches, test_images, engine, assert_same_scores):
    names = list(reversed(oe.available_detectors()))
    scores = oe.Engine(model, names).fit(id_batches).score(test_images)
    assert list(scores) == names
    assert_same_scores({name: scores[name] for name in reversed(names)}, engine.score(test_images), 0)


@pytest.mark.parametrize("name", oe.available_detectors())
def test_alone_a_detector_scores_as_in_company_and_as_from_its_file(
    name, model, id_batches, test_images, engine, tmp_path, assert_same_scores
):
    fitted = oe.Engine(model, [name]).fit(id_batches)
    alone = fitted.score(test_images)
    fitted.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    assert_same_scores(loaded.score(test_images), alone, 0)
    # Beside a NAP detector the features are pooled from the map, alone they are what the head received: fp32 rounding apart. A
    # residual is a difference of large numbers, in which that shows.
    tolerance = 1e-4 if name.endswith(("residual", "vim")) else 1e-5
    assert_same_scores(alone, {name: engine.score(test_images)[name]}, tolerance)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_mode(mode, model, engine, id_batches, fresh_batches, test_images, assert_same_scores):
    expected = engine.score(test_images)
    with mode():
        assert_same_scores(engine.score(test_images.clone().requires_grad_()), expected, 0)
        fitted = oe.Engine(model, oe.available_detectors()).fit(id_batches).calibrate(fresh_batches, 0.1)
        fitted.refit()
    assert_same_scores(fitted.score(test_images), expected, 0)
    assert not any(buffer.is_inference() for detector in fitted.detectors.values() for buffer in detector.buffers())
    assert not any(score.requires_grad for score in fitted.score(test_images).values())


def test_memory_format_of_the_images(engine, test_images, assert_same_scores):
    assert_same_scores(engine.score(test_images.to(memory_format=torch.channels_last)), engine.score(test_images))


def test_eight_threads_get_what_one_gets(engine, test_images, assert_same_scores):
    rolled = [test_images.roll(shift, 0) for shift in range(8)]
    expected = [engine.score(images) for images in rolled]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, score in zip(pool.map(engine.score, rolled), expected, strict=True):
                assert_same_scores(found, score)


def test_under_autocast_only_the_model_runs_in_half_precision(engine, test_images, assert_same_scores):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine.score(test_images)
        feature_map = engine.scorer.run(test_images).feature_map
    assert feature_map.dtype == torch.bfloat16
    assert_same_scores(found, engine.score_features(feature_map), 0)
    assert all(score.dtype == torch.float32 for score in found.values())


def test_autocast_around_score_features_and_refit_changes_nothing(make_engine, test_images, assert_same_scores):
    engine = make_engine()
    feature_map = engine.scorer.run(test_images).feature_map
    expected = engine.score_features(feature_map)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_scores(engine.score_features(feature_map), expected, 0)
        engine.refit()
    assert_same_scores(engine.score_features(feature_map), expected, 0)


def test_double_precision_model(model, engine, id_batches, test_images, assert_same_scores):
    double = oe.Engine(copy.deepcopy(model).double(), oe.available_detectors()).fit(id_batches)
    assert double.cache.rows.features.dtype == torch.float64
    assert_same_scores(double.score(test_images), engine.score(test_images), 1e-3)


def test_seed_of_the_fit_is_used(model, id_batches, test_images):
    names = ["low_dim_gradient_probe_energy", "low_dim_gradient_knn"]
    scores = [oe.Engine(model, names, seed=seed).fit(id_batches).score(test_images) for seed in (0, 0, 1)]
    assert torch.equal(scores[0][names[0]], scores[1][names[0]])
    assert not torch.equal(scores[0][names[0]], scores[2][names[0]])
    assert torch.equal(scores[0][names[1]], scores[2][names[1]])


def test_fit_leaves_the_random_state_alone(make_engine):
    state = torch.get_rng_state()
    make_engine()
    assert torch.equal(torch.get_rng_state(), state)
