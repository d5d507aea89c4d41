"""`ood-engine evaluate --sweep`: its table and pictures, what it prints, and what survives an interruption."""

from __future__ import annotations

import csv
import json

import pytest

from ood_engine.detectors.low_dim_gradient import HEADS
from ood_engine.evaluation import sweep as sweeping


@pytest.fixture
def command(place, tmp_path):
    """command(*options) → a sweep of the user's files into a new folder."""
    return lambda *options: place.evaluate(tmp_path / "out", "--sweep", "--fit", place["fit.npz"], *options)


def test_the_command_writes_table_and_pictures(command, answer, tmp_path):
    document, folder = answer(command("--components", "3,9", "--heads", "knn,vim")), tmp_path / "out"
    assert document["complete"] is True
    assert (document["fit_samples"], document["id_samples"], document["ood_samples"]) == (200, 60, {"noise": 50})
    assert len(document["rows"]) == (3 * 2 + 1) * 2
    saved = json.loads((folder / "sweep.json").read_text())
    assert saved["rows"] == document["rows"]
    with open(folder / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["auroc"]) for row in table] == [row["auroc"] for row in document["rows"]]
    for name in ("sweep_components.png", "sweep_cost.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert str(folder / name) in document["files"]


@pytest.mark.parametrize(("name", "cell"), [("@SUM(A1)", "'@SUM(A1)"), ("n\udcff", "n\\udcff")])
def test_the_table_runs_nothing_and_has_any_name(place, call, tmp_path, name, cell):
    options = ["--sweep", "--fit", place["fit.npz"], "--components", "3", "--bases", "dual", "--heads", "knn"]
    assert call(place.evaluate(tmp_path / "out", *options, ood=f"{name}={place['noise.npy']}"))[0] == 0
    with open(tmp_path / "out" / "sweep.csv", newline="", encoding="utf-8") as file:
        assert [row["ood_set"] for row in csv.DictReader(file)] == [cell]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"][0]["ood_set"] == name


def test_no_set_takes_the_name_of_another(place, refused, tmp_path):
    options = ["--sweep", "--fit", place["fit.npz"]]
    refused(place.evaluate(tmp_path / "out", *options, ood=f"fit={place['noise.npy']}"), "the name 'fit' is taken")


def test_the_command_prints_the_best_and_the_refused(command, call):
    options = ["--components", "3", "--bases", "dual"]
    code, out, _ = call(command(*options, "--normalisations", "none,nfk", "--heads", "knn,vim"))
    assert code == 0
    assert "2 best of 2 combinations" in out
    assert "2 not fitted: normalisation='nfk' with basis='dual'" in out
    code, _, error = call(command(*options, "--normalisations", "nfk"))
    assert code == 2
    assert error.splitlines()[-1].startswith("ood-engine: no combination could be fitted")


def test_finished_rows_survive_an_interruption(command, call, tmp_path, monkeypatch):
    fit, calls = sweeping._fit, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(sweeping, "_fit", interrupted)
    code, _, error = call(command("--bases", "dual"))
    assert code == 130
    saved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert saved["complete"] is False
    assert [row["head"] for row in saved["rows"]] == list(HEADS[:2])
    assert "2 finished rows are kept" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep"], "give --fit DATA"),
        (["--heads", "knn"], "--heads belongs to a sweep"),
        (["--sweep", "--fit", "x", "--bases", "dual,pca"], "'pca' is not known"),
        (["--sweep", "--fit", "x", "--components", "0"], "expected whole numbers"),
        (["--sweep", "--fit", "x", "--components", "many"], "expected whole numbers"),
        (["--sweep", "--fit", "x"], "x"),
    ],
)
def test_the_command_refuses(place, refused, tmp_path, options, words):
    refused(place.evaluate(tmp_path / "out", *options), words)
