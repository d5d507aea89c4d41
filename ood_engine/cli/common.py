"""Options, option parsing and output shared by the commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "check_errors",
    "check_output",
    "check_space",
    "echo_json",
    "echo_skipped",
    "engine_options",
    "force_option",
    "image_options",
    "json_option",
    "load_engine",
    "make_preprocess",
    "max_errors_option",
    "model_options",
    "path_option",
    "print_table",
    "run_options",
    "seed_option",
    "together",
    "weights_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])
NAMED_SKIPPED = 3


class Interrupted(Exception):
    """An end with a message on what is kept and how to continue; by default by Ctrl-C."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


def _size(value: str) -> tuple[int, int]:
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: expected HEIGHTxWIDTH, such as 224x224, or one number for a square")
    return int(parts[0]), int(parts[-1])


def _numbers(value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        problem = f"{value!r}: expected one number, or one per channel, such as 0.485,0.456,0.406"
        raise click.BadParameter(problem) from None


def _device(value: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if value == "auto" else value
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{value!r} cannot be used here ({one_line(error)}); try --device cpu") from error


def path_option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option whose value is a path."""
    return click.option(*names, type=click.Path(path_type=Path), **attributes)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help text."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_MODEL = "package.module:factory or file.py:factory, whose code is run"
weights_option = path_option("--weights", help="Its weights: .safetensors, or a state_dict saved by torch.save.")
model_options = together(
    click.option("--model", required=True, metavar="SPEC", help=f"{_MODEL}; factory() returns the model."),
    weights_option,
)
force_option = click.option(
    "--force", is_flag=True, help="Warn where the state of another model, or scores that changed, would be refused."
)
engine_options = together(
    path_option("--state", required=True, help="State file from `ood-engine fit`."),
    model_options,
    force_option,
)
seed_option = click.option("--seed", default=0, type=click.IntRange(0, 2**31 - 1), help="Seed of all random draws.")
batch_size_option = click.option("--batch-size", default=64, type=click.IntRange(1), help="Images per forward pass.")
max_errors_option = click.option(
    "--max-errors",
    metavar="SHARE",
    default=0.1,
    type=click.FloatRange(0, 1),
    help="Share of images that may be unreadable or without a score; above it the exit code is 1.",
)
image_options = together(
    click.option("--size", metavar="HxW", type=_size, help="Resize images to height x width; one number for a square."),
    click.option(
        "--channels", type=click.Choice(["1", "3"]), help="1 (grey) or 3 (RGB).  [3 unless stored in the state]"
    ),
    click.option(
        "--mean",
        metavar="NUMBERS",
        type=_numbers,
        help="Mean subtracted from pixels in [0, 1]; one number, or one per channel.",
    ),
    click.option("--std", metavar="NUMBERS", type=_numbers, help="Standard deviation to divide by, likewise."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one machine-readable JSON object.")
run_options = together(
    click.option(
        "--device",
        metavar="DEVICE",
        type=_device,
        default="auto",
        help="Device of the model; auto: CUDA if available, else CPU.",
    ),
    json_option,
)


def make_preprocess(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Preprocess:
    """Preprocessing by the stored fields, overridden by the given options."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if "channels" in chosen:
        chosen["channels"] = int(chosen["channels"])
    return Preprocess.from_dict({**(stored or {}), **chosen})


def load_engine(
    state: Path, model: str, weights: Path | None, device: torch.device, force: bool, **image_fields: Any
) -> tuple[Engine, nn.Module, Preprocess]:
    """Load the engine of a state file, its model, and the preprocessing it was fitted with."""
    network = load_model(model, weights).to(device)
    engine = Engine.load(state, network, force=force)
    stored, names = engine.information.get("preprocess"), engine.information.get("class_names")
    for key, words, holds in (
        ("preprocess", "a mapping", isinstance(stored, dict)),
        ("class_names", "a list of texts", isinstance(names, list) and all(isinstance(name, str) for name in names)),
    ):
        if not holds and engine.information.get(key) is not None:
            raise InputError(
                f"{state}: its information has {key} = {repr(engine.information[key])[:80]}: expected {words}, or none; correct"
                f" engine.information[{key!r}] and save it again"
            )
    if stored is None and all(value is None for value in image_fields.values()):
        click.echo(
            f"warning: {state} stores no preprocessing: RGB in [0, 1] is assumed; see --size, --channels, --mean, --std",
            err=True,
        )
    return engine, network, make_preprocess(image_fields, stored)


def check_output(path: Path, *, folder: bool = False) -> None:
    """Check before the work that the output can be written, and create its parent folders.

    Raises:
        InputError: a file in place of a folder or vice versa, or missing permissions.
    """
    directory = path if folder else path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be made a folder ({error.strerror}); choose another --output") from error
    if not folder and path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file name for --output")
    if not os.access(directory, os.W_OK):
        raise InputError(f"{directory}: cannot be written; choose another --output")


def check_space(path: Path, needed: int) -> None:
    """Check before the work that `needed` bytes fit beside the output at `path`, whose folder exists.

    Raises:
        InputError: less free space.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(
            f"{path.parent}: {free / 2**20:.1f} MiB are free, expected at least {needed / 2**20:.1f} MiB for {path.name}; free some"
            " space, or choose another --output"
        )


def check_errors(count: int, images: int, allowed: float, problem: str, written: str) -> None:
    """End with exit code 1 if more than the allowed share of images has a problem, after the output was written.

    Raises:
        Interrupted: it has.
    """
    if count > allowed * images:
        raise Interrupted(f"{count} of {images} images {problem}, above --max-errors {allowed:g}; {written}", code=1)


def echo_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object to standard output."""
    click.echo(json.dumps(document, indent=2, allow_nan=False, default=str))


def echo_skipped(skipped: Sequence[tuple[str, str]], what: str) -> list[dict[str, str]]:
    """Name the first skipped images on standard error, and return all of them."""
    for name, error in skipped[:NAMED_SKIPPED]:
        click.echo(f"warning: left out of {what}: {name}: {error}", err=True)
    if len(skipped) > NAMED_SKIPPED:
        click.echo(f"warning: {len(skipped)} images in all were left out of {what}", err=True)
    return [{"name": name, "error": error} for name, error in skipped]


def print_table(text: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table without lines: columns of text, then columns of numbers, which stand to the right."""
    # Imported here, because the overview of commands needs neither.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*text, title=title and f"\n{title}", title_justify="left", box=None, pad_edge=False)
    for heading in numbers:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table, highlight=False)
