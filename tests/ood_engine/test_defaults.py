"""Global defaults of torch, and features of extreme size."""

from __future__ import annotations

import contextlib

import pytest
import torch

import ood_engine as oe
from ood_engine.errors import InputError
from ood_engine.features.cache import FeatureCache


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str | None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float32, "meta"), (torch.float16, None)])
def test_no_default_of_torch_reaches_a_score(
    dtype, device, engine, model, id_batches, fresh_batches, test_images, tmp_path, assert_same_scores
):
    path = tmp_path / "state.safetensors"
    with defaults(dtype, device):
        other = oe.Engine(model, oe.available_detectors()).fit(id_batches).calibrate(fresh_batches, 0.1)
        other.save(path)
        loaded = oe.Engine.load(path, model)
        found = [one.score_loader([test_images]) for one in (other, loaded)]
        p_values = loaded.p_values(test_images)
    for scores in found:
        assert_same_scores(scores, engine.score(test_images), 0)
    assert all(torch.equal(p_values[name], value) for name, value in engine.p_values(test_images).items())


def test_what_cannot_be_decomposed_is_refused_in_words(model, id_batches, monkeypatch):
    def fail(_):
        # As LAPACK does for features of 1e20, depending on its version.
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    features = torch.full((240, 12), 1e20) * torch.rand(240, 12, generator=torch.Generator().manual_seed(0))
    engine = oe.Engine(model, ["low_dim_gradient"])
    cache = FeatureCache.from_features(features)
    with pytest.raises(InputError, match=r"low_dim_gradient: .* cannot be decomposed .* up to 1e\+20; normalise"):
        engine.fit_features(cache, id_batches[0][0], labels="predicted", force=True)
