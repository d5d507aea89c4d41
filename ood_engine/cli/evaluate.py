"""`ood-engine evaluate`: the table of detectors by OOD sets, and a report with figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from ..evaluation.evaluate import evaluate as evaluate_sets
from ..evaluation.evaluate import write_report
from ..evaluation.report import print_table
from ..images.dataset import ImageDataset, open_dataset
from .common import (
    batch_size_option,
    check_errors,
    check_output,
    echo_json,
    echo_skipped,
    engine_options,
    image_options,
    load_engine,
    max_errors_option,
    path_option,
    run_options,
)
from .sweep import FIT_NAME, SWEEP_SETTINGS, check_sweep, run_sweep, sweep_options

__all__ = ["evaluate"]

ID_NAME = "in-distribution"


@click.command()
@engine_options
@path_option(
    "--id",
    "id_path",
    required=True,
    metavar="DATA",
    help="Held-out ID images; with labels the accuracy is measured too.",
)
@click.option(
    "--ood",
    "ood_paths",
    required=True,
    multiple=True,
    metavar="NAME=DATA",
    help="Name and images of an OOD set; repeatable.",
)
@path_option("--output", required=True, help="Output folder for evaluation.json, report.html and figures.")
@click.option("--title", default="Out-of-distribution detection", help="Heading of the report.")
@sweep_options
@max_errors_option
@image_options
@batch_size_option
@run_options
def evaluate(
    id_path: Path,
    ood_paths: tuple[str, ...],
    output: Path,
    title: str,
    is_sweep: bool,
    fit_path: Path | None,
    max_errors: float,
    batch_size: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate how well each detector separates OOD sets from ID images, and write a report.

    Prints AUROC and FPR95, and writes evaluation.json, report.html (self-contained), histograms.png and roc.png. The ID images
    should be held out of `fit` and its calibration. With labels, the accuracy is measured too, and for OPNP, OPP and ONP the
    expected calibration error of the unpruned and the pruned head. Unreadable images are skipped and named; if more than
    --max-errors of a set are, the exit code is 1.

    With --sweep, low_dim_gradient is instead fitted to the images of --fit with each basis, number of components and head; output
    is sweep.csv, sweep.json, and AUROC over components and over cost in sweep_components.png and sweep_cost.png.

    \b
    Examples:
      ood-engine evaluate --state state.safetensors --model net.py:make --weights net.pt \\
          --id test/ --ood textures=dtd/ --ood noise=noise.npy --output report/
      ood-engine evaluate ... --sweep --fit train/ --components 8,32,128 --heads knn,vim
    """
    sweep_settings = {name: options.pop(name) for name in SWEEP_SETTINGS}
    check_sweep(is_sweep, fit_path, sweep_settings)
    places = _places(ood_paths, (ID_NAME, FIT_NAME) if is_sweep else (ID_NAME,))
    check_output(output, folder=True)
    engine, _, preprocess = load_engine(**options)
    id_data = open_dataset(id_path, preprocess)
    ood_data = {name: open_dataset(path, preprocess) for name, path in places.items()}
    class_names, classes = engine.information.get("class_names"), engine.head.weight.shape[0]
    if fit_path is not None:
        fit_data = open_dataset(fit_path, preprocess)
        _number_classes(fit_data, class_names, classes, "no labels to fit on")
        run_sweep(
            engine,
            fit_data,
            id_data,
            ood_data,
            output,
            sweep_settings,
            batch_size=batch_size,
            as_json=as_json,
            id_name=ID_NAME,
            max_errors=max_errors,
        )
        return
    _number_classes(id_data, class_names, classes, "no accuracy")
    evaluation, results = evaluate_sets(
        engine,
        id_data,
        ood_data,
        title=title,
        id_name=ID_NAME,
        batch_size=batch_size,
        information={"state": options["state"].name},
        progress=True,
    )
    files = write_report(evaluation, output)
    skipped = {name: echo_skipped(result.skipped, name) for name, result in results.items()}
    if as_json:
        document = json.loads(files[0].read_text(encoding="utf-8"))
        echo_json(document | {"skipped": skipped, "files": [str(file) for file in files]})
    else:
        print_table(evaluation)
        if evaluation.accuracy is not None:
            click.echo(f"accuracy on ID images: {100 * evaluation.accuracy:.2f} %")
        click.echo(f"wrote {', '.join(str(file) for file in files)}")
    for name, data in {ID_NAME: id_data, **ood_data}.items():
        problem = f"of {name!r} cannot be used"
        check_errors(len(skipped[name]), len(data), max_errors, problem, f"{output} has the results of the others")


def _places(entries: tuple[str, ...], taken: tuple[str, ...]) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not (separator and name and path):
            raise click.UsageError(f"--ood {entry}: expected NAME=DATA, such as textures=data/dtd.")
        if name in places or name in taken:
            raise click.UsageError(f"--ood {entry}: the name {name!r} is taken; give each set a unique name.")
        places[name] = Path(path)
    return places


def _number_classes(id_data: ImageDataset, fitted: list[str] | None, classes: int, lost: str) -> None:
    """Renumber the labels to the model's classes, or drop them with a warning if the mapping is unknown."""
    if id_data.labels is None:
        return
    names = id_data.class_names
    if names and fitted:
        unknown = [name for name in names if name not in fitted]
        if unknown:
            problem = f"the class folder {unknown[0]!r} was absent when the state was fitted"
        else:
            number = torch.tensor([fitted.index(name) for name in names], device="cpu")
            id_data.labels = number[id_data.labels]
            return
    elif names and len(names) != classes:
        problem = f"{len(names)} class folders for a model of {classes} classes, whose names the state does not have"
    elif int(id_data.labels.max()) < classes and int(id_data.labels.min()) >= 0:
        return
    else:
        problem = f"labels range from {int(id_data.labels.min())} to {int(id_data.labels.max())}, the model has {classes} classes"
    click.echo(f"warning: {lost}: {problem}", err=True)
    id_data.labels = None
