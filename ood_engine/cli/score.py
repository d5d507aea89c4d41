"""`ood-engine score`: a table with one row per image, written in parts so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine import Engine
from ..images.dataset import Batch, ImageDataset, open_dataset
from .common import (
    Interrupted,
    batch_size_option,
    check_output,
    echo_json,
    engine_options,
    image_options,
    load_engine,
    path_option,
    run_options,
)
from .results import ResultWriter, names_folder

__all__ = ["score"]

PART_SECONDS = 30.0
"""Maximum time between two parts, which bounds the work lost to a kill."""

Rows = dict[str, list[Any]]


@click.command()
@engine_options
@path_option("--data", required=True, help="Images to score: a folder, .npy or .npz.")
@click.option(
    "--output", required=True, type=click.Path(), help="Table to write: .parquet, .csv, or a folder/ of parts."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--part-rows", default=4096, type=click.IntRange(1), help="Maximum rows per part file.")
@image_options
@batch_size_option
@run_options
def score(
    data: Path,
    output: str,
    resume: bool,
    part_rows: int,
    batch_size: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Score images and write a table with one row per image.

    Columns: path; for each detector its score (higher = more in-distribution), p-value and decision (true = out-of-distribution;
    p-value and decision are empty without calibration); error. An unreadable image, or one without finite scores, is a row with
    its error alone.

    Rows are kept in part files beside the table until it is complete; --resume continues a run that was stopped or killed. An
    output with a trailing slash becomes a folder of these Parquet parts, unmerged. Images are preprocessed as in `fit`, unless
    options override it.

    \b
    Examples:
      ood-engine score --state state.safetensors --model net.py:make --weights net.pt \\
          --data photos/ --output scores.parquet
      ood-engine score ... --output scores.parquet --resume
    """
    table = Path(output)
    if names_folder(output):
        check_output(table.parent, folder=True)
    else:
        check_output(table)
    engine, network, preprocess = load_engine(**options)
    dataset = open_dataset(data, preprocess)
    with ResultWriter(
        output, _columns(engine), job=_job(network, options["state"], data, dataset), resume=resume
    ) as writer:
        before, started = writer.rows_done, time.perf_counter()
        try:
            _score_all(engine, dataset, writer, batch_size, part_rows)
            seconds = time.perf_counter() - started
            summary = _summary(table, writer, list(engine.detectors), bool(engine.calibrations))
            writer.finish(len(dataset))
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped; {writer.rows_done} of {len(dataset)} rows are kept in {writer.parts_folder}: repeat the command with"
                " --resume to continue"
            ) from error
    summary |= {"resumed_after": before, "images_per_second": round((len(dataset) - before) / max(seconds, 1e-9), 1)}
    if as_json:
        echo_json(summary)
    else:
        _print(summary)


def _columns(engine: Engine) -> dict[str, str]:
    columns = {"path": "string"}
    for name in engine.detectors:
        columns |= {f"{name}_score": "float", f"{name}_p_value": "float", f"{name}_out_of_distribution": "bool"}
    return columns | {"error": "string"}


def _job(model: nn.Module, state: Path, data: Path, dataset: ImageDataset) -> dict[str, Any]:
    """Identity of a run; must be equal to resume it."""
    names = hashlib.sha256("\0".join(dataset.names).encode("utf-8", "surrogateescape"))
    return {
        "state": hashlib.sha256(state.read_bytes()).hexdigest(),
        "model": _weights_digest(model),
        "data": str(data.resolve()),
        "images": len(dataset),
        "names": names.hexdigest(),
        "preprocess": dataset.preprocess.to_dict(),
    }


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _score_all(engine: Engine, dataset: ImageDataset, writer: ResultWriter, batch_size: int, part_rows: int) -> None:
    pending: list[Rows] = []
    written = time.monotonic()
    with tqdm(total=len(dataset), initial=writer.rows_done, desc="scoring", unit="image", disable=None) as bar:
        for batch in dataset.batches(min(batch_size, part_rows), start=writer.rows_done):
            pending.append(_rows(engine, batch))
            bar.update(len(batch.names))
            rows = sum(len(part["path"]) for part in pending)
            if rows + batch_size > part_rows or time.monotonic() - written > PART_SECONDS:
                writer.write(_joined(pending))
                pending, written = [], time.monotonic()
        if pending:
            writer.write(_joined(pending))


def _joined(parts: list[Rows]) -> Rows:
    return {column: [value for part in parts for value in part[column]] for column in parts[0]}


def _rows(engine: Engine, batch: Batch) -> Rows:
    """The rows of one batch; an image without finite scores gets an error instead."""
    scores = {} if batch.images is None else {name: value.cpu() for name, value in engine.score(batch.images).items()}
    rows: Rows = {"path": list(batch.names)}
    unsound: dict[int, list[str]] = {}
    for name in engine.detectors:
        values = scores.get(name, torch.empty(0))
        sound = torch.isfinite(values).tolist()
        for position, is_sound in zip(batch.good, sound, strict=True):
            if not is_sound:
                unsound.setdefault(position, []).append(name)
        p_values, decisions = None, None
        if name in engine.calibrations:
            p_values = engine.calibrations[name].p_values(values)
            decisions = engine.calibrations[name].is_out_of_distribution(values)
        rows[f"{name}_score"] = _spread(batch, values, sound)
        rows[f"{name}_p_value"] = _spread(batch, p_values, sound)
        rows[f"{name}_out_of_distribution"] = _spread(batch, decisions, sound)
    reasons = {
        position: f"no finite score: activations are NaN or infinite ({_which(names, engine)})"
        for position, names in unsound.items()
    }
    errors = {**batch.errors, **reasons}
    rows["error"] = [errors.get(position) for position in range(len(batch.names))]
    return rows


def _which(names: list[str], engine: Engine) -> str:
    return "every detector" if len(names) == len(engine.detectors) else ", ".join(names)


def _spread(batch: Batch, values: Tensor | None, sound: list[bool]) -> list[Any]:
    """The values of the readable images at their positions in the batch, None elsewhere."""
    column: list[Any] = [None] * len(batch.names)
    if values is not None:
        for position, value, is_sound in zip(batch.good, values.tolist(), sound, strict=True):
            column[position] = value if is_sound else None
    return column


def _summary(output: Path, writer: ResultWriter, detectors: list[str], is_calibrated: bool) -> dict[str, Any]:
    """Counts over the whole table, including the rows of earlier runs."""
    decisions = [f"{name}_out_of_distribution" for name in detectors]
    columns = writer.read([*decisions, "error"])
    flagged = {name: sum(map(bool, columns[column])) for name, column in zip(detectors, decisions, strict=True)}
    return {
        "output": str(output),
        "images": len(columns["error"]),
        "errors": sum(error is not None for error in columns["error"]),
        "flagged": flagged if is_calibrated else None,
    }


def _print(summary: dict[str, Any]) -> None:
    click.echo(
        f"{summary['images']} images, {summary['errors']} with an error, {summary['images_per_second']:g} images/s"
    )
    for name, count in (summary["flagged"] or {}).items():
        share = 100 * count / max(summary["images"] - summary["errors"], 1)
        click.echo(f"{name}: {count} flagged as out-of-distribution ({share:.1f} %)")
    if summary["flagged"] is None:
        click.echo("no decisions: the state was not calibrated")
    click.echo(f"wrote {summary['output']}")
