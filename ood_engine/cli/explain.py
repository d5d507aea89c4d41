"""`ood-engine explain`: contributions of classes, channels and positions to the score of one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import InputError
from ..evaluation.explain import Explanation
from ..evaluation.explain import explain as explain_image
from ..evaluation.report.explanation import explanation_png, largest
from ..files import write_atomically
from ..images.dataset import open_dataset
from ..images.preprocess import Preprocess
from .common import check_output, echo_json, engine_options, image_options, load_engine, path_option, run_options

__all__ = ["explain"]


@click.command()
@engine_options
@path_option("--data", required=True, help="Images: a folder, .npy or .npz.")
@click.option("--image", required=True, help="Name of the image in the data, as written by `score`, or its number.")
@click.option("--detector", default="low_dim_gradient", help="A low-dimensional-gradient detector of the state.")
@path_option("--output", help="Figure to write, a .png file.")
@click.option("--top", default=10, type=click.IntRange(1), help="Classes and channels to show.")
@image_options
@run_options
def explain(
    data: Path,
    image: str,
    detector: str,
    output: Path | None,
    top: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Explain the score of one image as a sum of contributions of classes, channels and image positions.

    \b
    Examples:
      ood-engine explain --state state.safetensors --model net.py:make --weights net.pt \\
          --data photos/ --image cat.png --output why.png
    """
    if output is not None:
        check_output(output)
        if output.suffix.lower() != ".png":
            raise InputError(f"{output}: expected a name that ends in .png for --output")
    engine, _, preprocess = load_engine(**options)
    dataset = open_dataset(data, preprocess)
    sample = dataset[_index(dataset.names, image)]
    if sample.image is None:
        raise InputError(f"{sample.name}: {sample.error}")
    explanation = explain_image(engine, sample.image, detector)
    if output is not None:
        write_atomically(output, explanation_png(_visible(sample.image, preprocess), explanation, count=top))
    document = {"image": sample.name, **_document(explanation, top), "picture": None if output is None else str(output)}
    if as_json:
        echo_json(document)
    else:
        _print(document)


def _index(names: list[str], image: str) -> int:
    if image in names:
        return names.index(image)
    if image.isdigit() and int(image) < len(names):
        return int(image)
    raise InputError(
        f"--image {image!r}: expected a name in --data (such as {names[0]!r}) or a number below {len(names)}"
    )


def _visible(image: Tensor, preprocess: Preprocess) -> Tensor:
    """The image with its normalisation undone."""
    mean, std = (torch.tensor(value).reshape(-1, 1, 1) for value in (preprocess.mean, preprocess.std))
    pixels = image * std + mean
    return pixels if pixels.shape[0] in (1, 3) else pixels.mean(0, keepdim=True)


def _document(explanation: Explanation, top: int) -> dict[str, Any]:
    return {
        "detector": explanation.detector,
        "score": explanation.score,
        "offset": explanation.offset,
        "bias": explanation.bias,
        "predicted": explanation.predicted,
        "classes": [{"class": index, "contribution": value} for index, value in largest(explanation.classes, top)],
        "channels": [{"channel": index, "contribution": value} for index, value in largest(explanation.channels, top)],
        "places": None if explanation.places is None else explanation.places.tolist(),
    }


def _print(document: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{document['image']}: {document['detector']} {document['score']:.5g} (predicted class {document['predicted']};"
        f" {document['offset']:.5g} independent of the image)",
        highlight=False,
        markup=False,
    )
    table = Table("class", "contribution", "channel", "contribution")
    rows = max(len(document["classes"]), len(document["channels"]))
    for position in range(rows):
        cells = []
        for part, key in (("classes", "class"), ("channels", "channel")):
            here = document[part][position] if position < len(document[part]) else None
            cells += ["", ""] if here is None else [str(here[key]), f"{here['contribution']:.4g}"]
        table.add_row(*cells)
    console.print(table)
    if document["picture"] is not None:
        console.print(f"wrote {document['picture']}", highlight=False, markup=False)
