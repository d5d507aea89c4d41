"""`ood-engine score`: a table with one row per image, written in parts so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from tqdm import tqdm

from ..engine import Engine
from ..images.dataset import ImageDataset, open_images
from .common import (
    Interrupted,
    batch_size_option,
    check_errors,
    check_output,
    check_space,
    echo_json,
    engine_options,
    image_options,
    load_engine,
    max_errors_option,
    run_options,
)
from .results import ResultWriter, names_folder
from .rows import Rows, columns_of, rows_of

__all__ = ["score"]

PART_SECONDS = 30.0
"""Maximum time between two parts, which bounds the work lost to a kill."""

NAMED_REASONS = 5
NUMBER = re.compile(r"\d+")


@click.command()
@engine_options
@click.option(
    "--data",
    required=True,
    metavar="IMAGES",
    help="An image, a folder of any depth, a quoted pattern such as 'photos/**/*.png', .npy, .npz, a .txt list of paths, or - for"
    " such a list on standard input.",
)
@click.option(
    "--output", required=True, type=click.Path(), help="Table to write: .parquet, .csv, or a folder/ of parts."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@max_errors_option
@click.option("--raw-csv", is_flag=True, help="Write text to .csv as it is, even what a spreadsheet would run.")
@click.option("--part-rows", default=4096, type=click.IntRange(1), help="Maximum rows per part file.")
@image_options
@batch_size_option
@run_options
def score(
    data: str,
    output: str,
    resume: bool,
    max_errors: float,
    raw_csv: bool,
    part_rows: int,
    batch_size: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Score images and write a table with one row per image.

    Columns: path; predicted class, its name if the state has them, and confidence (largest softmax probability); for each detector
    its score (higher = more in-distribution), p-value and decision (true = out-of-distribution; p-value and decision are empty
    without calibration); error. An unreadable image, or one without finite scores, is a row with its error, without a decision.
    If more than --max-errors of the images are, the table is written and the exit code is 1.

    Rows are kept in part files beside the table until it is complete; --resume continues a run that was stopped or killed, and no
    second run writes the same table meanwhile. An output with a trailing slash becomes a folder of these Parquet parts, unmerged.
    In .csv, text that a spreadsheet would run as a formula gets an apostrophe before it, unless --raw-csv. Images are preprocessed
    as in `fit`, unless options override it; their class folders, if any, mean nothing.

    \b
    Examples:
      ood-engine score --state state.safetensors --model net.py:make --weights net.pt \\
          --data photos/ --output scores.parquet
      ood-engine score ... --output scores.parquet --resume
      find photos -name '*.jpg' | ood-engine score ... --data - --output scores.csv
    """
    table = Path(output)
    if names_folder(output):
        check_output(table.parent, folder=True)
    else:
        check_output(table)
    engine, network, preprocess = load_engine(**options)
    dataset = open_images(data, preprocess)
    check_space(table, _least_bytes(table, names_folder(output), len(dataset) * len(engine.detectors)))
    job = _job(network, options["state"], data, dataset)
    with ResultWriter(output, columns_of(engine), job=job, resume=resume, raw_csv=raw_csv) as writer:
        before, started = writer.rows_done, time.perf_counter()
        try:
            _score_all(engine, dataset, writer, batch_size, part_rows)
            seconds = time.perf_counter() - started
            summary = _summary(table, writer, list(engine.detectors), bool(engine.calibrations), dataset)
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
    check_errors(
        summary["errors"],
        summary["images"],
        max_errors,
        "have no score",
        f"{output} is written and has the reasons in its column error",
    )


def _least_bytes(table: Path, is_folder: bool, scores: int) -> int:
    """Bytes still to be written for so many scores alone, in parts and, unless these are the table, once more when merged."""
    parts = table.with_name(table.name + ".parts")
    done = sum(part.stat().st_size for part in parts.iterdir()) if parts.is_dir() else 0
    return max(0, 8 * scores * (1 if is_folder else 2) - done)


def _job(model: nn.Module, state: Path, data: str, dataset: ImageDataset) -> dict[str, Any]:
    """Identity of a run; must be equal to resume it."""
    names = hashlib.sha256("\0".join(dataset.names).encode("utf-8", "surrogateescape"))
    return {
        "state": hashlib.sha256(state.read_bytes()).hexdigest(),
        "model": _weights_digest(model),
        "data": str(Path(data).resolve()),
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
            pending.append(rows_of(engine, batch))
            bar.update(len(batch.names))
            rows = sum(len(part["path"]) for part in pending)
            if rows + batch_size > part_rows or time.monotonic() - written > PART_SECONDS:
                writer.write(_joined(pending))
                pending, written = [], time.monotonic()
        if pending:
            writer.write(_joined(pending))


def _joined(parts: list[Rows]) -> Rows:
    return {column: [value for part in parts for value in part[column]] for column in parts[0]}


def _summary(
    output: Path, writer: ResultWriter, detectors: list[str], is_calibrated: bool, dataset: ImageDataset
) -> dict[str, Any]:
    """Counts over the whole table, including the rows of earlier runs."""
    decisions = [f"{name}_out_of_distribution" for name in detectors]
    columns = writer.read(["path", *decisions, "error"])
    errors = columns["error"]
    decided = {
        name: [v for v in columns[column] if v is not None] for name, column in zip(detectors, decisions, strict=True)
    }
    return {
        "output": str(output),
        "images": len(errors),
        "errors": sum(error is not None for error in errors),
        "error_reasons": _reasons(columns["path"], errors),
        "left_out": dataset.left_out,
        "decided": {name: len(values) for name, values in decided.items()} if is_calibrated else None,
        "flagged": {name: sum(values) for name, values in decided.items()} if is_calibrated else None,
    }


def _reasons(names: list[str], errors: list[str | None]) -> list[dict[str, Any]]:
    """The reasons of errors, equal up to their numbers, by frequency, each as the first image has it."""
    found: dict[str, dict[str, Any]] = {}
    for name, error in zip(names, errors, strict=True):
        if error is not None:
            reason = found.setdefault(NUMBER.sub("#", error), {"count": 0, "reason": error, "first": name})
            reason["count"] += 1
    return sorted(found.values(), key=lambda reason: -reason["count"])


def _print(summary: dict[str, Any]) -> None:
    click.echo(
        f"{summary['images']} images, {summary['errors']} with an error, {summary['images_per_second']:g} images/s"
    )
    reasons = summary["error_reasons"]
    for reason in reasons[:NAMED_REASONS]:
        click.echo(f"  {reason['count']} (first {reason['first']}): {reason['reason']}")
    if len(reasons) > NAMED_REASONS:
        click.echo(f"  and {len(reasons) - NAMED_REASONS} other reasons, in the column error")
    for name, count in (summary["flagged"] or {}).items():
        decided = summary["decided"][name]
        share = f"{count} of {decided} flagged as out-of-distribution ({100 * count / max(decided, 1):.1f} %)"
        click.echo(f"{name}: {share if decided else 'no image has a score, so none is flagged or cleared'}")
    if summary["flagged"] is None:
        click.echo("no decisions: the state was not calibrated")
    click.echo(f"wrote {summary['output']}")
