"""Modules whose fitted state is their buffers: casts, state_dict, copies."""

from __future__ import annotations

import copy

import pytest
import torch

import ood_engine as oe
from ood_engine.detectors import create_detector
from ood_engine.errors import NotFittedError

DETECTORS = oe.available_detectors()


@pytest.fixture
def signals(engine, test_images):
    return lambda: engine.signals(engine.run(test_images).feature_map, None)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_fitted_buffers_as_they_are(name, cast, engine, signals):
    original = engine.detectors[name]
    detector = getattr(copy.deepcopy(original), cast)()
    before = original.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    assert all(value.dtype == before[key].dtype for key, value in detector.state_dict().items())
    moved = copy.deepcopy(original).to("cpu", torch.float16)
    assert all(value.dtype == before[key].dtype for key, value in moved.state_dict().items())
    assert torch.equal(detector(signals()), original(signals()))


@pytest.mark.parametrize("name", DETECTORS)
def test_state_dict_fills_a_detector_that_was_never_fitted(name, engine, signals):
    original = engine.detectors[name]
    detector = create_detector(name, **original.settings)
    state = {key: value.clone() for key, value in original.state_dict().items()}
    if state:
        assert not detector.is_fitted
        with pytest.raises(NotFittedError, match=r"is not fitted: call engine.fit"):
            detector(signals())
    detector.load_state_dict(state)
    assert detector.is_fitted
    assert list(detector.state_dict()) == list(state)
    assert torch.equal(detector(signals()), original(signals()))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_copy_owns_its_state(name, engine, signals):
    original = engine.detectors[name]
    expected = original(signals())
    copied = copy.deepcopy(original)
    assert copied.settings == original.settings
    for value in copied.state_dict().values():
        value.zero_()
    assert torch.equal(original(signals()), expected)


def test_moving_to_another_device_moves_everything(engine):
    for detector in engine.detectors.values():
        moved = copy.deepcopy(detector).to("meta")
        assert all(buffer.device.type == "meta" for buffer in moved.buffers())


def test_what_is_fitted_later_goes_to_the_device_it_was_moved_to():
    detector = create_detector("low_dim_gradient").to("meta")
    detector.low.set_fitted(bank=torch.ones(2, 2))
    assert detector.low.fitted("bank").device.type == "meta"


def test_loading_lacks_nothing_silently(engine):
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(engine.detectors["opnp"]).load_state_dict({})
    assert not create_detector("low_dim_gradient").is_fitted
