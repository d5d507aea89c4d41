"""Scoring of an ID set and OOD sets of images with a fitted engine, and the report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine
from ..errors import OodEngineWarning
from ..features.cache import NO_LABEL, fingerprint
from ..features.loader import image_batches
from ..features.signals import wide
from ..images.dataset import ImageDataset, ImageLoader
from ..scores import Scores
from ..version import __version__
from .confidence import HeadConfidence
from .report import UNPRUNED, Evaluation, write_figures, write_html, write_json

__all__ = ["SetResult", "evaluate", "score_set", "write_report"]

EXAMPLES = 8


@dataclass(frozen=True)
class SetResult:
    """Result of one set of images.

    Attributes:
        scores: scores of the readable images.
        accuracy: a fraction; None without labels.
        skipped: (name, error) of each unreadable image.
        fitted: number of images that were used in `fit`.
    """

    scores: Scores
    accuracy: float | None
    skipped: list[tuple[str, str]]
    fitted: int = 0


def score_set(
    engine: Engine, loader: ImageLoader, what: str, *, heads: Sequence[HeadConfidence] = (), progress: bool = False
) -> SetResult:
    """Score all readable images and measure the accuracy of the model, in one forward pass per batch.

    Args:
        engine: a fitted engine.
        loader: the images.
        what: name of the set, for messages.
        heads: heads whose calibration is measured; features and labels are added to each.
        progress: show a progress bar.

    Raises:
        DataError: no readable image.
        InputError: images that the model rejects.
    """
    engine.scorer.require_fitted()
    parts, correct, labelled, fitted = [], 0, 0, 0
    with torch.no_grad():
        for images, labels in image_batches(loader, what, progress):
            captured = engine.scorer.run(images)
            parts.append(engine.scorer.score_captured(images, captured).cpu())
            for head in heads:
                head.add(wide(captured.head_input), labels)
            fitted += int(torch.isin(fingerprint(images).cpu(), engine.fit_fingerprints).sum())
            predicted = captured.logits.argmax(1).cpu()
            labelled += int((labels != NO_LABEL).sum())
            correct += int((predicted == labels).sum())
    result = Scores.concatenate(parts)
    result.report()
    return SetResult(result, correct / labelled if labelled else None, loader.skipped, fitted)


def evaluate(
    engine: Engine,
    id_data: ImageDataset,
    ood_data: Mapping[str, ImageDataset],
    *,
    title: str = "Out-of-distribution detection",
    id_name: str = "in-distribution",
    kinds: Mapping[str, str] | None = None,
    information: Mapping[str, str] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[Evaluation, dict[str, SetResult]]:
    """Score every set and collect the data of a report.

    Args:
        engine: a fitted engine; the report shows its thresholds if it is calibrated.
        id_data: held-out ID images, seen by neither `fit` nor `calibrate`. If labelled, the accuracy is measured too, and, if a
            detector prunes the head, the expected calibration error of the unpruned head and of each pruned one.
        ood_data: OOD set name → images.
        title: heading of the report.
        id_name: name of the ID set.
        kinds: OOD set name → "near", "far" or another label.
        information: facts shown first in the report.
        batch_size: images per forward pass.
        progress: show a progress bar per set.

    Returns:
        The evaluation, and the results by set name.

    Raises:
        DataError: a set without readable images.
        InputError: images that the model rejects.
    """
    sets = {id_name: id_data, **ood_data}
    heads = {} if id_data.labels is None else _heads(engine)
    results = {}
    for name, data in sets.items():
        judged = list(heads.values()) if name == id_name else ()
        results[name] = score_set(engine, data.loader(batch_size), name, heads=judged, progress=progress)
    arrays = {
        name: {detector: score.numpy() for detector, score in result.scores.items()} for name, result in results.items()
    }
    known, total = results[id_name].fitted, len(next(iter(results[id_name].scores.values())))
    if known:
        warnings.warn(
            f"{known} of {total} ID images were used in fit, which makes ID data look better than it is: expected images held out"
            " of fit and calibration",
            OodEngineWarning,
            stacklevel=2,
        )
    evaluation = Evaluation(
        title=title,
        id_name=id_name,
        id_scores=arrays[id_name],
        ood_scores={name: arrays[name] for name in ood_data},
        kinds=dict(kinds or {}),
        information={**(information or {}), **_facts(engine, sets)},
        example_images={name: images for name, data in sets.items() if (images := _examples(data)) is not None},
        thresholds={name: float(calibration.threshold) for name, calibration in engine.calibrations.items()},
        accuracy=results[id_name].accuracy,
        ece={name: error for name, head in heads.items() if (error := head.ece) is not None},
    )
    return evaluation, results


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `evaluation.json`, `report.html`, `histograms.png` and `roc.png`, and return their paths.

    Raises:
        OodEngineError: the folder cannot be written, or an optional package is missing.
    """
    return [
        write_json(evaluation, folder / "evaluation.json"),
        write_html(evaluation, folder / "report.html"),
        *write_figures(evaluation, folder),
    ]


def _heads(engine: Engine) -> dict[str, HeadConfidence]:
    """The unpruned head and the pruned head of each pruning detector, by name; empty if no detector prunes."""
    head, kernels = engine.head, engine.scorer.kernels
    masks = {name: detector.masks for name, detector in engine.detectors.items() if detector.masks is not None}
    pruned = {name: HeadConfidence(head, kernels, of_detector) for name, of_detector in masks.items()}
    return {UNPRUNED: HeadConfidence(head, kernels), **pruned} if pruned else {}


def _facts(engine: Engine, sets: Mapping[str, ImageDataset]) -> dict[str, str]:
    plan = asdict(engine.plan)
    head = engine.head.weight.shape
    facts = {
        "head": f"{plan['head']} ({head[0]} classes × {head[1]} features)",
        "feature map": f"{plan['feature_map'] or 'none'} ({'verified' if plan['proven'] else 'unverified'})",
        "images": ", ".join(f"{name} {len(data)}" for name, data in sets.items()),
        "versions": f"ood-engine {__version__}, torch {torch.__version__}",
        "device": str(engine.scorer.tap.device),
    }
    rates = sorted({calibration.false_alarm_rate for calibration in engine.calibrations.values()})
    return facts | ({"false-alarm rate": f"{100 * rates[0]:g} %"} if rates else {})


def _examples(data: ImageDataset) -> np.ndarray | None:
    """Evenly spaced images of the set, denormalised to [0, 1]: [n, H, W] or [n, H, W, 3]."""
    positions = np.linspace(0, len(data) - 1, min(EXAMPLES, len(data))).round().astype(int)
    images: list[Tensor] = [sample.image for index in positions if (sample := data[int(index)]).image is not None]
    if not images:
        return None
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
        for values in (data.preprocess.mean, data.preprocess.std)
    )
    pixels: Any = (torch.stack(images) * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return np.asarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
