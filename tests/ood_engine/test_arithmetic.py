"""One arithmetic: what is fitted, calibrated and tuned is computed as scores are."""

from __future__ import annotations

import warnings

import pytest
import torch

import ood_engine as oe
import ood_kernels as ok
from ood_engine.errors import OodEngineWarning
from ood_engine.state import read_header

DETECTORS = ("nap_energy", "opnp", "energy", "low_dim_gradient_knn")


@pytest.fixture
def rounded(monkeypatch):
    """Kernels that round the operands of matrix products to bfloat16 wherever the runtime says bf16, as the GPU's do."""
    calls = []

    def round_to(precision, *tensors):
        calls.append(precision)
        return [t if t is None or precision != "bf16" else t.bfloat16().float() for t in tensors]

    originals = {name: getattr(ok, name) for name in ("masked_energy", "project_gradients", "score")}

    def masked_energy(h, weight, bias, *masks, precision="ieee", backend=None):
        return originals["masked_energy"](*round_to(precision, h, weight), bias, *masks)

    def project_gradients(p, h, basis, *, precision="ieee", backend=None):
        return originals["project_gradients"](*round_to(precision, p, h), basis)

    def score(feature_map, head, basis, eps, *, rectify, precision="ieee", backend=None):
        h, nap = ok.pool_nap(feature_map, eps, rectify=rectify)
        lse, pruned, p = masked_energy(h, *head, precision=precision)
        g_low = h.new_empty(len(h), 0) if basis is None else project_gradients(p, h, basis, precision=precision)
        return ok.ScoreOutputs(h, nap, lse, pruned, p, g_low)

    for function in (masked_energy, project_gradients, score):
        monkeypatch.setattr(ok, function.__name__, function)
    return calls


def test_fit_calibrate_and_score_share_one_arithmetic(rounded, make_engine, fresh_batches, assert_same_scores):
    engine = make_engine(DETECTORS, runtime=oe.Runtime(precision="bf16"))
    assert set(rounded) == {"bf16"}, "something was computed in a default arithmetic"
    scores = engine.score_loader(fresh_batches)
    assert_same_scores(engine.scorer.score_cache(engine.scorer.calibration_cache), scores, 1e-6)
    for name, calibration in engine.calibrations.items():
        assert torch.allclose(scores[name].sort().values, calibration.scores, rtol=1e-5, atol=1e-6), name


def test_the_rounding_is_seen(rounded, make_engine, fresh_batches):
    exact = make_engine(("energy",))
    coarse = make_engine(("energy",), runtime=oe.Runtime(precision="bf16"))
    difference = exact.score_loader(fresh_batches)["energy"] - coarse.score_loader(fresh_batches)["energy"]
    assert difference.abs().max() > 1e-4


def test_tuning_and_the_canary_share_it_too(rounded, make_engine, images, tmp_path, model):
    engine = make_engine(("nap_energy", "opnp"), runtime=oe.Runtime(precision="bf16"))
    rounded.clear()
    engine.tune([images(30, 11)[0]], corruptions=["contrast"])
    engine.save(tmp_path / "state.safetensors")
    oe.Engine.load(tmp_path / "state.safetensors", model, runtime=oe.Runtime(precision="bf16"))
    assert set(rounded) == {"bf16"}


@pytest.mark.filterwarnings("ignore::ood_engine.errors.StateDriftWarning")  # the canary notices the rounding as well
def test_loading_under_another_arithmetic_warns_and_calibrating_ends_it(
    rounded, make_engine, fresh_batches, tmp_path, model
):
    path = tmp_path / "state.safetensors"
    make_engine(("energy",), runtime=oe.Runtime(precision="bf16")).save(path)
    assert read_header(path)["calibrated_under"] == {"precision": "bf16", "backend": None}
    message = (
        r"calibrated under precision='bf16', backend=None, scores are computed under precision='ieee', .*call calibrate"
    )
    with pytest.warns(OodEngineWarning, match=message):
        engine = oe.Engine.load(path, model)
    engine.calibrate(fresh_batches, 0.1)
    engine.save(path)
    oe.Engine.load(path, model)


def test_another_runtime_sets_the_thresholds_again(rounded, make_engine, fresh_batches):
    engine = make_engine(("energy",))
    before = engine.calibrations["energy"].threshold
    engine.runtime = oe.Runtime(precision="bf16")
    fresh = make_engine(("energy",), runtime=oe.Runtime(precision="bf16"))
    assert engine.calibrations["energy"].threshold == fresh.calibrations["energy"].threshold != before


def test_another_runtime_without_calibration_features_warns(make_engine, tmp_path, model):
    path = tmp_path / "state.safetensors"
    make_engine(("energy",)).save(path)
    engine = oe.Engine.load(path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.runtime = oe.Runtime(cuda_graph=True)  # the same arithmetic
    with pytest.warns(OodEngineWarning, match="call calibrate"):
        engine.runtime = oe.Runtime(precision="tf32")
