"""The HTML report: one self-contained file without scripts, external images, fonts or network access."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_atomically
from .drawing import LINE_COLOURS
from .evaluation import UNPRUNED, Evaluation, finite, printable
from .extras import require
from .figures import histogram_svg, roc_svg
from .table import METRICS, percent, rows, summarise

__all__ = ["write_html"]

TEMPLATE = "report.html.j2"
IMAGES_OF_A_SET = 8
IMAGE_PIXELS = 128


def write_html(evaluation: Evaluation, path: str | os.PathLike[str]) -> Path:
    """Write the report: summary, table, score histograms, ROC curves, example images, all metrics, facts about the run.

    All names and values are escaped. The file is written atomically.

    Raises:
        OodEngineError: Jinja2, matplotlib or (for example images) Pillow is not installed, or the path cannot be written.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    source = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return write_atomically(path, environment.from_string(source).render(_context(evaluation)).encode())


def _shown(value: Any) -> Any:
    """A value as the template prints it; markup of the template itself passes unchanged."""
    return value if hasattr(value, "__html__") else printable(value)


def _context(evaluation: Evaluation) -> dict[str, Any]:
    table = rows(evaluation)
    summary = summarise(table)
    detectors = list(summary.lines)
    of_pair = {(row["detector"], row["ood_set"]): row for row in table if not row["mean"]}
    roc_order = {name: _ranked(detectors, name, of_pair) for name in evaluation.ood_scores}
    return {
        "evaluation": evaluation,
        "rows": table,
        "summary": summary,
        "metrics": METRICS,
        "percent": percent,
        "unpruned": UNPRUNED,
        "detectors": detectors,
        "n_colours": len(LINE_COLOURS),
        "hardest": _hardest(evaluation, detectors, of_pair),
        "invalid": _invalid_counts(evaluation),
        "n_id": max(scores.size for scores in evaluation.id_scores.values()),
        "n_ood": {name: max(array.size for array in scores.values()) for name, scores in evaluation.ood_scores.items()},
        "pairs": of_pair,
        "histograms": {pair: _histogram(evaluation, row) for pair, row in of_pair.items()},
        "roc_curves": {
            ood_set: _roc_curves(evaluation, detectors, of_pair[order[0], ood_set])
            for ood_set, order in roc_order.items()
        },
        "roc_order": roc_order,
        "images": {name: _png_images(images) for name, images in evaluation.example_images.items() if len(images)},
    }


def _ranked(detectors: Sequence[str], ood_set: str, of_pair: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    def auroc(detector: str) -> float:
        value = of_pair[detector, ood_set]["auroc"]
        return -math.inf if value is None else value

    return sorted(detectors, key=auroc, reverse=True)


def _hardest(
    evaluation: Evaluation, detectors: Sequence[str], of_pair: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any] | None:
    """The best row of the OOD set with the lowest best AUROC; None for a single set or without measurements."""
    best_of_set = [of_pair[_ranked(detectors, ood_set, of_pair)[0], ood_set] for ood_set in evaluation.ood_scores]
    known = [row for row in best_of_set if row["auroc"] is not None]
    return min(known, key=lambda row: row["auroc"]) if len(known) > 1 else None


def _invalid_counts(evaluation: Evaluation) -> dict[tuple[str, int], list[str]]:
    """(set, number of non-finite scores) → detectors with that number; a bad image usually affects most of them."""
    detectors: dict[tuple[str, int], list[str]] = {}
    for name, scores in [(evaluation.id_name, evaluation.id_scores), *evaluation.ood_scores.items()]:
        for detector, array in scores.items():
            detectors.setdefault((name, array.size - finite(array).size), []).append(detector)
    return {(name, count): affected for (name, count), affected in detectors.items() if count}


def _histogram(evaluation: Evaluation, row: dict[str, Any]) -> str:
    label = (
        f"Histogram of the {row['detector']} scores of {evaluation.id_name} and {row['ood_set']}; AUROC"
        f" {percent(row['auroc'])} percent, FPR95 {percent(row['fpr95_id'])} percent"
    )
    return histogram_svg(evaluation, row["detector"], row["ood_set"], label)


def _roc_curves(evaluation: Evaluation, detectors: Sequence[str], best: dict[str, Any]) -> str:
    label = (
        f"ROC curves of all detectors, {evaluation.id_name} against {best['ood_set']}; best AUROC {percent(best['auroc'])}"
        f" percent by {best['detector']}"
    )
    return roc_svg(evaluation, detectors, best["ood_set"], label)


def _png_images(images: np.ndarray) -> list[str]:
    """The first images as data URIs of PNG thumbnails; values outside [0, 1] are clipped, NaN is drawn black."""
    image = require("PIL.Image")
    uris = []
    for array in images[:IMAGES_OF_A_SET]:
        levels = np.clip(np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
        picture = image.fromarray(np.rint(255 * levels).astype(np.uint8))
        picture.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
    return uris
