"""What `ood-engine fit` checks before its long pass, and what it keeps and tells after it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from ..calibration import Calibration
from ..engine import Engine
from ..errors import InputError, OodEngineError
from ..images.dataset import ImageDataset

__all__ = ["check_calibration", "keeping", "least_bytes", "number_by_name", "print_classes", "save_or_keep"]

_NAMED_CLASSES = 5
_LEAST_STATE = 2**20


def number_by_name(dataset: ImageDataset, names: list[str] | None) -> None:
    """Renumber the class folders to the model's classes, if the model names all of them."""
    folders = dataset.class_names
    if dataset.labels is not None and folders and names and set(folders) <= set(names) and folders != names:
        dataset.labels = torch.tensor([names.index(folder) for folder in folders], device="cpu")[dataset.labels]
        dataset.class_names = names


def check_calibration(data: Path, calibration: Path | None, count: int, rate: float) -> None:
    """Refuse before the model runs what no calibration can use."""
    if calibration is not None and calibration.resolve() == data.resolve():
        raise InputError(
            f"--calibration {calibration}: holds the images of --data, expected fresh ID images; hold some out, or leave the option"
            " out for a share of --data"
        )
    Calibration(rate).check_count(count)


def save_or_keep(engine: Engine, output: Path) -> None:
    """Save the state; if it cannot be written, keep it in a temporary folder and say so."""
    try:
        engine.save(output)
    except OodEngineError as error:
        spare = Path(tempfile.mkdtemp(prefix="ood-engine-")) / output.name
        try:
            engine.save(spare)
        except OodEngineError:
            spare.parent.rmdir()
            raise error from None
        raise OodEngineError(f"{error}; the state is kept in {spare}: move it where it belongs") from error


@contextlib.contextmanager
def keeping(engine: Engine, output: Path) -> Iterator[None]:
    """Save the state as it is if what follows the fit fails, and say so."""
    try:
        yield
    except OodEngineError as error:
        save_or_keep(engine, output)
        missing = "" if engine.calibrations else " without thresholds"
        raise type(error)(
            f"{error}; the fitted state is kept{missing} in {output}: continue in Python, by Engine.load(path, model)"
            ".calibrate(images)"
        ) from error


def least_bytes(images: int) -> int:
    """The size of a state without what the detectors add, which is not known before the fit: a fingerprint of 8 bytes an image."""
    return _LEAST_STATE + 8 * images


def print_classes(rows: list[dict[str, Any]]) -> None:
    """The predicted classes of which the largest shares are flagged."""
    most = sorted(rows, key=lambda row: -max(row["flagged"].values()))[:_NAMED_CLASSES]
    click.echo(f"flagged by predicted class (the most flagged {len(most)} of {len(rows)}):")
    for row in most:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in row["flagged"].items())
        click.echo(f"  class {row['class']}, {row['samples']} images: {shares}")
