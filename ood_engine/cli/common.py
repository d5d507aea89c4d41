"""What the commands share: options, values that are parsed, and the ways to print."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import nn

from ..engine import Engine
from ..errors import InputError, one_line
from ..images.preprocess import Preprocess
from ..model.loading import load_model

__all__ = [
    "Interrupted",
    "batch_size_option",
    "check_output",
    "device_option",
    "echo_json",
    "echo_skipped",
    "image_options",
    "json_option",
    "load_engine",
    "make_preprocess",
    "model_options",
    "seed_option",
    "state_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])
NAMED_SKIPPED = 3


class Interrupted(Exception):
    """Ctrl-C, with a line that says what is kept and how to go on."""


class _Size(click.ParamType):
    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = value.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r}: expected HEIGHTxWIDTH, such as 224x224, or one number for a square", param, ctx)
        return int(parts[0]), int(parts[-1])


class _Numbers(click.ParamType):
    name = "number[,number,number]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected one number, or one a channel, such as 0.485,0.456,0.406", param, ctx)


class _Device(click.ParamType):
    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if value == "auto" else str(value)
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            self.fail(f"{value!r} cannot be used here ({one_line(error)}); try --device cpu", param, ctx)


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


device_option = click.option(
    "--device", type=_Device(), default="auto", help="Where the model runs; auto takes CUDA where there is one."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
seed_option = click.option("--seed", default=0, type=click.IntRange(0, 2**31 - 1), help="Of everything that is drawn.")
batch_size_option = click.option("--batch-size", default=64, type=click.IntRange(1), help="Images a forward pass.")
state_option = click.option(
    "--state", required=True, type=click.Path(path_type=Path), help="What `ood-engine fit` wrote."
)
model_options = _together(
    click.option(
        "--model",
        required=True,
        metavar="SPEC",
        help="package.module:factory or file.py:factory; factory() is the model.",
    ),
    click.option("--weights", type=click.Path(path_type=Path), help="Its .safetensors, or a state_dict by torch.save."),
)
image_options = _together(
    click.option(
        "--size", metavar="HxW", type=_Size(), help="Resize images to height x width; one number for a square."
    ),
    click.option("--channels", type=click.Choice(["1", "3"]), help="Grey or RGB.  [3 where the state names none]"),
    click.option(
        "--mean",
        metavar="NUMBERS",
        type=_Numbers(),
        help="Subtracted from pixels in [0, 1]; one number or one a channel.",
    ),
    click.option("--std", metavar="NUMBERS", type=_Numbers(), help="What they are then divided by."),
)


def make_preprocess(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Preprocess:
    """Preprocessing by the stored fields, each replaced by an option that was given."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if "channels" in chosen:
        chosen["channels"] = int(chosen["channels"])
    return Preprocess.from_dict({**(stored or {}), **chosen})


def load_engine(
    state: Path, model: str, weights: Path | None, device: torch.device, image_fields: Mapping[str, Any]
) -> tuple[Engine, nn.Module, Preprocess]:
    """The engine of a state file, its model, and the preprocessing it was fitted with."""
    network = load_model(model, weights).to(device)
    engine = Engine.load(state, network)
    stored = engine.information.get("preprocess")
    if stored is None and all(value is None for value in image_fields.values()):
        click.echo(
            f"warning: {state} does not say how images are preprocessed: RGB in [0, 1] is assumed; see --size, --channels, --mean,"
            " --std",
            err=True,
        )
    return engine, network, make_preprocess(image_fields, stored)


def check_output(path: Path, *, folder: bool = False) -> None:
    """Refuse before the work what could not be written after it, and make the folders above.

    Raises:
        InputError: a file where a folder belongs or the other way round, or no access.
    """
    directory = path if folder else path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be made a folder ({error.strerror}); choose another --output") from error
    if not folder and path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file for --output")
    if not os.access(directory, os.W_OK):
        raise InputError(f"{directory}: cannot be written; choose another --output")


def echo_json(document: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(document, indent=2, allow_nan=False, default=str))


def echo_skipped(skipped: Sequence[tuple[str, str]], what: str) -> list[dict[str, str]]:
    """Name the first images that were left out, on standard error; returns all of them."""
    for name, error in skipped[:NAMED_SKIPPED]:
        click.echo(f"warning: left out of {what}: {name}: {error}", err=True)
    if len(skipped) > NAMED_SKIPPED:
        click.echo(f"warning: {len(skipped)} images in all were left out of {what}", err=True)
    return [{"name": name, "error": error} for name, error in skipped]
