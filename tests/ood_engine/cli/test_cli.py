from __future__ import annotations

import builtins
import csv
import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ood_engine as oe
from ood_engine.cli import score as score_module
from ood_engine.cli.application import COMMANDS, application
from ood_engine.evaluation.tune import tune
from ood_engine.model.loading import load_model
from ood_engine.scorer import Scorer
from ood_engine.state import read_header


def read(path):
    return pq.read_table(path).to_pylist()


def test_help_fits_a_terminal(call):
    for command in ([], *([name] for name in COMMANDS)):
        code, out, _ = call([*command, "--help"])
        assert code == 0
        assert "Usage: ood-engine" in out
        assert max(map(len, out.splitlines())) <= 101
        assert not command or "ood-engine " + command[0] in out.split("Options:")[0]
    assert call([])[0] == 0


# fit


def test_fit_stores_preprocessing_and_settings(place, answer, tmp_path):
    output = tmp_path / "deep" / "state.safetensors"
    more = ["--detectors", "nap_energy,opnp", "--set", "nap_energy.w=0.4", "--set", "opnp.weight_range=0.2,0.99"]
    summary = answer(place.fit(output, *more, "--calibration-share", "0.3"))
    assert (summary["fit_images"], summary["calibration_images"]) == (140, 60)
    engine = oe.Engine.load(output, load_model(place.spec, place["net.safetensors"]))
    assert engine.detectors["nap_energy"].settings["w"] == 0.4
    assert tuple(engine.detectors["opnp"].settings["weight_range"]) == (0.2, 0.99)
    assert engine.information["preprocess"] == {"size": None, "channels": 1, "mean": [0.3], "std": [0.35]}
    assert set(engine.calibrations) == {"nap_energy", "opnp"}


@pytest.mark.parametrize(("given", "size"), [("9x7", [9, 7]), ("8", [8, 8])])
def test_a_size_is_height_by_width(place, call, tmp_path, given, size):
    path = tmp_path / "state.safetensors"
    assert call(place.fit(path, "--size", given, "--detectors", "energy"))[0] == 0
    assert read_header(path)["information"]["preprocess"]["size"] == size


def test_fit_drops_calibration_images_that_were_fitted(place, answer, tmp_path):
    archive = np.load(place["fit.npz"])
    fresh = np.load(place["test.npz"])["images"]
    np.save(tmp_path / "mixed.npy", np.concatenate([archive["images"][:5], fresh]))
    arguments = place.fit(tmp_path / "s.safetensors", "--calibration", str(tmp_path / "mixed.npy"))
    assert answer(arguments)["calibration_images"] == 60


def test_fit_without_calibration_gives_scores_without_decisions(place, call, tmp_path):
    state = str(tmp_path / "s.safetensors")
    assert call(place.fit(state, "--calibration-share", "0", "--detectors", "energy"))[0] == 0
    code, out, _ = call(place.score(tmp_path / "t.parquet", state=state))
    assert code == 0
    assert "not calibrated" in out
    assert f"wrote {tmp_path / 't.parquet'}" in out
    row = read(tmp_path / "t.parquet")[0]
    assert [name for name, value in row.items() if value is None] == [
        *("class_name", "energy_p_value", "energy_out_of_distribution", "error")
    ]


def test_fit_tunes_on_corrupted_calibration_images(place, answer, tmp_path, monkeypatch):
    monkeypatch.setitem(tune.__kwdefaults__, "corruptions", ("contrast",))
    summary = answer(place.fit(tmp_path / "s.safetensors", "--tune", "--detectors", "nap_energy"))
    assert [row["detector"] for row in summary["tuned"]] == ["nap_energy"]
    assert summary["detectors"]["nap_energy"]["w"] == summary["tuned"][0]["settings"]["w"]


def test_fit_names_images_it_left_out(place, call, tmp_path):
    images = np.load(place["fit.npz"])["images"]
    images[:5] = np.nan
    np.save(tmp_path / "some.npy", images)
    arguments = place.fit(tmp_path / "s.safetensors", "--calibration-share", "0", "--json", data=tmp_path / "some.npy")
    code, out, err = call(arguments)
    assert code == 0
    assert err.count("warning: left out of fitting: some.npy[") == 3
    assert "5 images in all" in err
    assert len(json.loads(out)["skipped"]) == 5


@pytest.mark.parametrize("information", [{"class_names": {"0": "cat"}}, {"class_names": [1]}, {"preprocess": 5}])
def test_information_of_a_user_is_checked_before_use(place, refused, tmp_path, information):
    engine = oe.Engine.load(place.state, load_model(place.spec, place["net.safetensors"]))
    engine.information = information
    engine.save(tmp_path / "s.safetensors")
    (key,) = information
    for command in (
        place.score(tmp_path / "t.parquet", state=str(tmp_path / "s.safetensors")),
        place.evaluate(tmp_path / "out", state=str(tmp_path / "s.safetensors")),
    ):
        refused(command, f"its information has {key} = ", f"correct engine.information['{key}'] and save it again")


def test_unreadable_images_of_fit_and_evaluate_do_not_look_like_success(place, call, tmp_path):
    images = np.load(place["fit.npz"])["images"]
    images[150:] = np.nan
    np.save(tmp_path / "some.npy", images)
    fit = place.fit(tmp_path / "s.safetensors", data=tmp_path / "some.npy")
    code, _, err = call(fit)
    assert code == 1
    assert f"50 of 200 images cannot be used, above --max-errors 0.1; {tmp_path / 's.safetensors'} is written" in err
    assert call([*fit, "--max-errors", "0.25"])[0] == 0
    sets = {"ood": f"noise={tmp_path / 'some.npy'}"}
    for sweep in ([], ["--sweep", "--fit", place["fit.npz"], "--components", "3", "--bases", "dual", "--heads", "knn"]):
        code, out, err = call(place.evaluate(tmp_path / "out", *sweep, **sets))
        assert code == 1
        assert "50 of 200 images of 'noise' cannot be used, above --max-errors 0.1" in err
        assert "wrote " in out
        assert call(place.evaluate(tmp_path / "out", *sweep, "--max-errors", "0.25", **sets))[0] == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "nap_energy"], ["--set nap_energy", "DETECTOR.SETTING=VALUE"]),
        (["--set", "nap_energy.w=much"], ["w='much'"]),
        (["--detectors", "opnp", "--set", "opnp.weight_range=3"], ["weight_range"]),
        (["--set", "nap_energy.q=1"], ["no setting 'q'"]),
        (["--detectors", "napp"], ["'napp' is not known"]),
        (["--calibration", "x", "--calibration-share", "0.1"], ["exclude each other"]),
        (["--tune", "--calibration-share", "0"], ["--tune needs calibration"]),
        (["--calibration-share", "0.001"], ["holds out 0"]),
        (["--false-alarm-rate", "1"], ["--false-alarm-rate"]),
        (["--false-alarm-rate", "0.001"], ["false_alarm_rate=0.001", "at least 999"]),
        (["--size", "8x"], ["HEIGHTxWIDTH"]),
        (["--mean", "a"], ["0.485,0.456,0.406"]),
        (["--std", "0"], ["std"]),
        (["--device", "nonsense"], ["--device", "cpu"]),
        (["--head", "nope"], ["'nope'"]),
        (["--cache-limit", "-1"], ["--cache-limit"]),
        (["--output", "/"], ["is a folder"]),
        (["--output", f"{__file__}/s.safetensors"], ["choose another --output"]),
    ],
)
def test_fit_refuses(refused, place, tmp_path, more, words):
    refused([*place.fit(tmp_path / "s.safetensors"), *more], *words)
    assert not (tmp_path / "s.safetensors").exists()


# score


def test_score_writes_what_the_engine_says(place, call, tmp_path):
    code, out, err = call(place.score(tmp_path / "t.parquet", "--json"))
    assert (code, err) == (0, "")
    rows = read(tmp_path / "t.parquet")
    engine = oe.Engine.load(place.state, load_model(place.spec, place["net.safetensors"]))
    images = (torch.from_numpy(np.load(place["noise.npy"]))[:, None] - 0.3) / 0.35
    batches = images.split(8)  # as the command does, for rounding depends on the size of a batch
    scores, p_values, flagged = (
        {name: torch.cat([part[name] for part in parts]) for name in place.detectors}
        for parts in zip(*[(engine.score(x), engine.p_values(x), engine.predict(x)) for x in batches], strict=True)
    )
    assert list(rows[0]) == [
        *("path", "predicted_class", "class_name", "confidence"),
        *[f"{name}_{what}" for name in place.detectors for what in ("score", "p_value", "out_of_distribution")],
        "error",
    ]
    assert [row["path"] for row in rows] == [f"noise.npy[{index}]" for index in range(50)]
    with torch.no_grad():
        confidence, predicted = load_model(place.spec, place["net.safetensors"])(images).softmax(1).max(1)
    assert [row["predicted_class"] for row in rows] == predicted.tolist()
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence, rtol=1e-5)
    for name in place.detectors:
        np.testing.assert_allclose([row[f"{name}_score"] for row in rows], scores[name], rtol=1e-6)
        np.testing.assert_allclose([row[f"{name}_p_value"] for row in rows], p_values[name], rtol=1e-6)
        assert [row[f"{name}_out_of_distribution"] for row in rows] == flagged[name].tolist()
    summary = json.loads(out)
    assert summary["flagged"] == {name: int(flagged[name].sum()) for name in place.detectors}
    assert (summary["images"], summary["errors"]) == (50, 0)


def test_unreadable_images_and_unsound_scores_are_rows_with_an_error(place, call, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(np.full((8, 8), 40 * index, dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    (folder / "2.png").write_text("hello")
    code, out, _ = call(place.score(tmp_path / "t.csv", "--json", "--max-errors", "0.5", data=folder))
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 0
    assert json.loads(out)["errors"] == 2
    for row, is_good in zip(rows, (True, False, False, True), strict=True):
        assert bool(row["nap_energy_score"]) is is_good
        assert bool(row["nap_energy_out_of_distribution"]) is is_good
        assert bool(row["predicted_class"]) is bool(row["confidence"]) is is_good
        assert bool(row["error"]) is not is_good
    huge = np.load(place["noise.npy"])
    huge[3] = 3e38
    np.save(tmp_path / "huge.npy", huge)
    call(place.score(tmp_path / "h.parquet", "--mean", "0", "--std", "1", data=tmp_path / "huge.npy"))
    row = read(tmp_path / "h.parquet")[3]
    assert row["error"].startswith("no finite score: ")
    assert {row["nap_energy_score"], row["nap_energy_out_of_distribution"]} == {None}


def test_a_broken_run_goes_on_and_gives_the_same_table(refused, place, call, answer, tmp_path, monkeypatch):
    output = tmp_path / "t.parquet"
    score_batch, calls = Scorer.score_captured, []

    def interrupted(*batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score_batch(*batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_captured", interrupted)
        code, _, err = call(place.score(output, "--part-rows", "16"))
    assert code == 130
    assert "16 of 50 rows are kept" in err
    assert "--resume" in err
    refused(place.score(output), "unfinished run", "--resume")
    refused(place.score(output, "--resume", "--mean", "0.1"), "'preprocess' was")
    assert answer(place.score(output, "--part-rows", "16", "--resume"))["resumed_after"] == 16
    call(place.score(tmp_path / "whole.parquet"))
    assert read(output) == read(tmp_path / "whole.parquet")
    refused(place.score(output, "--resume"), "already complete")


def test_an_output_with_a_slash_is_a_folder_of_parts_written_by_number_or_by_the_clock(
    place, call, tmp_path, monkeypatch
):
    assert call(place.score(tmp_path / "whole.parquet"))[0] == 0
    for count, seconds in ((4, 1e9), (7, -1.0)):  # 7: one a batch
        monkeypatch.setattr("ood_engine.cli.score.PART_SECONDS", seconds)
        folder = tmp_path / "new" / str(count)
        assert call(place.score(f"{folder}/", "--part-rows", "16"))[0] == 0
        assert len(list(folder.glob("part-*.parquet"))) == count
        assert read(folder) == read(tmp_path / "whole.parquet")


def test_other_weights_below_the_same_head_do_not_continue_a_run(place, call, tmp_path, monkeypatch):
    monkeypatch.setattr(score_module.ResultWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(place.score(tmp_path / "t.parquet"))[0] == 130
    state = load_file(place["net.safetensors"])
    save_file(state | {"body.1.weight": state["body.1.weight"] * 1.0001}, tmp_path / "other.safetensors")
    other = ["--resume", "--weights", str(tmp_path / "other.safetensors")]
    code, _, errors = call(place.score(tmp_path / "t.parquet", *other))
    assert code == 2
    assert "fitted to another model" in errors
    assert "'model' was" in errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", "nope"], ["nope", "does not exist"]),
        (["--output", "t.txt"], [".parquet or .csv"]),
        (["--state", "nope"], ["no such state file"]),
        (["--weights", "nope"], ["no such file"]),
        (["--model", "nope:make"], ["nope"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--channels", "3"], ["the channels and size of fit"]),
    ],
)
def test_score_refuses(refused, place, tmp_path, change, words):
    refused(place.score(tmp_path / "t.csv", *change), *words)


# evaluate and inspect


def test_evaluate_writes_the_report(place, call, tmp_path):
    code, out, err = call(place.evaluate(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "nap_energy" in out
    assert "accuracy on ID images" in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"evaluation.json", "report.html", "histograms.png", "roc.png"}
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model, archive = load_model(place.spec, place["net.safetensors"]), np.load(place["test.npz"])
    predicted = model((torch.from_numpy(archive["images"])[:, None] - 0.3) / 0.35).argmax(1).numpy()
    assert document["accuracy"] == pytest.approx(float((predicted == archive["labels"]).mean()))


@pytest.mark.parametrize(
    ("ood", "words"),
    [
        (["noise"], ["NAME=DATA"]),
        (["a=x", "a=y"], ["'a' is taken"]),
        (["a=nowhere"], ["nowhere", "does not exist"]),
    ],
)
def test_evaluate_refuses(refused, place, tmp_path, ood, words):
    first, *others = ood
    refused(place.evaluate(tmp_path / "e", *(part for entry in others for part in ("--ood", entry)), ood=first), *words)


def test_labels_beyond_the_model_give_no_accuracy(place, call, tmp_path):
    archive = np.load(place["test.npz"])
    np.savez(tmp_path / "far.npz", images=archive["images"], labels=archive["labels"] + 5)
    code, out, err = call(place.evaluate(tmp_path / "out", "--json", data=tmp_path / "far.npz"))
    assert code == 0
    assert "no accuracy" in err
    assert json.loads(out)["accuracy"] is None


def test_class_folders_are_numbered_as_they_were_fitted(tmp_path, place, answer):
    model = load_model(place.spec, place["net.safetensors"])
    images = np.load(place["noise.npy"])
    pixels = (images * 255).round().astype(np.uint8)
    predicted = model((torch.from_numpy(pixels)[:, None] / 255 - 0.3) / 0.35).argmax(1).tolist()
    state = tmp_path / "s.safetensors"
    engine = oe.Engine.load(place.state, model)
    engine.information["class_names"] = list("abcdefgh")
    engine.save(state)
    present = sorted(set(predicted))[-1:]  # alone in its folder it would be number 0
    for index, label in enumerate(predicted):
        if label in present:
            folder = tmp_path / "id" / "abcdefgh"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    document = answer(place.evaluate(tmp_path / "out", data=tmp_path / "id", state=str(state)))
    assert document["accuracy"] == 1.0


def test_inspect_shows_the_state_without_a_model(place, call, answer):
    code, out, _ = call(["inspect", place.state])
    assert code == 0
    words = "8 classes × 64 features", "body, verified", "nap_energy", "false-alarm rate 5 %", "mean=[0.3]", "explicit"
    assert [word for word in words if word not in out] == []
    document = answer(["inspect", place.state])
    assert document["bytes"] == Path(place.state).stat().st_size
    assert 0 < sum(row["bytes"] for row in document["tensors"]) < document["bytes"]
    (subspace,) = document["subspaces"]
    assert subspace["detectors"] == ["low_dim_gradient"]
    assert subspace["cheapest"] == subspace["costs"][0]["form"]


# how commands end


def test_usage_errors_and_what_is_no_state_are_one_line(refused, place):
    refused(["inspect", place["net.safetensors"]], "not an ood-engine state")
    refused(["inspect", place["noise.npy"]], "not a safetensors file")
    refused(["fit"], "Missing option", "ood-engine fit --help")
    refused(["fits"], "no such command 'fits': expected one of", "did you mean 'fit'?")
    refused(["inspect", "x", "--nope"], "--nope")


def test_ctrl_c_without_anything_kept(place, call, tmp_path, monkeypatch):
    monkeypatch.setattr(oe.Engine, "fit", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = call(place.fit(tmp_path / "s.safetensors"))
    assert code == 130
    assert "nothing was written" in err


def test_out_of_memory_names_the_way_out(refused, place, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried a lot")

    monkeypatch.setattr(Scorer, "score_captured", full)
    refused(place.score(tmp_path / "t.csv"), "--batch-size")


def test_without_the_extra_one_line_says_how_to_install_it(call, monkeypatch):
    real = builtins.__import__

    def without_click(name, *args, **kwargs):
        if name == "click":
            raise ModuleNotFoundError("No module named 'click'", name="click")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("ood_engine.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_click)
    code, _, err = call(["demo"])
    assert code == 2
    assert err == "ood-engine: the command line needs click: pip install 'ood-engine[cli]'\n"


def test_as_a_module_it_is_the_same_program(place):
    result = subprocess.run(
        [sys.executable, "-m", "ood_engine", "inspect", "nope"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "no such state file" in result.stderr
    assert isinstance(application, click.Group)


# explain


def test_explain_gives_contributions_and_a_picture(refused, place, call, answer, tmp_path):
    state = str(tmp_path / "state.safetensors")
    assert call(place.fit(state, "--detectors", "low_dim_gradient"))[0] == 0
    use = ["explain", "--state", state, *place.model, "--data", place["test.npz"]]
    picture = tmp_path / "why.png"
    document = answer([*use, "--image", "3", "--output", str(picture)])
    assert document["image"].endswith("[3]")
    assert len(document["classes"]) == 8
    total = sum(row["contribution"] for row in document["classes"]) + document["offset"]
    assert total == pytest.approx(document["score"], rel=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = call([*use, "--image", document["image"], "--top", "2"])
    assert code == 0
    assert "predicted class" in out
    refused([*use, "--image", "999"], "--image '999'", "expected a name in --data", "or a number below 60")
    refused([*use, "--image", "3", "--output", str(tmp_path / "why.txt")], "expected a name that ends in .png")
    refused([*use, "--image", "3", "--detector", "energy"], "explain 'energy'", "expected a detector of this engine")


def test_explain_uses_the_names_of_class_folders(place, call, answer, tmp_path):
    names = [f"kind_{number}" for number in range(8)]
    with np.load(place["fit.npz"]) as data:
        for number, (image, label) in enumerate(zip(data["images"], data["labels"], strict=True)):
            folder = tmp_path / "images" / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255).astype(np.uint8)).save(folder / f"{number}.png")
    state, images = str(tmp_path / "state.safetensors"), str(tmp_path / "images")
    assert call(place.fit(state, "--detectors", "energy", data=images))[0] == 0
    use = ["explain", "--state", state, *place.model, "--data", images, "--image", "0", "--detector", "energy"]
    document = answer([*use, "--output", str(tmp_path / "why.png")])
    assert {row["name"] for row in document["classes"]} == set(names)
    assert document["predicted_name"] == names[document["predicted"]]
    assert names[document["predicted"]] in call(use)[1]


def test_a_state_of_another_model_needs_force(place, tmp_path, refused, call):
    command = ["score", "--state", place.state, "--model", place.spec, "--data", place["noise.npy"]]
    command += ["--output", str(tmp_path / "x.csv")]
    refused(command, "fitted to another model", "--force) goes on anyway")
    code, _, err = call([*command, "--force"])
    assert (code, "fitted to another model" in err) == (0, True)
