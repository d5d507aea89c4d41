"""Batches of a loader in every form."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch

from ood_engine.errors import InputError
from ood_engine.features.cache import NO_LABEL
from ood_engine.features.loader import image_batches

IMAGES, LABELS = torch.zeros(2, 3, 4, 4), torch.tensor([1, 0])
BATCHES = {
    "tensor": (IMAGES, False),
    "(images,)": ((IMAGES,), False),
    "[images, labels]": ([IMAGES, LABELS], True),
    "three": ((IMAGES, [1, 0], ["a.png", "b.png"]), True),
    "metadata": ((IMAGES, LABELS, torch.zeros(2, 5)), True),
    "no labels": ((IMAGES, None), False),
    "transformers": (UserDict(pixel_values=IMAGES, labels=LABELS), True),
    "medical": ({"image": IMAGES, "label": LABELS, "path": ["a", "b"]}, True),
    "images alone": ({"images": IMAGES}, False),
}


@pytest.mark.parametrize("form", BATCHES)
def test_images_and_labels_are_found(form):
    batch, has_labels = BATCHES[form]
    ((images, labels),) = image_batches([batch], "fitting")
    assert images is IMAGES
    assert labels.tolist() == ([1, 0] if has_labels else [NO_LABEL] * 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            [IMAGES[0], IMAGES[1]],
            r"several tensors \[3, 4, 4\], \[3, 4, 4\]; stack images of one size by torch\.stack\(batch\)",
        ),
        ([IMAGES, IMAGES, IMAGES], r"several tensors \[2, 3, 4, 4\], \[2, 3, 4, 4\]; stack"),
        (
            (IMAGES, LABELS.float()),
            r"labels of batch 0: expected whole numbers \[2\], one per image, got torch\.float32",
        ),
        ({"image": IMAGES, "x": IMAGES}, r"its images under exactly one of pixel_values, .*, got 'image', 'x'; yield"),
        ({"data": IMAGES}, r"its images under exactly one of .* got 'data'"),
        ({"image": IMAGES, "label": LABELS, "target": LABELS}, "its labels under exactly one of label, labels"),
        ({"image": "a.png"}, "batch 0 of the loader: expected images as a tensor"),
        ((), "batch 0 of the loader: expected images as a tensor, .* got tuple"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        list(image_batches([batch], "fitting"))


def test_the_advice_for_a_list_of_images_works():
    ((images, _),) = image_batches([torch.stack([IMAGES[0], IMAGES[1]])], "fitting")
    assert torch.equal(images, IMAGES)
