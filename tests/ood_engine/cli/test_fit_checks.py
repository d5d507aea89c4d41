"""What `ood-engine fit`, `score` and `evaluate` know before a long pass, say before it, and keep after it."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

import ood_engine.state
from ood_engine.cli import main
from ood_engine.engine import Engine
from ood_engine.errors import OodEngineError
from ood_engine.model.loading import load_model
from ood_engine.state import read_header


@pytest.fixture
def no_forward(monkeypatch):
    """Fails the test if the model runs."""
    monkeypatch.setattr("ood_engine.demo.SmallCNN.forward", lambda *_: pytest.fail("the model ran"))


@pytest.fixture(scope="module")
def folders(place, tmp_path_factory):
    """folders(names, left_out) → a folder a class with the images to fit on, without the classes left out."""
    with np.load(place["fit.npz"]) as archive:
        images, labels = archive["images"], archive["labels"]

    def make(names, left_out=()):
        root = tmp_path_factory.mktemp("folders")
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            if names[label] not in left_out:
                (root / names[label]).mkdir(exist_ok=True)
                Image.fromarray((255 * pixels).astype(np.uint8)).save(root / names[label] / f"{number}.png")
        return root

    return make


def test_a_forgotten_normalisation_is_refused_or_forced_and_shown(place, call, refused, tmp_path):
    with np.load(place["fit.npz"]) as archive:
        np.savez(tmp_path / "fit.npz", images=archive["images"] / 255, labels=archive["labels"])
    state = tmp_path / "s.safetensors"
    arguments = place.fit(state, "--detectors", "nap_energy", data=tmp_path / "fit.npz")
    refused(arguments, "no more than by chance", "check mean and std", "--force")
    assert not state.exists()
    code, _, err = call([*arguments, "--force"])
    assert code == 0
    assert "overruled by force: the model predicts" in err
    assert "no more than by chance" in read_header(state)["set_up"]["overruled"][0]
    assert "overruled" in call(["inspect", str(state)])[1]


def test_a_missing_class_folder_is_refused_unless_labels_are_predicted_or_classes_named(
    place, call, refused, folders, answer, tmp_path
):
    state, data = tmp_path / "s.safetensors", folders("abcdefgh", left_out="c")
    arguments = place.fit(state, data=data)
    refused(arguments, "7 class folders, such as 'a', for a head of 8 classes", "--labels predicted")
    assert answer([*arguments, "--labels", "predicted"])["labels"] == "predicted"
    assert read_header(state)["information"]["class_names"] is None
    code, out, err = call(place.evaluate(tmp_path / "unnamed", data=data, state=str(state)))
    assert (code, "accuracy" in out) == (0, False)
    assert "warning: no accuracy: 7 class folders for a model of 8 classes, whose names the state does not have" in err
    (tmp_path / "named.py").write_text(
        "from ood_engine.demo import SmallCNN\n"
        "def make():\n    model = SmallCNN()\n    model.class_names = list('hgfedcba')\n    return model\n"
    )
    named = ["--model", f"{tmp_path}/named.py:make"]
    summary = answer([*place.fit(state, data=folders("hgfedcba", left_out="c")), *named])
    assert summary["label_agreement"] > 0.9
    assert read_header(state)["information"]["class_names"] == list("hgfedcba")
    evaluated = answer([*place.evaluate(tmp_path / "out", data=folders("hgfedcba", "ah"), state=str(state)), *named])
    assert evaluated["accuracy"] > 0.9


def test_folders_in_another_order_than_the_classes_name_none_of_them(place, refused, folders, answer, tmp_path):
    state = tmp_path / "s.safetensors"
    arguments = place.fit(state, data=folders("hgfedcba"))
    refused(arguments, "no more than by chance", "of them once renumbered (label → class: ", "--labels predicted")
    answer([*arguments, "--labels", "predicted"])
    assert read_header(state)["information"]["class_names"] is None
    answer([*place.fit(state, data=folders("abcdefgh")), "--labels", "predicted"])
    assert read_header(state)["information"]["class_names"] == list("abcdefgh")


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--false-alarm-rate", "0.001"], ["40 calibration samples for false_alarm_rate=0.001", "at least 999"]),
        (["--calibration-share", "0.06"], ["12 calibration samples", "at least 19"]),
        (["--calibration", "fit.npz"], ["holds the images of --data", "hold some out"]),
    ],
)
def test_what_cannot_calibrate_is_refused_before_the_model_runs(place, refused, tmp_path, more, words):
    more = [place[word] if word.endswith(".npz") else word for word in more]
    refused(place.fit(tmp_path / "s.safetensors", *more), *words)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("command", ["fit", "score"])
def test_a_full_disk_is_known_before_the_model_runs(place, refused, tmp_path, monkeypatch, command):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1000))
    monkeypatch.setattr(Engine, "load", classmethod(lambda cls, path, model, **_: _loaded(place)))
    refused(
        getattr(place, command)(tmp_path / "out.parquet"),
        "0.0 MiB are free, expected at least",
        "choose another --output",
    )
    assert list(tmp_path.iterdir()) == []


def _loaded(place):
    """An engine as loaded, without the replay of its samples."""
    engine = Engine(load_model(place.spec, place["net.safetensors"]), place.detectors)
    engine.information["preprocess"] = {"size": None, "channels": 1, "mean": [0.3], "std": [0.35]}
    return engine


def test_a_state_that_cannot_be_written_is_kept_elsewhere(place, refused, tmp_path, monkeypatch):
    target, original = tmp_path / "s.safetensors", ood_engine.state.write
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def write(state, path):
        if path == target:
            raise OodEngineError(f"{path}: could not be written")
        original(state, path)

    monkeypatch.setattr(ood_engine.state, "write", write)
    refused(place.fit(target, "--detectors", "energy"), "could not be written; the state is kept in", "move it")
    (kept,) = (tmp_path / "temporary").rglob("s.safetensors")
    monkeypatch.undo()
    kept.rename(target)
    assert main(place.score(tmp_path / "t.parquet", state=str(target))) == 0


def test_a_calibration_that_fails_after_the_fit_loses_no_fit(place, refused, tmp_path):
    with np.load(place["fit.npz"]) as archive, np.load(place["test.npz"]) as fresh:
        np.save(tmp_path / "mixed.npy", np.concatenate([archive["images"], fresh["images"][:12]]))
    state = tmp_path / "s.safetensors"
    more = ["--detectors", "energy", "--calibration", str(tmp_path / "mixed.npy")]
    refused(
        place.fit(state, *more), "12 calibration samples", f"the fitted state is kept without thresholds in {state}"
    )
    engine = Engine.load(state, load_model(place.spec, place["net.safetensors"]))
    images = (torch.from_numpy(np.load(place["test.npz"])["images"])[:, None] - 0.3) / 0.35
    assert engine.calibrate([images]).predict(images)["energy"].float().mean() <= 0.05


def test_images_of_fit_are_no_held_out_images(place, call, tmp_path):
    code, _, err = call(place.evaluate(tmp_path / "out", data="fit.npz"))
    assert code == 0
    assert "160 of 200 ID images were used in fit" in err
    assert call(place.evaluate(tmp_path / "other"))[2] == ""


def test_fit_shows_the_flagged_share_of_classes(place, call, answer, tmp_path):
    out = call(place.fit(tmp_path / "s.safetensors"))[1]
    assert "flagged by predicted class (the most flagged 5 of 8):\n  class " in out
    rows = answer(place.fit(tmp_path / "s.safetensors"))["flagged_by_class"]
    assert [row["class"] for row in rows] == list(range(8))
    assert sum(row["samples"] for row in rows) == 40
