"""Files that hold more than one gray or RGB image: told for what they are, never scored by their first page or bands."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ood_engine.images.dataset import Preprocess, open_images

GRAY = Preprocess(None, 1)


def write_tiff(path, pixels, photometric, extra, *, big=False, order="<"):
    """One strip of pixels [H, W, bands], which Pillow cannot write."""
    pixels = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(order))
    height, width, bands = pixels.shape
    values = {
        256: [width],
        257: [height],
        258: [8 * pixels.dtype.itemsize] * bands,
        259: [1],
        262: [photometric],
        273: [0],
        277: [bands],
        278: [height],
        279: [pixels.nbytes],
        338: extra,
        339: [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * bands,
    }
    values = {tag: numbers for tag, numbers in values.items() if numbers}
    length, count, offset = ("Q", "Q", 8) if big else ("I", "H", 4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8))
    )
    behind = len(head) + struct.calcsize("<" + count) + len(values) * (4 + 2 * offset) + offset
    entries, data = b"", b""
    for tag, numbers in values.items():
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if tag == 273:
            packed, numbers = b"strip", [0]
        elif len(packed) > offset:
            packed, data = struct.pack(order + length, behind + len(data)), data + packed
        entries += struct.pack(order + "HH" + length, tag, 3, len(numbers)) + packed.ljust(offset, b"\0")
    strip = struct.pack(order + "H", behind + len(data)).ljust(offset, b"\0")
    entries = entries.replace(b"strip".ljust(offset, b"\0")[: max(offset, 5)], strip)
    path.write_bytes(head + struct.pack(order + count, len(values)) + entries + bytes(offset) + data + pixels.tobytes())


def tiff(dtype, bands, photometric, extra, **more):
    pixels = np.arange(4 * 5 * bands).reshape(4, 5, bands) - (50 if np.dtype(dtype).kind == "i" else 0)
    return lambda path: write_tiff(path, pixels.astype(dtype), photometric, extra, **more)


def frames(count, **more):
    first, *rest = (Image.new("L", (5, 4), 60 * index) for index in range(count))
    return lambda path: first.save(path, save_all=True, append_images=rest, **more)


def error_of(path):
    (sample,) = open_images(str(path), GRAY)
    assert (sample.image is None) == (sample.error is not None)
    return sample.error


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.tif", frames(3), "a TIFF of 3 pages, and one score cannot be that of all; save each as a file"),
        ("a.gif", frames(3), "an animation of 3 frames"),
        ("a.png", frames(2), "an animation of 2 frames"),
        ("a.webp", frames(2), "an animation of 2 frames"),
        ("a.tif", tiff("u1", 13, 1, [0] * 12), "a TIFF of 13 bands of 8-bit unsigned integers; expected 1"),
        ("a.tif", tiff("u2", 13, 1, [0] * 12, order=">"), "a TIFF of 13 bands of 16-bit unsigned integers"),
        ("a.tif", tiff("u1", 4, 2, [0]), "a TIFF of 4 bands of 8-bit"),
        ("a.tif", tiff("u2", 4, 2, [0], big=True), "a TIFF of 4 bands of 16-bit"),
        ("a.tif", tiff("f4", 4, 1, [0] * 3), "a TIFF of 4 bands of 32-bit floats"),
        ("a.tif", tiff("f8", 1, 1, []), "a TIFF of 1 band of 64-bit floats; expected"),
        ("a.tif", tiff("i2", 1, 1, []), "pixels from -50 to -31; expected integers .*Hounsfield units"),
    ],
)
def test_what_is_not_one_gray_or_rgb_image_is_told_for_what_it_is(tmp_path, name, write, message):
    write(tmp_path / name)
    error = error_of(tmp_path / name)
    assert error is not None
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.tif", tiff("u1", 1, 1, [])),
        ("a.tif", tiff("u1", 3, 2, [])),
        ("a.tif", tiff("u1", 4, 2, [2])),
        ("a.tif", tiff("u2", 1, 1, [], order=">")),
        ("a.tif", tiff("f4", 1, 1, [], big=True)),
        ("a.jpg", frames(2, format="MPO")),
        ("a.gif", frames(1)),
    ],
)
def test_one_image_passes_with_alpha_and_with_a_preview(tmp_path, name, write):
    write(tmp_path / name)
    assert error_of(tmp_path / name) in (None, "float pixels from 0 to 19; expected [0, 1]")


def test_a_reduced_copy_of_a_page_is_no_page(tmp_path):
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "a.tif") as file:
        for size, kind in (((5, 4), 0), ((2, 2), 1)):
            Image.new("L", size).save(file, format="TIFF", tiffinfo={254: kind})
            file.newFrame()
    with Image.open(tmp_path / "a.tif") as image:
        assert image.n_frames == 2
    assert error_of(tmp_path / "a.tif") is None
