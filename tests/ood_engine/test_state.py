"""State files: round trip, damage, other heads, drift."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ood_engine as oe
from ood_engine.errors import NotFittedError, OodEngineError, StateDriftWarning, StateError
from ood_engine.features.cache import CacheRows, FeatureCache
from ood_engine.features.canary import Canary
from ood_engine.features.fit_data import FitData
from ood_engine.identity import SyntheticInputs
from ood_engine.runtime import Kernels
from ood_engine.scorer import Scorer
from ood_engine.state import FORMAT, read_header
from tests.fuzz_state import sign


def rewrite(source: Path, target: Path, change_tensors=None, change_header=None, digest: bool = True) -> Path:
    """Write the state again with changed tensors or a changed header; its digest made to fit, or not."""
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    if change_tensors is not None:
        change_tensors(tensors)
    if change_header is not None:
        header = json.loads(metadata["ood_engine"])
        change_header(header)
        metadata["ood_engine"] = json.dumps(header)
        if digest:
            metadata["digest"] = hashlib.sha256(metadata["ood_engine"].encode()).hexdigest()
    save_file(tensors, target, metadata)
    return target


def test_round_trip_is_bitwise(engine, state, model, test_images, assert_same_scores, count_forwards):
    loaded = oe.Engine.load(state, model)
    assert count_forwards == [4]  # the synthetic inputs
    assert loaded.plan == engine.plan
    assert loaded.information == {"note": "kept"}
    assert_same_scores(loaded.score(test_images), engine.score(test_images), 0)
    for name, flagged in engine.predict(test_images).items():
        assert torch.equal(loaded.predict(test_images)[name], flagged)
        assert torch.equal(loaded.p_values(test_images)[name], engine.p_values(test_images)[name])
        found = loaded.detectors[name].state_dict()
        assert all(torch.equal(found[key], value) for key, value in engine.detectors[name].state_dict().items())
        assert found.keys() == engine.detectors[name].state_dict().keys()


def test_without_calibration_nothing_is_decided_and_without_cache_nothing_refitted(
    model, id_batches, test_images, tmp_path
):
    oe.Engine(model, ["energy"]).fit(id_batches).save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    with pytest.raises(NotFittedError, match="not calibrated"):
        loaded.predict(test_images)
    with pytest.raises(NotFittedError, match="refit needs the feature cache"):
        loaded.refit()


def test_what_detectors_share_is_stored_and_loaded_once(state, model, test_images):
    header = read_header(state)
    bases = [key for key in header["aliases"] if key.endswith("basis.components")]
    assert len(bases) == sum(name.startswith("low_dim_gradient") for name in oe.available_detectors()) - 1
    loaded = oe.Engine.load(state, model)
    signals = loaded.scorer.signals(loaded.scorer.run(test_images).feature_map, None)
    for detector in loaded.detectors.values():
        detector(signals)
    assert len(signals._coordinates) == len({"grad_pca", "low_dim_gradient"})


def test_loading_refuses_fitted_samples_in_calibrate(state, model, id_batches, fresh_batches, engine):
    loaded = oe.Engine.load(state, model)
    with pytest.raises(OodEngineError, match="calibration image 0 was used in fit"):
        loaded.calibrate(id_batches[:1])
    loaded.calibrate(fresh_batches, 0.1)
    assert torch.equal(loaded.calibrations["opnp"].threshold, engine.calibrations["opnp"].threshold)


def test_saved_again_it_is_the_same_state(state, model, tmp_path):
    loaded = oe.Engine.load(state, model)
    loaded.save(tmp_path / "again.safetensors")
    first, second = read_header(state), read_header(tmp_path / "again.safetensors")
    assert second == first
    assert first["calibration_samples"] == 100
    assert first["fit_samples"] == 240
    before, after = load_file(state), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_tuned_after_loading_it_does_not_drift(state, model, images, tmp_path):
    loaded = oe.Engine.load(state, model)
    x, _ = images(40, 11)
    loaded.tune([x], ood_loader=[1 - x], detectors=["nap_energy", "opnp"])
    loaded.save(tmp_path / "tuned.safetensors")
    again = oe.Engine.load(tmp_path / "tuned.safetensors", model)
    assert again.detectors["nap_energy"].settings == loaded.detectors["nap_energy"].settings
    assert again.tuning == json.loads(json.dumps(loaded.tuning))


def test_models_of_another_dtype_get_their_decisions(state, model, engine, test_images):
    for dtype, tolerance in ((torch.float64, 1e-3), (torch.float16, 0.01), (torch.bfloat16, 0.1)):
        cast = copy.deepcopy(model).to(dtype)
        if dtype == torch.bfloat16:
            with pytest.warns(
                StateDriftWarning, match=rf"drifts on this machine \(cpu, {dtype}\): .* scores moved by up to"
            ):
                loaded = oe.Engine.load(state, cast)
        else:
            loaded = oe.Engine.load(state, cast)
        found = loaded.score(test_images)
        expected = engine.score(test_images)
        for name in ("energy", "nap", "nap_energy", "max_logit"):
            assert (found[name] - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), (name, dtype)
        assert all(
            value.dtype == engine.detectors["opnp"].state_dict()[key].dtype
            for key, value in loaded.detectors["opnp"].state_dict().items()
        )


def test_canary_is_neither_of_anchors_nor_on_a_threshold(engine, state):
    stored = load_file(state)
    fingerprints = stored["canary.rows.fingerprints"]
    assert len(fingerprints) == 16
    _, others = FitData(engine.cache, engine.head, Kernels()).split(4096)
    assert torch.isin(fingerprints, engine.cache.rows.fingerprints[others]).all()
    for name, calibration in engine.calibrations.items():
        assert (stored[f"canary.scores.{name}"] != calibration.threshold).all(), name
    assert torch.equal(stored["canary.scores.energy"], engine.scorer.score_cache(_cache(stored))["energy"])


def _cache(stored):
    return FeatureCache(CacheRows(*(stored[f"canary.rows.{field}"] for field in CacheRows._fields)))


@pytest.mark.parametrize(("share", "reported"), [(0.005, False), (0.02, True)])
def test_drift_beyond_a_hundredth_of_the_spread_is_reported(share, reported, state, model, monkeypatch):
    original = Scorer.score_cache

    def perturbed(self, cache):
        scores = original(self, cache)
        score = scores["energy"]
        score += share * (score.max() - score.min())
        return scores

    monkeypatch.setattr(Scorer, "score_cache", perturbed)
    if not reported:
        oe.Engine.load(state, model)
        return
    message = r"own scores on this machine \(cpu, torch.float32\): energy: scores moved by up to .*, where .* is allowed; .*fit"
    with pytest.raises(StateError, match=message + r" again here; force=True \(--force\) goes on anyway"):
        oe.Engine.load(state, model)
    with pytest.warns(StateDriftWarning, match=message):
        oe.Engine.load(state, model, force=True)


def test_changed_decisions_and_lost_scores_are_reported(engine):
    rows = Canary.choose(engine.scorer.calibration_cache)
    scores = engine.scorer.score_cache(FeatureCache(rows))
    inputs = SyntheticInputs((2,), 0.0, 1.0)
    assert Canary(rows, scores, inputs, {}).drift(scores, engine.calibrations) == []
    threshold = engine.calibrations["msp"].threshold
    before = torch.where(torch.arange(16) < 3, threshold - 1e-7, threshold)
    now = {"msp": before + 2e-7, "nap": torch.full((16,), torch.nan)}
    reports = Canary(rows, {"msp": before, "nap": torch.ones(16)}, inputs, {}).drift(now, engine.calibrations)
    assert reports[0] == "msp: 3 of 16 decisions changed"
    assert reports[1].startswith("nap: scores moved by up to nan")


def cut(kept):
    return lambda source, path: path.write_bytes(source.read_bytes()[:kept])


def flip_a_bit(source, path):
    content = bytearray(source.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rename(tensors):
    tensors["renamed"] = tensors.pop("fit.fingerprints")


def update(digest=True, **changes):
    return lambda source, path: rewrite(source, path, None, lambda header: header.update(changes), digest)


NEWER = f"format version {FORMAT + 1}, written by ood-engine 9.9: expected version {FORMAT}; fit again with"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda source, path: None, r"no such state file; make one by engine.save\(path\)"),
        *((cut(kept), r"truncated, or not a safetensors file \(.*; copy it again") for kept in (0, 4, 100, -1, -1000)),
        (lambda source, path: save_file({"weight": torch.ones(2)}, path), "a safetensors file, but not an ood-engine"),
        (flip_a_bit, "its tensors were altered since it was written"),
        (lambda source, path: rewrite(source, path, rename), "its tensors were altered since it was written"),
        (update(seed=7, digest=False), "its header was altered since it was written"),
        (update(format=FORMAT + 1, package="9.9"), NEWER),
    ],
)
def test_what_is_no_whole_and_unaltered_state_is_refused(make, message, state, model, tmp_path):
    path = tmp_path / "x.safetensors"
    make(state, path)
    with pytest.raises(StateError, match=r"x.safetensors: " + message):
        oe.Engine.load(path, model)


def test_an_altered_header_is_not_even_read(state, tmp_path):
    path = update(seed=7, digest=False)(state, tmp_path / "x.safetensors")
    with pytest.raises(StateError, match="its header was altered since it was written"):
        read_header(path)


@pytest.mark.parametrize("mask", ["weight_mask", "neuron_mask"])
def test_masks_are_those_of_their_ranks(mask, model, id_batches, tmp_path):
    """One bit of a mask moves scores by less than the canary tolerates."""
    path = tmp_path / "x.safetensors"
    oe.Engine(model, ["opnp"]).fit(id_batches).save(path)
    tensors = load_file(path)
    tensors[f"detectors.opnp.{mask}"].view(-1)[0] ^= True
    with safe_open(path, framework="pt") as file:
        sign(tensors, json.loads(file.metadata()["ood_engine"]), path)
    with pytest.raises(
        StateError, match=r"x.safetensors: the masks .* are not those of its ranks .*; copy the file again"
    ):
        oe.Engine.load(path, model)


def test_a_pickle_is_not_loaded(tmp_path, model):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "state.safetensors"
    for write in (lambda: path.write_bytes(pickle.dumps(Trap())), lambda: torch.save({"x": Trap()}, path)):
        write()
        with pytest.raises(StateError, match="truncated, or not a safetensors file"):
            oe.Engine.load(path, model)
    assert not (tmp_path / "sprung").exists()


def test_another_head_or_layer(state, model):
    other = copy.deepcopy(model)
    for head, words in (
        (nn.Linear(12, 7), "7 classes × 12 features with bias"),
        (nn.Linear(12, 5, bias=False), "5 classes × 12 features without bias"),
    ):
        other[-1] = head
        with pytest.raises(StateError, match=f"a head of 5 classes × 12 features with bias, this model's has {words}"):
            oe.Engine.load(state, other)
    with pytest.raises(StateError, match=r"'6' was fitted.*: the model has no module of that name.*; load the model"):
        oe.Engine.load(state, nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "broken")])
def test_an_error_of_the_disk_leaves_the_old_state_and_no_remains(error, engine, tmp_path, monkeypatch):
    path = tmp_path / "new" / "state.safetensors"
    engine.save(str(path))
    before = path.read_bytes()

    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    message = rf"state.safetensors: could not be written \(.*{error.strerror}.*\); [\d.]+ MiB are"
    for place in (path, tmp_path / "state.safetensors"):
        with pytest.raises(OodEngineError, match=message):
            engine.save(place)
    assert [file.name for file in tmp_path.rglob("*")] == ["new", path.name]
    assert path.read_bytes() == before


def test_a_map_named_by_hand_is_found_again(
    unproven_model, unlabelled_batches, test_images, tmp_path, assert_same_scores
):
    engine = oe.Engine(unproven_model, ["nap", "energy"], feature_map="body", rectify=True).fit(
        unlabelled_batches, labels="predicted"
    )
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", unproven_model)
    assert loaded.scorer.rectify
    assert not loaded.plan.proven
    assert_same_scores(loaded.score(test_images), engine.score(test_images), 0)
    assert_same_scores(loaded.fit(unlabelled_batches).score(test_images), engine.score(test_images), 0)
