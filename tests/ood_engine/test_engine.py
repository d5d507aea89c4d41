"""The engine: fit, refit, calibrate, score, predict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ood_engine as oe
import ood_kernels as ok
from ood_engine.detectors import create_detector, default_settings
from ood_engine.engine import DEFAULT_DETECTORS
from ood_engine.errors import (
    CalibrationError,
    DetectorUnavailableError,
    InputError,
    NotFittedError,
    OodEngineWarning,
)
from ood_engine.scores import Scores

PUBLISHED = {
    *("exgrad", "grad_pca", "gradnorm", "nap", "nap_energy", "nap_msp", "nap_opnp", "opnp", "opp", "onp"),
    *("energy", "msp", "max_logit", "low_dim_gradient"),
    *(f"low_dim_gradient_probe_{score}" for score in ("energy", "msp", "react", "bats")),
    *(f"low_dim_gradient_{head}" for head in ("knn", "mahalanobis", "mahalanobis_pp", "residual", "vim")),
    *("low_dim_gradient_projected_norm", "low_dim_gradient_ensemble"),
}


def mlp(in_features: int = 3 * 8 * 8, classes: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(in_features, 10), nn.ReLU(), nn.Linear(10, classes)).eval()


def test_every_published_detector_is_available(engine, test_images):
    assert set(oe.available_detectors()) == PUBLISHED
    scores = engine.score(test_images)
    assert list(scores) == list(oe.available_detectors())
    for score in scores.values():
        assert score.shape == (33,)
        assert score.dtype == torch.float32
        assert not score.requires_grad
        assert score.isfinite().all()
    assert int(scores.bad_rows) == 0


def test_id_scores_higher_than_noise(engine, images):
    """Of the scores that read the head; pruning and NAP do not help on a net of 12 channels."""
    id_scores = engine.score(images(100, 3)[0])
    noise = engine.score(torch.rand((50, 3, 8, 8), generator=torch.Generator().manual_seed(5)))
    for name in id_scores:
        if name in ("energy", "msp", "max_logit") or name.startswith("low_dim_gradient"):
            assert oe.metrics.auroc(id_scores[name], noise[name]) > 0.55, name


def test_defaults(model, id_batches):
    engine = oe.Engine(model).fit(id_batches)
    assert tuple(engine.detectors) == DEFAULT_DETECTORS == ("nap_energy", "opnp", "low_dim_gradient")
    assert engine.unavailable == {}
    assert tuple(oe.Engine(model, ["energy", "nap", "energy"]).detectors) == ("energy", "nap")


def test_fit_runs_the_model_once_a_batch(model, id_batches, count_forwards):
    oe.Engine(model, oe.available_detectors()).fit(id_batches)
    proof = 3  # on the first samples: finding the layers, proving them without one sample, looking at the map's sign
    assert sum(count_forwards) == 240 + 32 * proof - 1


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"eps": 0.25}, {name: {"eps": 0.25} for name in ("nap", "nap_energy", "nap_msp", "nap_opnp")}),
        ({"opnp": {"weight_range": (0.3, 0.9)}}, {"opnp": {"weight_range": (0.3, 0.9)}}),
        (
            {"n_components": 2, "nap_energy": {"w": 0.9}, "low_dim_gradient_residual": {"n_components": 1}},
            {
                name: {"n_components": 1 if name == "low_dim_gradient_residual" else 2}
                for name in PUBLISHED
                if name.startswith("low_dim")
            }
            | {"nap_energy": {"w": 0.9}},
        ),
    ],
)
def test_refit_equals_a_fresh_fit_and_never_runs_the_model(
    changes, settings, make_engine, test_images, count_forwards, assert_same_scores
):
    engine = make_engine()
    before = engine.score(test_images)
    count_forwards.clear()
    engine.refit(**changes)
    assert count_forwards == []
    fresh = make_engine(settings=settings)
    found = engine.score(test_images)
    assert_same_scores(found, fresh.score(test_images), 0)
    for name, score in found.items():
        assert torch.equal(score, before[name]) == (name not in settings), name
        assert torch.equal(engine.calibrations[name].fitted("scores"), fresh.calibrations[name].fitted("scores")), name
        assert engine.calibrations[name].false_alarm_rate == 0.1
        assert engine.detectors[name].settings == {**default_settings(name), **settings.get(name, {})}


def test_a_fit_or_refit_that_fails_changes_nothing(make_engine, images, test_images, assert_same_scores):
    engine = make_engine()
    before, flagged = engine.score(test_images), engine.predict(test_images)
    with pytest.raises(InputError, match="k=500 neighbours with a bank of 120"):
        engine.refit(eps=0.5, head="knn", k=500)
    with pytest.raises(InputError, match=r"w=3: expected"):
        engine.refit(w=3)
    with pytest.raises(InputError, match=r"refit\(tempo=...\): expected a detector \(energy, .*\) or a setting"):
        engine.refit(tempo=3)
    with pytest.raises(
        InputError, match="detector 'opnp' has no setting 'eps': expected one of weight_range, neuron_range"
    ):
        engine.refit(opnp={"eps": 1})
    with pytest.raises(InputError, match="expected at least 4 different ones"):
        engine.fit([images(3, 21)])
    assert_same_scores(engine.score(test_images), before, 0)
    assert all(torch.equal(engine.predict(test_images)[name], rows) for name, rows in flagged.items())


def test_predict_and_p_values_follow_from_the_calibration_scores(engine, test_images, fresh_batches):
    scores, flagged, p_values = engine.score(test_images), engine.predict(test_images), engine.p_values(test_images)
    calibration = engine.score_loader(fresh_batches)
    for name, score in scores.items():
        assert flagged[name].dtype == torch.bool
        assert torch.equal(flagged[name], p_values[name] <= 0.1)
        expected = (1 + (calibration[name][None] <= score[:, None]).sum(1)) / 101
        assert (p_values[name] - expected).abs().max() <= 1 / 101 + 1e-6  # a cached score may be an ulp off
    assert flagged["energy"][25:].float().mean() > flagged["energy"][:25].float().mean()
    images = torch.cat([batch for batch, _ in fresh_batches])
    for name, flagged in engine.predict(images).items():
        assert 0.08 <= float(flagged.float().mean()) <= 0.1, name


def test_calibrate_refuses_samples_of_the_fit(make_engine, id_batches, fresh_batches):
    engine = make_engine(("energy", "low_dim_gradient"))
    before = engine.calibrations["energy"].threshold
    mixed = [*fresh_batches, id_batches[0][0][:7]]
    message = r"calibration image 100 was used in fit: expected fresh ID images; hold some out, or pass overlap='drop'"
    with pytest.raises(CalibrationError, match=message):
        engine.calibrate(mixed)
    assert engine.calibrations["energy"].threshold == before
    engine.calibrate(mixed, 0.1, overlap="drop")
    assert engine.calibrations["energy"].threshold == before
    assert len(engine.calibrations["energy"].fitted("scores")) == 100
    with pytest.raises(CalibrationError, match="all 64 calibration images were used in fit: expected fresh ID images"):
        engine.calibrate([id_batches[0]], overlap="drop")
    with pytest.raises(InputError, match="overlap='keep': expected 'refuse' or 'drop'"):
        engine.calibrate(mixed, overlap="keep")
    message = "100 calibration samples for false_alarm_rate=0.005: expected at least 199"
    with pytest.raises(CalibrationError, match=message):
        engine.calibrate(fresh_batches, 0.005)


def test_order_of_work_is_enforced(model, id_batches, fresh_batches, test_images):
    engine = oe.Engine(model, ["energy"])
    calls = (
        lambda: engine.score(test_images),
        lambda: engine.calibrate(id_batches),
        lambda: engine.save("never.safetensors"),
        lambda: engine.score_features(None, torch.zeros(1, 12)),
        lambda: engine.tune(id_batches),
    )
    for call in calls:
        with pytest.raises(NotFittedError, match=r"the engine is not fitted: call fit\(loader\)"):
            call()
    with pytest.raises(NotFittedError, match=r"refit needs the feature cache of fit\(loader\)"):
        engine.refit(eps=1)
    assert engine.fit(id_batches) is engine
    with pytest.raises(NotFittedError, match="the engine is not calibrated"):
        engine.p_values(test_images)
    # The model may change between two fits, and the calibration features with it.
    assert engine.calibrate(fresh_batches).refit().fit(id_batches) is engine
    with pytest.raises(NotFittedError, match=r"not calibrated: call calibrate\(loader\)"):
        engine.predict(test_images)


def test_the_loader_may_yield_images_alone_or_tuples_of_one(model, id_batches, test_images, assert_same_scores):
    loaders = (
        id_batches,
        [batch for batch, _ in id_batches],
        [(batch,) for batch, _ in id_batches],
        [[batch, labels.to(torch.uint8)] for batch, labels in id_batches],
        (batch for batch, _ in id_batches),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat([x for x, _ in id_batches])), 64),
    )
    scores = [oe.Engine(model, ["opnp", "low_dim_gradient_knn"]).fit(loader).score(test_images) for loader in loaders]
    for found in scores[1:]:
        assert_same_scores(found, scores[0], 0)


def test_empty_batches_of_a_loader_are_passed_over(make_engine, fresh_batches, test_images):
    engine = make_engine(("energy",))
    scores = engine.score_loader([test_images[:0], test_images, (test_images[:0], torch.zeros(0, dtype=torch.int64))])
    assert torch.equal(scores["energy"], engine.score(test_images)["energy"])


def test_score_loader_reports_bad_rows(engine, test_images):
    bad = test_images.clone()
    bad[7, 0, 0, 0] = torch.nan
    with pytest.warns(
        OodEngineWarning, match=r"1 of 33 inputs have no score \(NaN\): their pixels or activations are NaN"
    ):
        scores = engine.score_loader(bad.split(10))
    assert int(scores.bad_rows) == 1
    assert all(score.isnan().nonzero().tolist() == [[7]] for score in scores.values())
    assert all(flagged[7] for flagged in engine.predict(bad).values())
    assert all(p[7].isnan() for p in engine.p_values(bad).values())


def test_a_model_without_a_map_gets_what_needs_only_features(unlabelled_batches, test_images):
    with pytest.warns(OodEngineWarning, match="nap_energy not available for this model: no module of the model has"):
        engine = oe.Engine(mlp()).fit(unlabelled_batches, labels="predicted")
    assert tuple(engine.detectors) == ("opnp", "low_dim_gradient")
    assert "H·W > 1" in engine.unavailable["nap_energy"]
    for name in sorted(PUBLISHED):
        single = oe.Engine(mlp(), [name])
        if create_detector(name).needs_map:
            with pytest.raises(
                DetectorUnavailableError, match=rf"^{name} not available for this model: .*leave the detector"
            ):
                single.fit(unlabelled_batches, labels="predicted")
            continue
        scores = single.fit(unlabelled_batches, labels="predicted").score(test_images)
        assert scores[name].isfinite().all()
        features = single.scorer.run(test_images).head_input
        assert torch.equal(single.score_features(None, features)[name], scores[name])
    assert single.cache is not None
    assert not single.cache.has_map


def test_signed_maps_are_refused_with_the_way_out(make_model, unlabelled_batches):
    model = make_model(nn.GELU)
    with pytest.raises(
        DetectorUnavailableError, match=r"nap not available .*negative values \(down to .*pass rectify=True"
    ):
        oe.Engine(model, ["nap", "energy"], rectify=False).fit(unlabelled_batches)
    with pytest.warns(OodEngineWarning, match="nap_energy not available for this model: the feature map"):
        engine = oe.Engine(model, rectify=False).fit(unlabelled_batches, labels="predicted")
    assert "nap_energy" not in engine.detectors


@pytest.mark.parametrize("options", [{"rectify": True}, {"feature_map": "body"}])
@pytest.mark.filterwarnings("ignore:overruled by force")  # the model is untrained
def test_maps_rectified_or_named_by_hand_are_scored(
    options, make_model, unproven_model, id_batches, fresh_batches, test_images, assert_same_scores
):
    is_proven = "rectify" in options
    model = make_model(nn.GELU) if is_proven else unproven_model
    engine = oe.Engine(model, oe.available_detectors(), **options).fit(id_batches, force=True)
    assert engine.plan.proven == is_proven
    scores, captured = engine.score(test_images), engine.scorer.run(test_images)
    assert (captured.feature_map.min() < 0) == is_proven
    rectified = captured.feature_map.relu()
    expected = (rectified.amax((2, 3)) / (rectified.mean((2, 3)) + 1)).square().mean(1)
    assert torch.allclose(scores["nap"], expected, rtol=1e-6)
    assert torch.allclose(scores["energy"], model(test_images).logsumexp(1), rtol=1e-6)
    features = None if is_proven else captured.head_input
    assert_same_scores(engine.score_features(captured.feature_map, features), scores, 0)
    assert_same_scores(engine.scorer.score_cache(engine.extract(fresh_batches)), engine.score_loader(fresh_batches))


def test_a_map_that_is_not_verified_needs_a_name_and_its_features(unproven_model, unlabelled_batches, test_images):
    with pytest.raises(DetectorUnavailableError, match=r"nap not available .*; or name the map by feature_map=\.\.\."):
        oe.Engine(unproven_model, ["nap"]).fit(unlabelled_batches, labels="predicted")
    engine = oe.Engine(unproven_model, ["nap"], feature_map="body").fit(unlabelled_batches, labels="predicted")
    assert "unverified" in engine.plan.reason
    message = r"expected \[N, 12, H, W\] of a verified map; otherwise pass features \[N, 12\]"
    with pytest.raises(InputError, match=message):
        engine.score_features(engine.scorer.run(test_images).feature_map)


def test_score_features_equals_score(engine, test_images, assert_same_scores):
    feature_map = engine.scorer.run(test_images).feature_map
    assert_same_scores(engine.score_features(feature_map), engine.score(test_images), 0)
    channels_last = feature_map.contiguous(memory_format=torch.channels_last)
    assert_same_scores(engine.score_features(channels_last), engine.score(test_images))


@pytest.mark.filterwarnings("ignore:overruled by force")  # the model is untrained
def test_the_model_is_untouched(make_model, id_batches, test_images):
    model = make_model().train()
    oe.Engine(model, oe.available_detectors()).fit(id_batches, force=True).score(test_images)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, make_model().state_dict()[key]) for key, value in model.state_dict().items())


def test_scores_count_a_row_once_whichever_detector_fails():
    nan = torch.nan
    first = Scores({"a": torch.tensor([nan, 1.0, nan]), "b": torch.tensor([1.0, 1.0, nan])}, {"a": torch.tensor(2)})
    second = Scores({"a": torch.tensor([3.0]), "b": torch.tensor([nan])}, {"a": torch.tensor(1)})
    assert int(first.bad_rows) == 2
    together = Scores.concatenate([first, second])
    assert int(together.bad_rows) == 3
    assert int(together.clamped["a"]) == 3
    assert together["a"].tolist()[3] == 3
    with pytest.warns(OodEngineWarning) as caught:
        together.report()
    assert str(caught[0].message).startswith("3 of 4 inputs have no score (NaN)")
    assert str(caught[1].message).startswith(
        "a: the base score of 3 of 4 inputs is not positive and was clamped to 1e-6"
    )


def test_refit_leaves_a_head_that_the_name_says(model, id_batches):
    engine = oe.Engine(model, ["low_dim_gradient", "low_dim_gradient_residual", "low_dim_gradient_ensemble"]).fit(
        id_batches
    )
    engine.refit(head="knn")
    heads = {name: detector.settings["head"] for name, detector in engine.detectors.items() if "ensemble" not in name}
    assert heads == {"low_dim_gradient": "knn", "low_dim_gradient_residual": "residual"}
    with pytest.raises(InputError, match=r"'low_dim_gradient_residual': its head is 'residual' by its name, got 'knn'"):
        engine.refit(low_dim_gradient_residual={"head": "knn"})


def test_a_map_that_turns_negative_later_in_fit_is_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[0].bias, 0.0)
    positive = torch.rand(8, 1, 3, 3)
    with pytest.raises(DetectorUnavailableError, match=r"negative values \(down to -0\.[0-9]+\).*rectify=True"):
        oe.Engine(model, ["nap"], rectify=False).fit([positive, positive - 0.5])


def test_the_map_is_not_read_where_no_detector_needs_it(
    model, id_batches, test_images, assert_same_scores, monkeypatch
):
    calls = []
    for name in ("pool_nap", "pool_statistics"):
        original = getattr(ok, name)
        monkeypatch.setattr(ok, name, lambda *args, f=original, **options: calls.append(1) or f(*args, **options))
    engine = oe.Engine(model, ["energy", "opnp"]).fit(id_batches)
    scores = engine.score(test_images)
    assert not calls
    assert_same_scores(engine.score_features(engine.scorer.run(test_images).feature_map), scores)
    assert len(calls) == 1


def test_an_engine_shows_what_users_call():
    shown = {name for name in dir(oe.Engine) if not name.startswith("_")}
    verbs = "fit fit_features refit tune calibrate score score_features score_loader predict p_values save load extract"
    properties = "detectors calibrations flagged_by_class head plan image_shape runtime"
    assert shown == {*verbs.split(), *properties.split()}
