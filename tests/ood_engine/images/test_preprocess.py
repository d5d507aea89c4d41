"""Pixels to model input: the same numbers as Pillow and torch give, and refusals that name the trouble."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ood_engine.errors import InputError, OodEngineError
from ood_engine.images.preprocess import Preprocess

rng = np.random.default_rng(0)
COLOUR = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_values_are_scaled_then_normalised():
    preprocess = Preprocess(None, 3, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    image = preprocess(Image.fromarray(COLOUR))
    mean, std = torch.tensor(preprocess.mean)[:, None, None], torch.tensor(preprocess.std)[:, None, None]
    expected = (torch.from_numpy(COLOUR).permute(2, 0, 1).float() / 255 - mean) / std
    torch.testing.assert_close(image, expected)
    assert image.dtype == torch.float32
    assert image.is_contiguous()


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))),
    st.none() | st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([1, 3]),
)
def test_an_array_gives_what_the_pillow_image_gives(pixels, size, channels):
    preprocess = Preprocess(size, channels, (0.5,), (0.25,))
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    assert torch.equal(preprocess(pixels), preprocess(image))
    assert preprocess(pixels).shape == (channels, *(size or pixels.shape[:2]))
    reference = image.convert("RGB" if channels == 3 else "L")
    if size is not None:
        reference = reference.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    expected = (np.asarray(reference, dtype=np.float32) / 255).reshape(*reference.size[::-1], channels)
    assert torch.equal(preprocess(pixels), torch.from_numpy((expected - 0.5) / np.float32(0.25)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [None, (4, 5), (18, 14)])
def test_floats_give_what_bytes_give(size):
    for preprocess in (Preprocess(size, 1), Preprocess(size, 3)):
        floats = preprocess(COLOUR.astype(np.float64) / 255)
        torch.testing.assert_close(floats, preprocess(COLOUR), atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA"])
def test_every_mode_is_converted(mode):
    source = Image.fromarray(COLOUR)
    image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
    colour = image.convert("RGB")
    for channels, expected in ((3, np.asarray(colour)), (1, np.asarray(colour.convert("L"))[:, :, None])):
        found = Preprocess(None, channels)(image)
        assert torch.equal(found, torch.from_numpy(expected.astype(np.float32) / 255).permute(2, 0, 1))


def test_a_transparent_palette_is_read_without_a_warning():
    image = Image.fromarray(COLOUR).convert("P")
    image.info["transparency"] = bytes([0, 255])
    assert Preprocess()(image).shape == (3, 9, 7)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_gray_keeps_its_depth(mode):
    values = np.array([[0, 1, 257], [256, 40000, 65535]], dtype=np.uint16 if mode == "I;16" else np.int32)
    image = Image.fromarray(values)
    assert image.mode == mode
    gray = Preprocess(None, 1)(image)
    assert torch.equal(gray, torch.from_numpy(values.astype(np.float32) / 65535)[None])
    assert torch.equal(Preprocess(None, 3)(image), gray.expand(3, -1, -1))


def test_normalised_floats_pass_only_without_mean_and_std():
    pixels = np.array([[-2.0, 3.0]])
    assert Preprocess(None, 1)(pixels).tolist() == [[[-2.0, 3.0]]]
    for preprocess in (Preprocess(None, 1, (0.5,)), Preprocess(None, 1, std=(0.5,))):
        with pytest.raises(InputError, match=r"float pixels from -2 to 3; expected \[0, 1\]"):
            preprocess(pixels)
        for too_low_or_too_high in (-0.1, 1.1):
            with pytest.raises(InputError, match=r"expected \[0, 1\]"):
                preprocess(np.array([[0.5, too_low_or_too_high]]))
        assert preprocess(np.array([[0.0, 1.0]])).shape == (1, 1, 2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.array([[0.5, np.nan], [np.inf, 0.5]]), "2 of 4 pixel values are NaN or Inf"),
        (np.array([[1e300]]), "1 of 1 pixel values are NaN or Inf"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"shape \[4, 4, 4\]"),
        (np.zeros((4, 0), dtype=np.uint8), r"shape \[4, 0, 1\]"),
        (np.zeros(4, dtype=np.uint8), r"shape \[4\]"),
        (np.zeros((4, 4), dtype=np.int64), "dtype int64; expected uint8, uint16, or float"),
        (np.zeros((4, 4), dtype=bool), "dtype bool"),
        (torch.zeros(4, 4), "is a Tensor; expected a Pillow image"),
        (Image.fromarray(np.array([[70000]], dtype=np.int32)), "pixels from 70000 to 70000; expected integers"),
        (Image.fromarray(np.array([[-1]], dtype=np.int32)), "pixels from -1 to -1"),
        (Image.fromarray(np.array([[np.nan]], dtype=np.float32)), "NaN or Inf"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        Preprocess(None, 1)(image)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 2}, "channels = 2: expected 3"),
        ({"channels": True}, "channels = True"),
        ({"size": 32}, r"size = 32: expected \(height, width\)"),
        ({"size": (32,)}, "size"),
        ({"size": (32, 0)}, "size"),
        ({"size": (32.0, 32)}, "size"),
        ({"mean": 0.5}, "mean = 0.5: expected 1 number or 3, in a tuple"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": ("0.5",)}, "expected finite numbers"),
        ({"mean": (True,)}, "expected finite numbers"),
        ({"mean": (float("nan"),)}, "expected finite numbers"),
        ({"std": (0.0,)}, r"std = \(0.0,\): expected numbers above 0"),
        ({"std": (1.0, 1.0, -1.0)}, "above 0"),
        ({"std": (float("inf"),)}, "finite"),
        ({"channels": 1, "std": (1.0, 1.0, 1.0)}, "expected 1 number, in a tuple"),
        ({"resize": (1, 1)}, "expected a mapping with channels, mean, size, std"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Preprocess.from_dict(fields)


@pytest.mark.parametrize(
    "preprocess", [Preprocess(), Preprocess((3, 4), 1, (0.5,), (2,)), Preprocess(None, 3, (0, 1, 0.5))]
)
def test_the_fields_survive_json(preprocess):
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert hash(preprocess) == hash(Preprocess.from_dict(preprocess.to_dict()))


def test_only_resizing_an_array_needs_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert Preprocess(None, 1)(COLOUR).shape == (1, 9, 7)
    with pytest.raises(OodEngineError, match=r"pip install 'ood-engine\[cli\]'"):
        Preprocess((4, 4))(COLOUR)
