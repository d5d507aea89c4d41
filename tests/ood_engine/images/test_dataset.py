"""Datasets: bad files are samples with an error, batches come in order, and loaders leave out what is bad."""

from __future__ import annotations

import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ood_engine.errors import DataError, InputError
from ood_engine.images.dataset import PREFETCHED_BATCHES, ImageDataset, Preprocess, Sample, open_dataset
from ood_engine.images.sources import ImageSource

GRAY = Preprocess(None, 1)


@pytest.fixture
def mixed_folder(tmp_path):
    """Good images at 1, 4 and 7 of 8; the size of the first of them is the dataset's."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 6), dtype=np.uint8)
    for name, image in [("1", noise), ("4", noise), ("5", noise[:4]), ("6", noise.T), ("7", noise)]:
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    (tmp_path / "3.png").write_text("no image")
    return tmp_path


ERRORS = {
    0: "not a readable image; expected one of PNG, JPEG",
    2: "cannot be read as an image",
    3: "not a readable image",
    5: "height x width is 4x6, the first image has 8x6; give a size to resize to",
    6: "height x width is 6x8, the first image has 8x6",
}


def test_bad_files_are_samples_with_an_error(mixed_folder):
    dataset = open_dataset(mixed_folder, GRAY)
    for index, sample in enumerate(dataset):
        assert (sample.index, sample.name, sample.label) == (index, f"{index}.png", None)
        if index in ERRORS:
            assert sample.image is None
            assert ERRORS[index] in sample.error
            assert "\n" not in sample.error
        else:
            assert sample.error is None
            assert sample.image.shape == (1, 8, 6)


def test_a_resize_accepts_every_size(mixed_folder):
    dataset = open_dataset(mixed_folder, Preprocess((5, 5), 3))
    assert [sample.index for sample in dataset if sample.error] == [0, 2, 3]
    assert {sample.image.shape for sample in dataset if sample.image is not None} == {(3, 5, 5)}


def test_the_first_size_does_not_depend_on_where_reading_starts(mixed_folder):
    (batch,) = open_dataset(mixed_folder, GRAY).batches(8, start=5)
    assert batch.good == [2]
    assert batch.indices == [5, 6, 7]
    assert sorted(batch.errors) == [0, 1]


def test_an_index_works_as_in_a_list(mixed_folder):
    dataset = open_dataset(mixed_folder, GRAY)
    assert dataset[-1].index == 7
    assert len(dataset) == len(list(dataset)) == 8
    for index in (8, -9):
        with pytest.raises(IndexError):
            dataset[index]


def test_not_finite_rows_are_errors(tmp_path):
    images = np.full((4, 3, 3), 0.5, dtype=np.float32)
    images[1, 0, 0], images[2, 1, 1] = np.nan, -np.inf
    np.save(tmp_path / "data.npy", images)
    errors = [sample.error for sample in open_dataset(tmp_path / "data.npy", GRAY)]
    assert errors == [None, *["1 of 9 pixel values are NaN or Inf"] * 2, None]


def bomb(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 50_000])  # between Pillow's limit and twice the limit, and far above
@pytest.mark.parametrize("warning", ["error", "ignore"])
def test_decompression_bombs_are_errors(tmp_path, side, warning):
    (tmp_path / "bomb.png").write_bytes(bomb(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter(warning)
        sample = open_dataset(tmp_path, GRAY)[0]
    assert sample.image is None
    assert "pixels" in sample.error
    assert str(Image.MAX_IMAGE_PIXELS if side == 10_000 else 2 * Image.MAX_IMAGE_PIXELS) in sample.error


def test_a_postscript_file_called_png_is_not_run(tmp_path):
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "not a readable image" in open_dataset(tmp_path, GRAY)[0].error


def numbered(count, bad=(), labels=False, read=None):
    """Images of 2x2 whose pixels say their index; those in `bad` cannot be read."""

    def read_number(index):
        if index in bad:
            raise OSError(f"broken\n{index}")
        return np.full((2, 2), index / 1000, dtype=np.float32)

    label_tensor = torch.arange(count) % 3 if labels else None
    return ImageDataset(ImageSource([f"{i}" for i in range(count)], read or read_number, label_tensor), GRAY)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_batches_hold_what_the_samples_hold(data):
    count = data.draw(st.integers(1, 25))
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    dataset = numbered(count, bad, labels=True)
    start, size = data.draw(st.integers(0, count)), data.draw(st.integers(1, 9))
    batches = list(dataset.batches(size, start=start, workers=data.draw(st.integers(1, 3))))
    assert [len(batch.indices) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert [index for batch in batches for index in batch.indices] == list(range(start, count))
    for batch in batches:
        samples: list[Sample] = [dataset[index] for index in batch.indices]
        good = [sample for sample in samples if sample.image is not None]
        assert batch.names == [sample.name for sample in samples]
        assert batch.labels.tolist() == [sample.label for sample in samples]
        assert batch.errors == {position: s.error for position, s in enumerate(samples) if s.error}
        assert [batch.indices[position] for position in batch.good] == [sample.index for sample in good]
        assert (batch.images is None) == (not good)
        if good:
            assert torch.equal(batch.images, torch.stack([sample.image for sample in good]))


def test_batches_are_read_ahead_but_not_all_at_once():
    begun, lock = [], threading.Lock()

    def read(index):
        with lock:
            begun.append(index)
        return np.zeros((2, 2))

    batches = numbered(100, read=read).batches(4, workers=2)
    next(batches)
    deadline = time.monotonic() + 5
    ahead = 4 * (1 + PREFETCHED_BATCHES)
    while len(set(begun)) < ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert set(begun) == set(range(ahead))
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ood-engine-images")]


def test_several_workers_read_at_the_same_time():
    together = threading.Barrier(3, timeout=5)

    def read(index):
        if index:
            together.wait()
        return np.zeros((2, 2))

    (batch,) = numbered(4, read=read).batches(4, start=1, workers=3)
    assert batch.good == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected an integer at least 1"),
        ({"batch_size": 2.0}, "batch_size = 2.0"),
        ({"batch_size": 2, "workers": 0}, "workers = 0"),
        ({"batch_size": 2, "start": -1}, "start = -1: expected an integer from 0 to 5"),
        ({"batch_size": 2, "start": 6}, "start = 6"),
    ],
)
def test_wrong_counts_are_refused_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        numbered(5).batches(**arguments)
    if "start" not in arguments:
        with pytest.raises(InputError, match=message):
            numbered(5).loader(**arguments)


def test_a_loader_yields_what_is_readable_and_lists_the_rest():
    loader = numbered(10, bad={0, 5, 8, 9}, labels=True).loader(2)
    assert len(loader) == 5
    for _ in range(2):
        pairs = list(loader)
        indices = torch.cat([images[:, 0, 0, 0] for images, _ in pairs]) * 1000
        assert indices.round().tolist() == [1, 2, 3, 4, 6, 7]
        assert torch.cat([labels for _, labels in pairs]).tolist() == [1, 2, 0, 1, 0, 1]
        assert loader.skipped == [
            (str(index), f"cannot be read as an image (OSError: broken {index})") for index in (0, 5, 8, 9)
        ]


def test_a_loader_without_labels_yields_images():
    loader = numbered(5, bad={1}).loader(3)
    assert [tuple(images.shape) for images in loader] == [(2, 1, 2, 2), (2, 1, 2, 2)]
    assert loader.skipped[0][0] == "1"


def test_a_loader_of_nothing_readable_says_so():
    loader = numbered(3, bad={0, 1, 2}).loader(2)
    with pytest.raises(DataError, match=r"none of the 3 images can be used; the first, 0: cannot be read"):
        list(loader)
