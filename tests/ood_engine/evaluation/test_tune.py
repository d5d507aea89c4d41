"""Settings chosen on pseudo-OOD data."""

from __future__ import annotations

import pytest
import torch

import ood_engine as oe
from ood_engine.errors import InputError
from ood_engine.evaluation.corruptions import CORRUPTIONS, corrupt

FEW = ("gaussian_noise", "contrast")


@pytest.fixture
def small(make_engine):
    settings = {"low_dim_gradient_ensemble": {"epochs": 1}}
    return make_engine(("energy", "nap_energy", "opnp", "low_dim_gradient_ensemble"), settings=settings)


def test_chooses_the_setting_with_the_best_mean_auroc(small, make_engine, images):
    x, _ = images(60, 11)
    rows = small.tune([x], corruptions=FEW, severity=2).tuning
    assert {row["detector"] for row in rows} == {"nap_energy", "opnp", "low_dim_gradient_ensemble"}
    ood = [corrupt(x, name, 2, seed=0) for name in FEW]
    for name, settings in (("nap_energy", {"w": 0.3}), ("low_dim_gradient_ensemble", {"a": 3.0})):
        other = make_engine((name,), settings={name: {**small.detectors[name].settings, **settings}})
        expected = [oe.metrics.auroc(other.score(x)[name], other.score(images)[name]) for images in ood]
        row = next(row for row in rows if row["detector"] == name and row["settings"] == settings)
        assert row["auroc"] == pytest.approx(sum(expected) / 2, abs=1e-3)
    for name in ("nap_energy", "opnp", "low_dim_gradient_ensemble"):
        own = [row for row in rows if row["detector"] == name]
        assert len(own) == len(small.detectors[name].grid())
        best = max(row["auroc"] for row in own)
        chosen = [row for row in own if row["chosen"]]
        assert len(chosen) == 1
        assert chosen[0]["auroc"] == best
        assert small.detectors[name].settings.items() >= chosen[0]["settings"].items()
    assert len({row["auroc"] for row in rows}) > 3


def test_equals_an_engine_made_with_the_chosen_settings(small, make_engine, images, test_images, assert_same_scores):
    small.tune([images(60, 11)[0]], corruptions=FEW)
    chosen = {row["detector"]: row["settings"] for row in small.tuning if row["chosen"]}
    chosen["low_dim_gradient_ensemble"]["epochs"] = 1
    fresh = make_engine(tuple(small.detectors), settings=chosen)
    assert_same_scores(small.score(test_images), fresh.score(test_images), 0)
    for name, calibration in fresh.calibrations.items():
        assert torch.equal(small.calibrations[name].fitted("scores"), calibration.fitted("scores")), name
    small.refit()
    assert_same_scores(small.score(test_images), fresh.score(test_images), 0)


def test_runs_the_model_once_a_corruption(small, images, count_forwards):
    small.tune([images(60, 11)[0]], detectors=["low_dim_gradient_ensemble"])
    assert sum(count_forwards) == 60 * (1 + len(CORRUPTIONS))
    count_forwards.clear()
    small.tune([images(60, 11)[0]], ood_loader=[torch.rand(20, 3, 8, 8)])
    assert sum(count_forwards) == 80


def test_takes_a_users_ood_set_and_a_generator(small, images):
    x, _ = images(60, 11)
    noise = torch.rand((40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    small.tune((part for part in x.split(20)), ood_loader=(part for part in noise.split(16)), detectors=["nap_energy"])
    name = "nap_energy"
    assert {row["detector"] for row in small.tuning} == {name}
    best = next(row for row in small.tuning if row["chosen"])
    expected = oe.metrics.auroc(small.score(x)[name], small.score(noise)[name])
    assert best["auroc"] == pytest.approx(expected, abs=1e-3)


def test_undoes_the_preprocessing(make_engine, model, id_batches, images):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    x, _ = images(30, 11)
    shift, scale = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    seen = []
    engine = make_engine(("nap_energy",))
    original = engine.scorer.extract_batch
    engine.scorer.extract_batch = lambda images, labels: seen.append(images) or original(images, labels)
    engine.tune([(x - shift) / scale], corruptions=["contrast"], mean=mean, std=std)
    expected = (corrupt(x, "contrast", 3) - shift) / scale
    assert torch.allclose(seen[1], expected, atol=1e-5)
    with pytest.raises(
        InputError, match=r"images span -2.* to .* once mean and std are undone: expected \[0, 1\]; pass the"
    ):
        engine.tune([(x - shift) / scale], corruptions=["contrast"])


def test_tuning_that_fails_changes_nothing(small, images, test_images, assert_same_scores):
    before, x = small.score(test_images), images(20, 11)[0]
    settings = {name: dict(detector.settings) for name, detector in small.detectors.items()}
    bad = x.clone()
    bad[3] = torch.nan
    with pytest.raises(InputError, match="ood_scores holds 1 of 20 values that are NaN"):
        small.tune([x], ood_loader=[bad])
    assert {name: detector.settings for name, detector in small.detectors.items()} == settings
    assert_same_scores(small.score(test_images), before, 0)


def test_what_cannot_be_tuned(small, images):
    x, _ = images(20, 11)
    nothing = r"nothing to tune: none of energy, nap_energy, opnp, .* has settings to search"
    for loader, options, message in (
        ([x], {"detectors": ["energy"]}, nothing),
        ([x], {"detectors": ["nap"]}, "tune 'nap': expected one of energy, nap_energy"),
        ([x], {"corruptions": ["rain"]}, "corruption 'rain' is unknown"),
        ([x], {"corruptions": []}, "corruptions"),
        ([], {}, "the loader gave no images"),
        ([x * torch.nan], {"ood_loader": [x]}, "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            small.tune(loader, **options)
