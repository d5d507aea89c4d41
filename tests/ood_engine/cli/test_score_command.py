"""`ood-engine score`: where images come from, what is said of those without a score, and what a spreadsheet gets."""

from __future__ import annotations

import csv
import io
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ood_engine as oe
from ood_engine.model.loading import load_model
from ood_engine.scorer import Scorer


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder photos/ with twelve images at two depths, in the working directory."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = tmp_path / "photos" / f"{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def read(path):
    return pq.read_table(path).to_pylist()


def test_images_of_no_use_do_not_look_like_success(place, call, photos):
    for path in photos.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    (photos / "0" / "00.png").write_text("hello")
    (photos / "notes.txt").touch()
    code, out, err = call(place.score("t.parquet", data=photos))
    assert code == 1
    assert "12 of 12 images have no score, above --max-errors 0.1; t.parquet is written and has the reasons" in err
    assert "warning" in err
    assert "files left out, as their ending is not that of an image: 1 .txt" in err
    assert "  11 (first 0/02.png): cannot be read as an image (" in out
    assert "  1 (first 0/00.png): not a readable image; expected one of PNG" in out
    assert "nap_energy: no image has a score, so none is flagged or cleared" in out
    assert " flagged as" not in out
    assert all(row["error"] and row["nap_energy_out_of_distribution"] is None for row in read("t.parquet"))


@pytest.mark.parametrize(("allowed", "code"), [("0.25", 0), ("0.24", 1)])
def test_a_share_of_errors_is_allowed(place, call, photos, allowed, code):
    for index in (0, 2, 4):
        (photos / "0" / f"{index:02d}.png").write_text("hello")
    assert call(place.score("t.parquet", "--max-errors", allowed, data=photos))[0] == code
    assert len(read("t.parquet")) == 12


def test_the_summary_has_the_reasons(place, answer, photos):
    (photos / "0" / "00.png").write_text("hello")
    summary = answer(place.score("t.parquet", data=photos))
    (reason,) = summary["error_reasons"]
    assert (reason["count"], reason["first"]) == (1, "0/00.png")
    assert "not a readable image" in reason["reason"]
    assert summary["decided"] == dict.fromkeys(place.detectors, 11)


def test_a_row_that_is_not_the_models_own_says_so(place, call, photos, monkeypatch):
    wrong = iter([-1, 1, 1])  # loading scores synthetic inputs first

    def agrees(_, signals, __):
        return torch.arange(len(signals.features)) != next(wrong)

    monkeypatch.setattr(Scorer, "_agrees", agrees)
    assert call(place.score("t.parquet", "--max-errors", "1", data=photos))[0] == 0
    rows = read("t.parquet")
    assert [index for index, row in enumerate(rows) if row["error"]] == [1, 9]  # batches of eight
    assert "differ from the model's own" in rows[1]["error"]
    assert rows[1]["nap_energy_score"] is None
    assert rows[1]["confidence"] > 0


@pytest.mark.parametrize("data", ["photos", "photos/**/*.png", "-"])
def test_images_come_from_anywhere_and_are_named(place, call, photos, monkeypatch, data):
    engine = oe.Engine.load(place.state, load_model(place.spec, place["net.safetensors"]))
    engine.information["class_names"] = [f"class {number}" for number in range(8)]
    engine.save("named.safetensors")
    names = [path.relative_to(photos.parent).as_posix() for path in sorted(photos.rglob("*.png"))]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(names).encode())))
    arguments = place.score("t.parquet", state="named.safetensors")
    arguments[arguments.index("--data") + 1] = data
    assert call(arguments)[0] == 0
    rows = read("t.parquet")
    assert [row["path"] for row in rows] == [name.removeprefix("photos/" if data == "photos" else "") for name in names]
    assert all(row["class_name"] == f"class {row['predicted_class']}" for row in rows)
    assert all(1 / 8 < row["confidence"] <= 1 for row in rows)


@pytest.mark.parametrize(("more", "mark"), [([], "'"), (["--raw-csv"], "")])
def test_a_name_that_a_spreadsheet_would_run_is_not_run(place, call, photos, more, mark):
    (photos / "0" / "00.png").rename(photos / "=cmd.png")
    assert call(place.score("t.csv", *more, data=photos))[0] == 0
    with open("t.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)][-1] == mark + "=cmd.png"


def test_the_help_says_that_the_model_is_code(call):
    assert "whose code is run" in " ".join(call(["score", "--help"])[1].split())
