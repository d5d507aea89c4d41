"""`ood-engine explain`: contributions of classes, channels and positions to the score of one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..engine import Engine
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
@click.option("--detector", default="low_dim_gradient", help="A detector of the state whose score is a sum.")
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
    names = class_names_of(engine)
    if output is not None:
        picture = explanation_png(_visible(sample.image, preprocess), explanation, names, count=top)
        write_atomically(output, picture)
    document = {"image": sample.name, **_document(explanation, names, top)}
    document["picture"] = None if output is None else str(output)
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
    mean, std = (
        torch.tensor(value, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
        for value in (preprocess.mean, preprocess.std)
    )
    pixels = image * std + mean
    return pixels if pixels.shape[0] in (1, 3) else pixels.mean(0, keepdim=True)


def class_names_of(engine: Engine) -> list[str] | None:
    """Names of the head's classes from the folders of `fit`; None if they were not one folder per class."""
    names = engine.information.get("class_names")
    return names if names is not None and len(names) == engine.head.weight.shape[0] else None


def _document(explanation: Explanation, names: list[str] | None, top: int) -> dict[str, Any]:
    def name(index: int) -> str | None:
        return None if names is None else names[index]

    classes = [
        {"class": index, "name": name(index), "contribution": value}
        for index, value in largest(explanation.classes, top)
    ]
    return {
        "detector": explanation.detector,
        "score": explanation.score,
        "offset": explanation.offset,
        "bias": explanation.bias,
        "predicted": explanation.predicted,
        "predicted_name": name(explanation.predicted),
        "classes": classes,
        "channels": [{"channel": index, "contribution": value} for index, value in largest(explanation.channels, top)],
        "places": None if explanation.places is None else explanation.places.tolist(),
    }


def _print(document: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{document['image']}: {document['detector']} {document['score']:.5g} (predicted class"
        f" {document['predicted_name'] or document['predicted']}, offset {document['offset']:.5g})",
        highlight=False,
        markup=False,
    )
    table = Table("class", "contribution", "channel", "contribution")
    rows = max(len(document["classes"]), len(document["channels"]))
    for position in range(rows):
        cells = []
        for part, key in (("classes", "class"), ("channels", "channel")):
            here = document[part][position] if position < len(document[part]) else None
            cells += [""] * 2 if here is None else [str(here.get("name") or here[key]), f"{here['contribution']:.4g}"]
        table.add_row(*map(Text, cells))
    console.print(table)
    if document["picture"] is not None:
        console.print(f"wrote {document['picture']}", highlight=False, markup=False)
