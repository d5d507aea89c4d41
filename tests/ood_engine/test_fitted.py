"""Modules whose fitted state is their buffers: casts, state_dict, copies."""

from __future__ import annotations

import copy

import pytest
import torch

import ood_engine as oe
from ood_engine.detectors import create_detector
from ood_engine.errors import NotFittedError
from ood_engine.fitted import FittedModule, aligned


def lies_row_major_and_aligned(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 64 == 0


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element into a longer tensor."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.fixture
def signals(engine, test_images):
    return lambda: engine.scorer.signals(engine.scorer.run(test_images).feature_map, None)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_fitted_buffers_as_they_are(cast, engine, signals):
    for name, original in engine.detectors.items():
        detector = getattr(copy.deepcopy(original), cast)()
        before = original.state_dict()
        assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items()), name
        moved = copy.deepcopy(original).to("cpu", torch.float16)
        for each in (detector, moved):
            assert all(value.dtype == before[key].dtype for key, value in each.state_dict().items()), name
        assert torch.equal(detector(signals()), original(signals())), name


@pytest.mark.parametrize("name", oe.available_detectors())
def test_state_dict_fills_a_detector_that_was_never_fitted(name, engine, signals):
    original = engine.detectors[name]
    expected = original(signals())
    state = {key: value.clone() for key, value in original.state_dict().items()}
    badly_placed = {
        key: value.T.contiguous().T if value.ndim == 2 else unaligned(value) for key, value in state.items()
    }
    for values, assign in ((state, False), (badly_placed, False), (badly_placed, True)):
        detector = create_detector(name, **original.settings)
        if state:
            assert not detector.is_fitted
            with pytest.raises(NotFittedError, match=r"is not fitted: call engine.fit"):
                detector(signals())
        detector.load_state_dict(values, assign=assign)
        assert detector.is_fitted
        assert list(detector.state_dict()) == list(state)
        assert all(lies_row_major_and_aligned(buffer) for buffer in detector.buffers())
        assert torch.equal(detector(signals()), expected)


def test_a_copy_owns_its_state(engine, signals):
    for name, original in engine.detectors.items():
        expected = original(signals())
        copied = copy.deepcopy(original)
        assert copied.settings == original.settings
        for value in copied.state_dict().values():
            value.zero_()
        assert torch.equal(original(signals()), expected), name


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bool])
def test_aligned_copies_what_does_not_lie_well(dtype):
    values = torch.arange(15).view(3, 5).to(dtype)
    assert aligned(values) is values
    for placed in (unaligned(values), values.T.contiguous().T, values.repeat(1, 2)[:, :5]):
        assert not lies_row_major_and_aligned(placed)
        assert lies_row_major_and_aligned(aligned(placed))
        assert torch.equal(aligned(placed), values)


def test_fitted_and_loaded_tensors_lie_alike(engine, model, state):
    loaded = oe.Engine.load(state, model)
    for one in (engine, loaded):
        for modules in (one.detectors, one.calibrations):
            for name, module in modules.items():
                for key, buffer in module.named_buffers():
                    assert lies_row_major_and_aligned(buffer), (name, key)
    assert all(lies_row_major_and_aligned(column) for column in loaded._canary.rows)
    assert lies_row_major_and_aligned(loaded.fit_fingerprints)


def test_what_is_fitted_is_not_copied_where_it_lies_well():
    module, value = FittedModule("value"), torch.ones(3, 4)
    module.set_fitted(value=value)
    assert module.fitted("value").data_ptr() == value.data_ptr()
