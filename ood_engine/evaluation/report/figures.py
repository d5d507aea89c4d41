"""Score histograms and ROC curves: PNG files of all, and single SVG elements for the HTML page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_atomically
from .curves import histogram, roc_curve
from .drawing import (
    BOLD,
    GRID,
    ID_COLOUR,
    INK,
    LINE_COLOURS,
    OOD_COLOUR,
    SOFT_INK,
    legend,
    new_panel,
    new_panels,
    png,
    shortened,
    svg,
    verbatim,
)
from .evaluation import Evaluation, finite
from .extras import require
from .table import percent, rows, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["histogram_svg", "roc_svg", "write_figures"]

THRESHOLD: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 2))}


def write_figures(evaluation: Evaluation, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `histograms.png` (one row per detector, one column per OOD set) and `roc.png` (one panel per OOD set).

    Raises:
        OodEngineError: matplotlib is not installed, or the folder cannot be written.
    """
    table = rows(evaluation)
    detectors = list(summarise(table).lines)
    auroc = {(row["detector"], row["ood_set"]): row["auroc"] for row in table if not row["mean"]}
    pictures = {
        "histograms.png": _histograms(evaluation, detectors, auroc),
        "roc.png": _roc_curves(evaluation, detectors),
    }
    return [write_atomically(Path(folder) / name, png(figure)) for name, figure in pictures.items()]


def histogram_svg(evaluation: Evaluation, detector: str, ood_set: str, label: str) -> str:
    """Score histograms of one detector on the ID set and one OOD set, as an `<svg>` element.

    Raises:
        OodEngineError: matplotlib is not installed.
    """
    figure, panel = new_panel((2.9, 1.5), (0.03, 0.24, 0.94, 0.73))
    _draw_histogram(panel, evaluation, detector, ood_set)
    panel.spines["left"].set_visible(False)
    return svg(figure, label)


def roc_svg(evaluation: Evaluation, detectors: Sequence[str], ood_set: str, label: str) -> str:
    """ROC curves of several detectors on one OOD set, as an `<svg>` element.

    Raises:
        OodEngineError: matplotlib is not installed.
    """
    figure, panel = new_panel((2.9, 2.85), (0.17, 0.13, 0.8, 0.83))
    _draw_roc(panel, evaluation, detectors, ood_set)
    return svg(figure, label)


def _histograms(evaluation: Evaluation, detectors: Sequence[str], auroc: dict[tuple[str, str], float | None]) -> Figure:
    n_rows, n_columns = len(detectors), len(evaluation.ood_scores)
    figure, axes = new_panels(n_rows, n_columns, width=2.9, height=1.55)
    for row, detector in enumerate(detectors):
        verbatim(axes[row][0].set_ylabel(shortened(detector, 20), fontsize=9, color=INK))
        for panel, ood_set in zip(axes[row], evaluation.ood_scores, strict=True):
            _draw_histogram(panel, evaluation, detector, ood_set)
            label = f"AUROC {percent(auroc[detector, ood_set])}"
            panel.set_title(label, loc="right", fontsize=8, color=SOFT_INK)
    for panel, ood_set in zip(axes[0], evaluation.ood_scores, strict=True):
        verbatim(panel.annotate(shortened(ood_set), (0, 1), (0, 20), "axes fraction", "offset points", **BOLD))
    patch = require("matplotlib.patches").Patch
    entries = {
        f"{shortened(evaluation.id_name)} (ID)": patch(facecolor=ID_COLOUR, alpha=0.55),
        "OOD": patch(facecolor=(OOD_COLOUR, 0.3), edgecolor=OOD_COLOUR),
    }
    if evaluation.thresholds:
        entries["threshold"] = THRESHOLD
    legend(figure, entries, loc="outside upper right", ncols=3)
    figure.supxlabel("score, higher = more in-distribution", fontsize=9, color=SOFT_INK)
    return figure


def _draw_histogram(panel: Axes, evaluation: Evaluation, detector: str, ood_set: str) -> None:
    panel.set_yticks([])
    bars = histogram(finite(evaluation.id_scores[detector]), finite(evaluation.ood_scores[ood_set][detector]))
    if bars is None:
        panel.set_xticks([])
        panel.text(0.5, 0.5, "no finite scores", ha="center", va="center", transform=panel.transAxes, color=SOFT_INK)
        return
    panel.stairs(bars.id_heights, bars.edges, fill=True, facecolor=ID_COLOUR, alpha=0.55, clip_on=False)
    ood: dict[str, Any] = {"facecolor": (OOD_COLOUR, 0.3), "edgecolor": OOD_COLOUR, "linewidth": 1}
    panel.stairs(bars.ood_heights, bars.edges, fill=True, clip_on=False, **ood)
    panel.set_xlim(bars.edges[0], bars.edges[-1])
    panel.set_ylim(0, 1.08)
    panel.locator_params(axis="x", nbins=4)
    threshold = evaluation.thresholds.get(detector, math.nan)
    if bars.edges[0] <= threshold <= bars.edges[-1]:
        panel.axvline(threshold, clip_on=False, **THRESHOLD)


def _roc_curves(evaluation: Evaluation, detectors: Sequence[str]) -> Figure:
    n_columns = min(3, len(evaluation.ood_scores))
    n_rows = math.ceil(len(evaluation.ood_scores) / n_columns)
    legend_width = 0.8 + 0.065 * max(len(shortened(name)) for name in detectors)
    figure, axes = new_panels(n_rows, n_columns, width=3.4, height=3.4, margin=legend_width)
    panels = [panel for panel_row in axes for panel in panel_row]
    for panel in panels[len(evaluation.ood_scores) :]:
        panel.remove()
    for panel, ood_set in zip(panels, evaluation.ood_scores, strict=False):
        _draw_roc(panel, evaluation, detectors, ood_set)
        verbatim(panel.set_title(shortened(ood_set), loc="left", **BOLD))
    entries = {name: {"linewidth": 2, **_line_style(index)} for index, name in enumerate(detectors)}
    legend(figure, entries, loc="outside center right", ncols=1)
    return figure


def _draw_roc(panel: Axes, evaluation: Evaluation, detectors: Sequence[str], ood_set: str) -> None:
    panel.plot([0, 1], [0, 1], color=GRID, linewidth=1, clip_on=False)
    panel.axhline(0.95, color=SOFT_INK, linewidth=0.7, linestyle=(0, (2, 3)), clip_on=False)
    for index, detector in reversed([*enumerate(detectors)]):
        curve = roc_curve(finite(evaluation.id_scores[detector]), finite(evaluation.ood_scores[ood_set][detector]))
        panel.plot(*(curve or ([], [])), linewidth=1.6, clip_on=False, **_line_style(index))
    panel.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 0.95])
    panel.set(xlabel="share of OOD accepted (FPR)", ylabel="share of ID accepted (TPR)")


def _line_style(index: int) -> dict[str, Any]:
    dashed = index >= len(LINE_COLOURS)
    return {"color": LINE_COLOURS[index % len(LINE_COLOURS)], "linestyle": "--" if dashed else "-"}
