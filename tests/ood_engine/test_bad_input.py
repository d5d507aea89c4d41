"""Bad input: each gets one clear line that names the thing, what was expected and the way out, and never a score."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import CalibrationError, InputError, OodEngineError, OodEngineWarning, TapError

not_finite = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])


@contextmanager
def refused(kind: type[OodEngineError], message: str) -> Iterator[None]:
    """Expect one line of the engine's own errors."""
    with pytest.raises(kind, match=message) as error:
        yield
    assert "\n" not in str(error.value)


def changed(batches, value: float, row: int = 70):
    """The loader with one bad pixel in image `row`."""
    batches = [(x.clone(), y) for x, y in batches]
    batches[row // 64][0][row % 64, 1, 2, 3] = value
    return batches


@not_finite
def test_bad_pixels_at_fit_and_calibrate(value, make_model, make_engine, id_batches, fresh_batches):
    for activation in (nn.ReLU, nn.ReLU6):
        with refused(
            InputError, "sample 70 of 240 has NaN or infinite features: expected finite ID images; check that image"
        ):
            oe.Engine(make_model(activation), ["energy"]).fit(changed(id_batches, value))
    with refused(
        CalibrationError, "1 of 100 calibration scores of 'energy' are NaN or infinite: expected finite ID images"
    ):
        make_engine(("energy",)).calibrate(changed(fresh_batches, value))


@not_finite
def test_bad_pixels_at_score_are_nan_in_their_own_row(value, engine, test_images):
    sound = engine.score(test_images)
    for row in (0, 17, 32):
        bad = test_images.clone()
        bad[row, 0, 3, 3] = value
        scores = engine.score(bad)
        kept = torch.arange(33) != row
        assert int(scores.bad_rows) == 1
        for name, score in scores.items():
            assert score[row].isnan(), name
            assert torch.equal(score[kept], sound[name][kept]), name
    every_row = engine.score(test_images * torch.nan)
    assert all(score.isnan().all() for score in every_row.values())
    assert int(every_row.bad_rows) == 33


@not_finite
@pytest.mark.filterwarnings("ignore:overruled by force")  # the model is untrained
def test_activations_that_hide_infinity_hide_no_bad_pixel(value, make_model, id_batches, test_images):
    """ReLU6 makes 6 of Inf, which would pass for a sound feature."""
    engine = oe.Engine(make_model(nn.ReLU6), oe.available_detectors()).fit(id_batches, force=True)
    sound = engine.score(test_images)
    bad = test_images.clone()
    bad[4, 0, 3, 3] = value
    assert engine.scorer.run(bad).head_input[4].isfinite().all() == (value == value)
    scores = engine.score(bad)
    assert all(score[4].isnan() for score in scores.values())
    assert all(torch.equal(score[5:], sound[name][5:]) for name, score in scores.items())


def test_scores_beyond_float32_are_not_infinite(make_model, unlabelled_batches, test_images):
    model = make_model().double()
    model[-1].bias.data += 1e300
    engine = oe.Engine(model, ["energy"]).fit([x.double() for x in unlabelled_batches])
    assert engine.score(test_images.double())["energy"].isnan().all()


@not_finite
def test_bad_weights(value, make_model):
    for place in ("0.weight", "6.weight", "6.bias"):
        model = make_model()
        dict(model.named_parameters())[place].data.view(-1)[0] = value
        with refused(
            TapError,
            f"the model's '{place}' has 1 NaN or infinite values of .*: expected finite weights; load an intact",
        ):
            oe.Engine(model)


def test_empty_loaders(engine, make_engine, model, test_images):
    for use in (
        oe.Engine(model, ["energy"]).fit,
        make_engine(("energy",)).calibrate,
        engine.score_loader,
    ):
        for loader in ([], [test_images[:0]]):
            with refused(
                InputError, "the loader gave no images: expected at least one batch; check its path and filters"
            ):
                use(loader)


def test_an_empty_batch_and_a_scalar(engine, test_images):
    with refused(InputError, r"expected a floating point batch \[N, C, H, W\], got torch.float32 \[\]"):
        engine.score(torch.tensor(1.0))
    with refused(InputError, r"images \[0, 3, 8, 8\]: the batch is empty; expected at least one image"):
        engine.score(test_images[:0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images(dtype, engine, model, test_images):
    bad = (test_images * 255).to(dtype)
    for use in (engine.score, engine.predict, oe.Engine(model, ["energy"]).fit, lambda x: engine.score_loader([x])):
        with refused(
            InputError, rf"images: expected a floating point batch \[N, C, H, W\], got {dtype} .*images.float\(\) / 255"
        ):
            use([bad] if getattr(use, "__name__", "") == "fit" else bad)


def test_no_tensor_and_no_batch_at_all(engine, model, test_images):
    for bad in (None, [1, 2], "image.png"):
        with refused(InputError, "images: expected a floating point batch"):
            engine.score(bad)
    for batch, message in (
        ({"pixels": test_images}, "expected its images under exactly one of .*, got 'pixels'"),
        (("a.png", torch.zeros(33)), r"expected images as a tensor, or \(images, labels\), got tuple"),
    ):
        with refused(InputError, f"batch 0 of the loader: {message}"):
            oe.Engine(model, ["energy"]).fit([batch])


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 4, 8, 8), (4, 3), (4, 3, 0, 0), (3, 8)])
def test_wrong_channels_and_sizes(shape, engine, model):
    images = re.escape(str(list(shape)))
    with refused(InputError, rf"images {images}: expected \[N, 3, 8, 8\], the channels and size of fit"):
        engine.score(torch.rand(shape))
    with refused(InputError, rf"images {images}: the model rejects them; expected the channels and size"):
        oe.Engine(model, ["energy"]).fit([torch.rand(shape)])


def test_a_size_that_the_model_takes_but_fit_has_not_seen(engine, model, test_images, state):
    larger = torch.nn.functional.interpolate(test_images, scale_factor=2)
    for fitted in (engine, oe.Engine.load(state, model)):
        with refused(InputError, r"expected \[N, 3, 8, 8\], the channels and size of fit"):
            fitted.score(larger)
    both = oe.Engine(model, ["energy"]).fit([test_images, larger])
    assert torch.isfinite(both.score(larger)["energy"]).all()


@pytest.mark.parametrize("label", [5, 99, -2])
def test_labels_out_of_range(label, model, id_batches):
    batches = [(x, y.clone()) for x, y in id_batches]
    batches[1][1][3] = label
    with refused(
        InputError, f"label {label} of sample 67 is out of range: expected 0 to 4, .* 5 classes; map the labels"
    ):
        oe.Engine(model, ["energy"]).fit(batches)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(33), torch.zeros(32, dtype=torch.int64), torch.zeros((33, 1), dtype=torch.int64), torch.ones(33) > 0],
)
def test_labels_of_another_kind(labels, model, test_images):
    with refused(InputError, r"labels of batch 0: expected whole numbers \[33\], one per image, got torch"):
        oe.Engine(model, ["energy"]).fit([(test_images, labels)])
    with refused(
        InputError, r"labels of batch 0: expected whole numbers \[33\], one per image, got a list that is no array"
    ):
        oe.Engine(model, ["energy"]).fit([(test_images, ["cat"] * 33)])


def test_too_few_samples(model, images):
    def fit(count: int, **settings):
        oe.Engine(model, ["low_dim_gradient"], settings={"low_dim_gradient": settings}).fit([images(count, 1)])

    with pytest.warns(OodEngineWarning, match="n_components=20: the 20 anchor gradients span 19 directions, so 19"):
        fit(40, n_components=20)
    with refused(
        InputError, "3 ID samples, 3 of them different: expected at least 4 different ones, half of them anchors"
    ):
        fit(3)
    with refused(InputError, "k=10 neighbours with a bank of 6: expected at least k ID samples; fit on more"):
        fit(12, head="knn", k=10)


@pytest.mark.parametrize("head", ["mahalanobis", "probe_energy"])
def test_four_samples_are_enough_where_the_head_needs_two(head, model, images, test_images):
    engine = oe.Engine(model, ["low_dim_gradient"], settings={"low_dim_gradient": {"head": head}})
    assert engine.fit([images(4, 1)]).score(test_images)["low_dim_gradient"].isfinite().all()


@pytest.mark.filterwarnings("ignore:overruled by force")  # the labels are made up
def test_every_class_once(model, images):
    with refused(
        InputError, "a covariance of 3 samples in 3 classes: expected some that differ within their class .*; fit on"
    ):
        oe.Engine(model, ["low_dim_gradient"]).fit([(images(5, 1)[0], torch.arange(5))], force=True)


def test_the_same_image_many_times(model, images):
    x, _ = images(1, 1)
    with refused(InputError, "50 ID samples, 1 of them different: expected at least 4 different ones"):
        oe.Engine(model, ["low_dim_gradient"]).fit([x.expand(50, -1, -1, -1)])


def test_no_model_at_all():
    with refused(TapError, "model: expected a torch.nn.Module, got str"):
        oe.Engine("resnet50")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detectors": ["nap-enrgy"]}, "expected one of energy, .*, opp; did you mean 'nap_energy'?"),
        ({"settings": {"opnp": {"weights_range": (0, 1)}}}, "did you mean 'weight_range'?"),
        ({"detectors": ["nap", "magic"]}, "detector 'magic' is not known: expected one of energy, .*, opp"),
        ({"detectors": "nap"}, r"detectors='nap': expected a sequence of names, such as \('nap',\)"),
        ({"detectors": []}, r"detectors=\(\): expected at least one name; see ood_engine.available_detectors"),
        ({"settings": {"nap": {}}}, "settings for 'nap': expected one of nap_energy, opnp"),
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
    with refused(InputError, message):
        oe.Engine(model, **arguments)


def test_features_of_another_kind(engine, test_images):
    feature_map = engine.scorer.run(test_images).feature_map
    for bad, came in (
        (feature_map[0], r"torch.float32 \[12, 4, 4\]"),
        (feature_map.long(), r"torch.int64 \[33, 12, 4, 4\]"),
    ):
        with refused(InputError, rf"feature_map: expected a floating point \[N, D, H, W\], got {came}"):
            engine.score_features(bad)
    with refused(InputError, r"feature_map \[33, 7, 4, 4\]: expected \[N, 12, H, W\] of a verified map"):
        engine.score_features(feature_map[:, :7])
    with refused(InputError, r"feature_map none: expected \[N, 12, H, W\]"):
        engine.score_features(None)
    features = torch.rand(33, 12)
    for bad in (features[:, :7], features[:1], features.long(), features[0]):
        with refused(InputError, r"features: expected a floating point head input \[33, 12\], got"):
            engine.score_features(feature_map, bad)
    with refused(OodEngineError, r"NAP needs the feature map: pass feature_map \[N, D, H, W\]"):
        engine.score_features(None, features)
    with refused(InputError, "feature_map: expected a floating point"):
        engine.score_features(feature_map[:, :, :0])


def test_a_loader_that_fails_passes_its_error_on(engine):
    def broken():
        raise RuntimeError("disk on fire")
        yield

    with pytest.raises(RuntimeError, match="disk on fire"):
        engine.score_loader(broken())
