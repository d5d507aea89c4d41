from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from PIL import Image

import ood_engine as oe
from ood_engine.cli import main
from ood_engine.demo.run import ID_CLASSES, KINDS, run_demo, write_images
from ood_engine.errors import InputError
from ood_engine.evaluation.report import write_figures


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A quick demo, whose pictures show two detectors: those of all would take a third of its time."""

    def write_few(evaluation, folder):
        return write_figures(evaluation.only(("energy", "opnp")), folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ood_engine.evaluation.evaluate.write_figures", write_few)
        patch.setattr("ood_engine.demo.run.write_figures", write_few)
        return run_demo(tmp_path_factory.mktemp("demo") / "out put", quick=True)


def test_every_detector_and_set_is_in_the_evaluation(result):
    assert set(result.evaluation.id_scores) == set(oe.available_detectors())
    assert result.evaluation.kinds == KINDS
    assert all(np.isfinite(scores).all() for scores in result.evaluation.id_scores.values())
    assert result.evaluation.accuracy > 0.3  # 0.125 is guessing


def test_all_files_are_there(result):
    names = {file.name for file in result.files}
    assert names == {
        "evaluation.json", "report.html", "histograms.png", "roc.png", "table.md", "state.safetensors", "weights.safetensors",
    }  # fmt: skip
    assert all(file.stat().st_size > 0 for file in result.files)


def test_the_parts_share_no_image_and_no_held_out_class(result):
    images = result.folder / "images"
    parts = {name: {file.name for file in images.glob(f"{name}/*/*.png")} for name in ("fit", "calibration", "test")}
    assert not parts["fit"] & parts["calibration"]
    assert not parts["fit"] & parts["test"]
    assert not parts["calibration"] & parts["test"]
    assert sorted(folder.name for folder in (images / "fit").iterdir()) == [str(n) for n in range(ID_CLASSES)]


def test_the_same_seed_gives_the_same_scores_and_cleans_up_older_images(result, tmp_path, monkeypatch):
    for writer in ("write_report", "write_figures"):
        monkeypatch.setattr(f"ood_engine.demo.run.{writer}", lambda evaluation, folder: [])
    again = run_demo(tmp_path, quick=True)
    stray = tmp_path / "images" / "noise" / "9999.png"
    Image.new("L", (8, 8)).save(stray)
    for name, scores in result.evaluation.id_scores.items():
        np.testing.assert_array_equal(scores, again.evaluation.id_scores[name])
    write_images(tmp_path / "images", 0, True)
    assert not stray.exists()


def test_a_folder_that_no_demo_wrote_is_left_alone(tmp_path):
    mine = tmp_path / "images" / "mine.png"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(InputError, match="no demo wrote it"):
        run_demo(tmp_path, quick=True)
    assert mine.exists()


def test_the_printed_commands_work_and_agree_with_the_demo(result, capsys, monkeypatch):
    monkeypatch.setattr("ood_engine.evaluation.evaluate.write_html", lambda evaluation, path: path)
    monkeypatch.setattr("ood_engine.evaluation.evaluate.write_figures", lambda evaluation, folder: [])
    for command in result.commands():
        program, *arguments = shlex.split(command)
        assert program == "ood-engine"
        assert main([*arguments, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
    for row in json.loads((result.folder / "evaluation.json").read_text())["rows"]:
        if row["mean"]:
            same = next(other for other in document["rows"] if other["mean"] and other["detector"] == row["detector"])
            assert same["auroc"] == pytest.approx(row["auroc"], abs=1e-9)
    assert document["accuracy"] == result.evaluation.accuracy
