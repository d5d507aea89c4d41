"""`ood-engine fit`: detectors fitted and calibrated in one pass of the model over ID images, and saved to a state file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click
import torch

from ..detectors import available_detectors, create_detector
from ..engine import DEFAULT_DETECTORS, Engine
from ..errors import InputError
from ..features.label_checks import class_names_of
from ..images.dataset import ImageDataset, open_dataset
from ..images.preprocess import Preprocess
from ..model.loading import load_model
from .common import (
    batch_size_option,
    check_errors,
    check_output,
    check_space,
    echo_json,
    echo_skipped,
    image_options,
    make_preprocess,
    max_errors_option,
    model_options,
    path_option,
    run_options,
    seed_option,
)
from .fit_checks import check_calibration, keeping, least_bytes, number_by_name, print_classes, save_or_keep

__all__ = ["fit"]


@click.command()
@model_options
@path_option(
    "--data",
    required=True,
    help="ID images: a folder (flat, or one folder per class), .npy or .npz.",
)
@path_option("--output", required=True, help="State file to write, such as state.safetensors.")
@path_option("--calibration", help="Held-out ID images for the thresholds.")
@click.option(
    "--calibration-share",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of --data to hold out instead; 0: no thresholds.  [0.2]",
)
@click.option(
    "--false-alarm-rate",
    default=0.05,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of ID images flagged as OOD.",
)
@click.option(
    "--detectors",
    help="Comma-separated names, or all.  [" + ",".join(DEFAULT_DETECTORS) + ", if the model supports them]",
)
@click.option(
    "--set", "settings", multiple=True, metavar="DETECTOR.SETTING=VALUE", help="A detector's setting; repeatable."
)
@click.option("--tune", is_flag=True, help="Choose settings on pseudo-OOD data: corrupted calibration images.")
@click.option(
    "--labels",
    default="given",
    type=click.Choice(["given", "predicted"]),
    help="Classes for detectors that need labels: those of the data, or those that the model predicts.",
)
@click.option(
    "--force", is_flag=True, help="Go on where labels or class folders show a wrong set-up; the state says so."
)
@click.option("--head", help="Name of the head, if not found automatically.")
@click.option("--feature-map", help="Module that outputs the feature map, if not found automatically.")
@click.option(
    "--rectify/--no-rectify",
    default=None,
    help="Apply ReLU to the feature map for NAP.  [where the map has negative values]",
)
@max_errors_option
@image_options
@batch_size_option
@click.option(
    "--cache-limit", default=4096, type=click.IntRange(0), help="MiB of features held in memory; beyond that on disk."
)
@path_option("--cache-directory", help="Folder of features on disk.  [a temporary folder]")
@click.option(
    "--cache-dtype",
    default="float32",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Storage type of features during fitting.",
)
@seed_option
@run_options
def fit(
    model: str,
    weights: Path | None,
    data: Path,
    output: Path,
    calibration: Path | None,
    calibration_share: float | None,
    false_alarm_rate: float,
    detectors: str | None,
    settings: tuple[str, ...],
    tune: bool,
    labels: Literal["given", "predicted"],
    force: bool,
    head: str | None,
    feature_map: str | None,
    rectify: bool | None,
    max_errors: float,
    batch_size: int,
    cache_limit: int,
    cache_directory: Path | None,
    cache_dtype: str,
    seed: int,
    device: torch.device,
    as_json: bool,
    **image_fields: Any,
) -> None:
    """Fit detectors to a model and its in-distribution images, and write a state file.

    The model runs once over the images. Thresholds are set on held-out ID images. Unreadable images are skipped and named; if more
    than --max-errors of the images are, the state is written and the exit code is 1. Class folders are numbered by the names of the
    model's classes (its class_names, classes or config.id2label), else in sorted order, which should be that of the model's
    classes. Labels that the model predicts no more often than by chance, and other class folders than the model's, are refused.

    \b
    Examples:
      ood-engine fit --model my.models:resnet --weights best.safetensors --data train/ \\
          --size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --output state.safetensors
      ood-engine fit --model net.py:make --weights net.pt --data train.npz --calibration fresh.npz \\
          --detectors nap_energy,opnp --set nap_energy.w=0.4 --set opnp.weight_range=0.1,0.99 \\
          --output state.safetensors
    """
    started = time.perf_counter()
    if calibration is not None and calibration_share is not None:
        raise click.UsageError("--calibration and --calibration-share exclude each other; give one of them.")
    if tune and calibration is None and calibration_share == 0:
        raise click.UsageError("--tune needs calibration images; give --calibration or a --calibration-share above 0.")
    check_output(output)
    preprocess = make_preprocess(image_fields)
    dataset = open_dataset(data, preprocess)
    network = load_model(model, weights).to(device)
    number_by_name(dataset, class_names_of(network))
    fit_data, fresh = _split(
        dataset, calibration, 0.2 if calibration_share is None else calibration_share, preprocess, seed
    )
    if fresh is not None:
        check_calibration(data, calibration, len(fresh), false_alarm_rate)
    check_space(output, least_bytes(len(fit_data)))
    engine = Engine(
        network,
        _names(detectors),
        settings=_settings(settings),
        head=head,
        feature_map=feature_map,
        rectify="auto" if rectify is None else rectify,
        seed=seed,
    )
    loader = fit_data.loader(batch_size)
    engine.fit(
        loader,
        labels=labels,
        force=force,
        progress=True,
        cache_limit_bytes=cache_limit * 2**20,
        cache_directory=cache_directory,
        cache_dtype=None if cache_dtype == "float32" else getattr(torch, cache_dtype),
    )
    skipped = echo_skipped(loader.skipped, "fitting")
    # Folders that are not the model's classes have another numbering.
    is_named = engine.set_up.are_numbers_known and len(dataset.class_names or ()) == len(engine.head.weight)
    names = dataset.class_names if is_named else class_names_of(network)
    engine.information = {"preprocess": preprocess.to_dict(), "class_names": names}
    if fresh is not None:
        loader = fresh.loader(batch_size)
        with keeping(engine, output):
            engine.calibrate(loader, false_alarm_rate, overlap="drop", progress=True)
            skipped += echo_skipped(loader.skipped, "calibrating")
            if tune:
                engine.tune(loader, mean=preprocess.mean, std=preprocess.std, progress=True)
    save_or_keep(engine, output)
    summary = _summary(engine, output, skipped, time.perf_counter() - started)
    if as_json:
        echo_json(summary)
    else:
        _print(summary)
    images = len(fit_data) + (0 if fresh is None else len(fresh))
    check_errors(len(skipped), images, max_errors, "cannot be used", f"{output} is written, from the others")


def _split(
    dataset: ImageDataset, calibration: Path | None, share: float, preprocess: Preprocess, seed: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """(images to fit, images to calibrate on or None)."""
    if calibration is not None:
        return dataset, open_dataset(calibration, preprocess)
    if share == 0:
        return dataset, None
    held_out = round(share * len(dataset))
    if not 0 < held_out < len(dataset):
        raise InputError(
            f"--calibration-share {share:g} of {len(dataset)} images holds out {held_out}: expected at least one held out, and one"
            " to fit; give more images, or --calibration"
        )
    order = torch.randperm(len(dataset), device="cpu", generator=torch.Generator().manual_seed(seed)).tolist()
    return dataset.subset(sorted(order[held_out:])), dataset.subset(sorted(order[:held_out]))


def _names(detectors: str | None) -> list[str] | None:
    if detectors == "all":
        return list(available_detectors())
    return None if detectors is None else [name.strip() for name in detectors.split(",") if name.strip()]


def _settings(entries: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        detector, dot, setting = name.partition(".")
        if not (separator and dot and detector and setting):
            raise click.UsageError(f"--set {entry}: expected DETECTOR.SETTING=VALUE, such as nap_energy.w=0.4.")
        settings.setdefault(detector, {})[setting] = _value(value)
        create_detector(detector, **settings[detector])
    return settings


def _value(text: str) -> Any:
    """A number, a list of numbers (with or without brackets), or the text itself."""
    for candidate in (text, f"[{text}]"):
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        return tuple(value) if isinstance(value, list) else value
    return text


def _summary(engine: Engine, output: Path, skipped: list[dict[str, str]], seconds: float) -> dict[str, Any]:
    assert engine.cache is not None
    calibration = engine.scorer.calibration_cache
    return {
        "state": str(output),
        "fit_images": len(engine.cache),
        "calibration_images": 0 if calibration is None else len(calibration),
        "skipped": skipped,
        "label_agreement": engine.set_up.label_agreement,
        "labels": engine.set_up.labels,
        "overruled": engine.set_up.overruled,
        "plan": asdict(engine.plan),
        "detectors": {name: detector.settings for name, detector in engine.detectors.items()},
        "thresholds": {name: float(calibration.threshold) for name, calibration in engine.calibrations.items()},
        "flagged_by_class": engine.flagged_by_class,
        "unavailable": engine.unavailable,
        "tuned": [row for row in engine.tuning if row["chosen"]],
        "seconds": round(seconds, 3),
    }


def _print(summary: dict[str, Any]) -> None:
    plan = summary["plan"]
    map_name = (
        f"{plan['feature_map']} ({'verified' if plan['proven'] else 'unverified'})" if plan["feature_map"] else "none"
    )
    head = plan["head"] if plan["head_proven"] else f"{plan['head']} (unverified)"
    click.echo(f"head {head}, feature map {map_name}: {plan['reason']}")
    click.echo(f"fitted {', '.join(summary['detectors'])} on {summary['fit_images']} images")
    if summary["label_agreement"] is not None:
        click.echo(f"the model agrees with {100 * summary['label_agreement']:.1f} % of the labels")
    if summary["thresholds"]:
        click.echo(f"thresholds from {summary['calibration_images']} held-out images")
        print_classes(summary["flagged_by_class"])
    for row in summary["tuned"]:
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
        click.echo(f"tuned {row['detector']}: {settings} (AUROC {100 * row['auroc']:.2f} % on pseudo-OOD)")
    click.echo(f"wrote {summary['state']} after {summary['seconds']:.1f} s")
