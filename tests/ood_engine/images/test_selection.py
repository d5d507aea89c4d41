"""Images to score: one file, a folder at any depth, a pattern, a list, standard input."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from ood_engine.errors import DataError, OodEngineWarning
from ood_engine.images.dataset import Preprocess, open_images

GRAY = Preprocess(None, 1)
FILES = {"top.png": 1, "cat/a.png": 2, "cat/deep/er/b.JPG": 3, "dog/c.png": 4}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder photos/ in the working directory, with files at any depth and an empty folder."""
    for name, value in FILES.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), 10 * value).save(path)
    (tmp_path / "photos" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def found(data):
    """(name, value of FILES) of each sample; None where there is no image."""
    dataset = open_images(data, GRAY)
    assert dataset.labels is None
    assert dataset.class_names is None
    return [(s.name, None if s.image is None else round(float(s.image.mean()) * 25.5)) for s in dataset]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("photos", ["cat/a.png", "cat/deep/er/b.JPG", "dog/c.png", "top.png"]),
        ("photos/top.png", ["top.png"]),
        ("photos/cat/**/*.JPG", ["photos/cat/deep/er/b.JPG"]),
        ("photos/*/*.png", ["photos/cat/a.png", "photos/dog/c.png"]),
        ("photos/*", ["photos/top.png"]),
    ],
)
def test_images_are_found_wherever_they_lie(photos, data, names):
    values = {name.rpartition("/")[2]: value for name, value in FILES.items()}
    assert found(data) == [(name, values[name.rpartition("/")[2]]) for name in names]


def test_a_list_names_images_relative_to_itself_and_every_line_is_a_sample(photos, tmp_path, monkeypatch):
    lines = f"top.png\r\n\n  {photos}/dog/c.png\ncat\nnone.png\ntop.png\n"
    (photos / "some.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    expected = [("top.png", 1), (f"{photos}/dog/c.png", 4), ("cat", None), ("none.png", None), ("top.png", 1)]
    assert found("photos/some.txt") == expected
    monkeypatch.chdir(photos)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert found("-") == expected


def test_labels_of_an_archive_do_not_matter(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=["x", "y"])
    assert [name for name, _ in found(str(tmp_path / "a.npz"))] == ["a.npz[0]", "a.npz[1]"]


def test_other_files_are_counted(photos):
    for name in ("a.heic", "cat/b.HEIC", "cat/notes.txt", "cat/.hidden"):
        (photos / name).touch()
    with pytest.warns(OodEngineWarning, match=r"photos: files left out, .*: 2 \.heic, 1 \.txt$"):
        assert len(found("photos")) == 4
    with pytest.warns(OodEngineWarning, match=r"1 \.heic$"):
        assert found("photos/*") == [("photos/top.png", 1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nothing", "nothing: does not exist; expected an image, a folder .* or - for a list on standard input"),
        ("photos/empty", "holds no image"),
        ("photos/*.bmp", "matches no image; expected files ending in .png"),
        ("photos/a.zip", "is a file ending in '.zip'; expected an image"),
        ("photos/blank.txt", "lists no image; expected one path a line"),
    ],
)
def test_where_there_is_no_image_it_is_said_what_was_expected(photos, data, message):
    (photos / "a.zip").touch()
    (photos / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match=message):
        found(data)
