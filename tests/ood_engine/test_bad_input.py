"""Bad input: each gets one clear line that names the thing, what was expected and the way out, and never a score."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import CalibrationError, InputError, OodEngineError, OodEngineWarning, TapError


def assert_one_line(error: pytest.ExceptionInfo[BaseException], message: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, OodEngineError)
    assert "\n" not in text
    assert re.search(message, text), text


def changed(batches, value: float, row: int = 70):
    """The loader with one bad pixel in image `row`."""
    batches = [(x.clone(), y) for x, y in batches]
    batches[row // 64][0][row % 64, 1, 2, 3] = value
    return batches


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_bad_pixels_at_fit(value, activation, make_model, id_batches):
    with pytest.raises(InputError) as error:
        oe.Engine(make_model(activation), ["energy"]).fit(changed(id_batches, value))
    assert_one_line(error, "sample 70 of 240 has NaN or infinite features: expected finite ID images; check that image")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_pixels_at_calibrate(value, make_engine, fresh_batches):
    engine = make_engine(("energy",))
    with pytest.raises(CalibrationError) as error:
        engine.calibrate(changed(fresh_batches, value))
    assert_one_line(error, "1 of 100 calibration scores of 'energy' are NaN or infinite: expected finite ID images")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 17, 32])
def test_bad_pixels_at_score_are_nan_in_their_own_row(value, row, engine, test_images):
    sound = engine.score(test_images)
    bad = test_images.clone()
    bad[row, 0, 3, 3] = value
    scores = engine.score(bad)
    kept = torch.arange(33) != row
    assert int(scores.bad_rows) == 1
    for name, score in scores.items():
        assert score[row].isnan(), name
        assert torch.equal(score[kept], sound[name][kept]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_hide_infinity_hide_no_bad_pixel(value, make_model, id_batches, test_images):
    """ReLU6 makes 6 of Inf, which would pass for a sound feature."""
    engine = oe.Engine(make_model(nn.ReLU6), oe.available_detectors()).fit(id_batches)
    sound = engine.score(test_images)
    bad = test_images.clone()
    bad[4, 0, 3, 3] = value
    assert engine.scorer.run(bad).head_input[4].isfinite().all() == (value == value)
    scores = engine.score(bad)
    assert all(score[4].isnan() for score in scores.values())
    assert all(torch.equal(score[5:], sound[name][5:]) for name, score in scores.items())


def test_scores_beyond_float32_are_not_infinite(make_model, id_batches, test_images):
    model = make_model().double()
    model[-1].bias.data += 1e300
    engine = oe.Engine(model, ["energy"]).fit([(x.double(), y) for x, y in id_batches])
    assert engine.score(test_images.double())["energy"].isnan().all()


def test_every_row_bad(engine, test_images):
    scores = engine.score(test_images * torch.nan)
    assert all(score.isnan().all() for score in scores.values())
    assert int(scores.bad_rows) == 33


@pytest.mark.parametrize("place", ["0.weight", "6.weight", "6.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_weights(place, value, make_model):
    model = make_model()
    dict(model.named_parameters())[place].data.view(-1)[0] = value
    with pytest.raises(TapError) as error:
        oe.Engine(model)
    assert_one_line(
        error, f"the model's '{place}' has 1 NaN or infinite values of .*: expected finite weights; load an intact"
    )


def test_empty_loaders(engine, make_engine, model, test_images):
    for use in (
        oe.Engine(model, ["energy"]).fit,
        make_engine(("energy",)).calibrate,
        engine.score_loader,
    ):
        for loader in ([], [test_images[:0]]):
            with pytest.raises(InputError) as error:
                use(loader)
            assert_one_line(error, "the loader gave no images: expected at least one batch; check its path and filters")


def test_an_empty_batch(engine, test_images):
    with pytest.raises(InputError) as error:
        engine.score(test_images[:0])
    assert_one_line(error, r"images \[0, 3, 8, 8\]: the batch is empty; expected at least one image")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images(dtype, engine, model, test_images):
    bad = (test_images * 255).to(dtype)
    for use in (engine.score, engine.predict, oe.Engine(model, ["energy"]).fit, lambda x: engine.score_loader([x])):
        with pytest.raises(InputError) as error:
            use([bad] if getattr(use, "__name__", "") == "fit" else bad)
        assert_one_line(
            error, rf"images: expected a floating point batch \[N, C, H, W\], got {dtype} .*images.float\(\) / 255"
        )


@pytest.mark.parametrize("bad", [None, [1, 2], "image.png"])
def test_no_tensor_at_all(bad, engine, model):
    with pytest.raises(InputError) as error:
        engine.score(bad)
    assert_one_line(error, "images: expected a floating point batch")
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["energy"]).fit([{"pixels": bad}])
    assert_one_line(error, r"batch 0 of the loader: expected images as a tensor, or \(images, labels\), got dict")


def test_three_parts_in_a_batch(model, test_images):
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["energy"]).fit([(test_images, torch.zeros(33), torch.zeros(33))])
    assert_one_line(error, r"expected images as a tensor, or \(images, labels\), got tuple")


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 4, 8, 8), (4, 3), (4, 3, 0, 0), (3, 8)])
def test_wrong_channels_and_sizes(shape, engine, model):
    images = re.escape(str(list(shape)))
    with pytest.raises(InputError) as error:
        engine.score(torch.rand(shape))
    assert_one_line(error, rf"images {images}: expected \[N, 3, 8, 8\], the channels and size of fit")
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["energy"]).fit([torch.rand(shape)])
    assert_one_line(error, rf"images {images}: the model rejects them; expected the channels and size")


def test_a_size_that_the_model_takes_but_fit_has_not_seen(engine, model, test_images, tmp_path):
    larger = torch.nn.functional.interpolate(test_images, scale_factor=2)
    engine.save(tmp_path / "state.safetensors")
    for fitted in (engine, oe.Engine.load(tmp_path / "state.safetensors", model)):
        with pytest.raises(InputError) as error:
            fitted.score(larger)
        assert_one_line(error, r"expected \[N, 3, 8, 8\], the channels and size of fit")
    both = oe.Engine(model, ["energy"]).fit([test_images, larger])
    assert torch.isfinite(both.score(larger)["energy"]).all()


def test_a_scalar(engine):
    with pytest.raises(InputError) as error:
        engine.score(torch.tensor(1.0))
    assert_one_line(error, r"expected a floating point batch \[N, C, H, W\], got torch.float32 \[\]")


@pytest.mark.parametrize("label", [5, 99, -2])
def test_labels_out_of_range(label, model, id_batches):
    batches = [(x, y.clone()) for x, y in id_batches]
    batches[1][1][3] = label
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["energy"]).fit(batches)
    assert_one_line(error, f"label {label} of sample 67 is out of range: expected 0 to 4, .* 5 classes; map the labels")


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(33), torch.zeros(32, dtype=torch.int64), torch.zeros((33, 1), dtype=torch.int64), torch.ones(33) > 0],
)
def test_labels_of_another_kind(labels, model, test_images):
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["energy"]).fit([(test_images, labels)])
    assert_one_line(error, r"labels of batch 0: expected whole numbers \[33\], one per image, got torch")
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["energy"]).fit([(test_images, ["cat"] * 33)])
    assert_one_line(
        error, r"labels of batch 0: expected whole numbers \[33\], one per image, got a list that is no array"
    )


def test_too_few_samples(model, images):
    def fit(count: int, **settings):
        oe.Engine(model, ["low_dim_gradient"], settings={"low_dim_gradient": settings}).fit([images(count, 1)])

    with pytest.warns(OodEngineWarning, match="n_components=20: the 20 anchor gradients span 19 directions, so 19"):
        fit(40, n_components=20)
    with pytest.raises(InputError) as error:
        fit(3)
    assert_one_line(
        error, "3 ID samples, 3 of them different: expected at least 4 different ones, half of them anchors"
    )
    with pytest.raises(InputError) as error:
        fit(12, head="knn", k=10)
    assert_one_line(error, "k=10 neighbours with a bank of 6: expected at least k ID samples; fit on more")


@pytest.mark.parametrize("head", ["mahalanobis", "probe_energy"])
def test_four_samples_are_enough_where_the_head_needs_two(head, model, images, test_images):
    engine = oe.Engine(model, ["low_dim_gradient"], settings={"low_dim_gradient": {"head": head}})
    assert engine.fit([images(4, 1)]).score(test_images)["low_dim_gradient"].isfinite().all()


def test_every_class_once(model, images):
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["low_dim_gradient"]).fit([(images(5, 1)[0], torch.arange(5))])
    assert_one_line(
        error, "a covariance of 3 samples in 3 classes: expected some that differ within their class .*; fit on"
    )


def test_the_same_image_many_times(model, images):
    x, _ = images(1, 1)
    with pytest.raises(InputError) as error:
        oe.Engine(model, ["low_dim_gradient"]).fit([x.expand(50, -1, -1, -1)])
    assert_one_line(error, "50 ID samples, 1 of them different: expected at least 4 different ones")


def test_a_model_without_a_linear_head():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TapError) as error:
        oe.Engine(model)
    assert_one_line(error, "Sequential has no nn.Linear: expected a classifier whose logits come from one")


def test_no_model_at_all():
    with pytest.raises(TapError) as error:
        oe.Engine("resnet50")
    assert_one_line(error, "model: expected a torch.nn.Module, got str")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detectors": ["nap", "magic"]}, "detector 'magic' is not known: expected one of energy, .*, opp"),
        ({"detectors": "nap"}, r"detectors='nap': expected a sequence of names, such as \('nap',\)"),
        ({"detectors": []}, r"detectors=\(\): expected at least one name; see ood_engine.available_detectors"),
        ({"settings": {"nap": {}}}, "settings for 'nap': expected one of this engine's detectors, nap_energy, opnp"),
        (
            {"settings": {"opnp": {"rho": 1}}},
            "detector 'opnp' has no setting 'rho': expected one of weight_range, neuron",
        ),
        (
            {"detectors": ["msp"], "settings": {"msp": {"t": 1}}},
            "detector 'msp' has no setting 't': expected one of none",
        ),
    ],
)
def test_unknown_detectors_and_settings(arguments, message, model):
    with pytest.raises(InputError) as error:
        oe.Engine(model, **arguments)
    assert_one_line(error, message)


def test_features_of_another_kind(engine, test_images):
    feature_map = engine.scorer.run(test_images).feature_map
    for bad, came in (
        (feature_map[0], r"torch.float32 \[12, 4, 4\]"),
        (feature_map.long(), r"torch.int64 \[33, 12, 4, 4\]"),
    ):
        with pytest.raises(InputError) as error:
            engine.score_features(bad)
        assert_one_line(error, rf"feature_map: expected a floating point \[N, D, H, W\], got {came}")
    with pytest.raises(InputError) as error:
        engine.score_features(feature_map[:, :7])
    assert_one_line(error, r"feature_map \[33, 7, 4, 4\]: expected \[N, 12, H, W\] of a verified map")
    with pytest.raises(InputError) as error:
        engine.score_features(None)
    assert_one_line(error, r"feature_map none: expected \[N, 12, H, W\]")
    features = torch.rand(33, 12)
    for bad in (features[:, :7], features[:1], features.long(), features[0]):
        with pytest.raises(InputError) as error:
            engine.score_features(feature_map, bad)
        assert_one_line(error, r"features: expected a floating point head input \[33, 12\], got")
    with pytest.raises(OodEngineError) as error:
        engine.score_features(None, features)
    assert_one_line(error, r"NAP needs the feature map: pass feature_map \[N, D, H, W\]")
    with pytest.raises(InputError) as error:
        engine.score_features(feature_map[:, :, :0])
    assert_one_line(error, "feature_map: expected a floating point")


def test_a_loader_that_fails_passes_its_error_on(engine):
    def broken():
        raise RuntimeError("disk on fire")
        yield

    with pytest.raises(RuntimeError, match="disk on fire"):
        engine.score_loader(broken())
