"""The figures as PNG files for a README: every histogram in one picture, every ROC curve in another."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import ID_COLOUR, LINE_COLOURS, OOD_COLOUR, histogram, roc_curve
from .evaluation import Evaluation, finite, printable
from .files import require, write_atomically
from .table import percent, rows, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_figures"]

INK, SOFT_INK, GRID = "#1D2530", "#5F6670", "#E3E6EA"
BOLD: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": INK}
THRESHOLD: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 2))}
DOTS_PER_INCH = 150


def write_figures(evaluation: Evaluation, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `histograms.png` (a row per detector, a column per OOD set) and `roc.png` (a panel per OOD set).

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
    return [write_atomically(Path(folder) / name, _png(figure)) for name, figure in pictures.items()]


def _histograms(evaluation: Evaluation, detectors: Sequence[str], auroc: dict[tuple[str, str], float | None]) -> Figure:
    n_rows, n_columns = len(detectors), len(evaluation.ood_scores)
    figure, axes = _panels(n_rows, n_columns, width=2.9, height=1.55)
    for row, detector in enumerate(detectors):
        _text(axes[row][0].set_ylabel(_short(detector, 20), fontsize=9, color=INK))
        for panel, ood_set in zip(axes[row], evaluation.ood_scores, strict=True):
            _draw_histogram(panel, evaluation, detector, ood_set)
            label = f"AUROC {percent(auroc[detector, ood_set])}"
            panel.set_title(label, loc="right", fontsize=8, color=SOFT_INK)
    for panel, ood_set in zip(axes[0], evaluation.ood_scores, strict=True):
        _text(panel.annotate(_short(ood_set), (0, 1), (0, 20), "axes fraction", "offset points", **BOLD))
    patch, line = require("matplotlib.patches").Patch, require("matplotlib.lines").Line2D
    entries = {
        f"{_short(evaluation.id_name)} (ID)": patch(facecolor=ID_COLOUR, alpha=0.55),
        "OOD": patch(facecolor=(OOD_COLOUR, 0.3), edgecolor=OOD_COLOUR),
    }
    if evaluation.thresholds:
        entries["threshold"] = line([], [], **THRESHOLD)
    _legend(figure, entries, loc="outside upper right", ncols=3)
    figure.supxlabel("score, higher = more in-distribution", fontsize=9, color=SOFT_INK)
    return figure


def _draw_histogram(panel: Axes, evaluation: Evaluation, detector: str, ood_set: str) -> None:
    panel.set_yticks([])
    bars = histogram(finite(evaluation.id_scores[detector]), finite(evaluation.ood_scores[ood_set][detector]))
    if bars is None:
        panel.set_xticks([])
        panel.text(0.5, 0.5, "no finite scores", ha="center", va="center", transform=panel.transAxes, color=SOFT_INK)
        return
    panel.stairs(bars.id_heights, bars.edges, fill=True, color=ID_COLOUR, alpha=0.55)
    panel.stairs(bars.ood_heights, bars.edges, fill=True, color=OOD_COLOUR, alpha=0.3)
    panel.stairs(bars.ood_heights, bars.edges, color=OOD_COLOUR, linewidth=1.2)
    panel.set_xlim(bars.edges[0], bars.edges[-1])
    panel.set_ylim(0, 1.08)
    panel.locator_params(axis="x", nbins=4)
    threshold = evaluation.thresholds.get(detector, math.nan)
    if bars.edges[0] <= threshold <= bars.edges[-1]:
        panel.axvline(threshold, **THRESHOLD)


def _roc_curves(evaluation: Evaluation, detectors: Sequence[str]) -> Figure:
    n_columns = min(3, len(evaluation.ood_scores))
    n_rows = math.ceil(len(evaluation.ood_scores) / n_columns)
    legend_width = 0.8 + 0.065 * max(len(_short(name)) for name in detectors)
    figure, axes = _panels(n_rows, n_columns, width=3.4, height=3.4, margin=legend_width)
    line = require("matplotlib.lines").Line2D
    styles = [
        {"color": LINE_COLOURS[index % len(LINE_COLOURS)], "linestyle": "-" if index < len(LINE_COLOURS) else "--"}
        for index in range(len(detectors))
    ]
    panels = [panel for panel_row in axes for panel in panel_row]
    for panel in panels[len(evaluation.ood_scores) :]:
        panel.remove()
    for panel, (ood_set, scores) in zip(panels, evaluation.ood_scores.items(), strict=False):
        panel.plot([0, 1], [0, 1], color=GRID, linewidth=1)
        panel.axhline(0.95, color=SOFT_INK, linewidth=0.7, linestyle=(0, (2, 3)))
        for detector, style in zip(detectors, styles, strict=True):
            curve = roc_curve(finite(evaluation.id_scores[detector]), finite(scores[detector]))
            panel.plot(*(curve or ([], [])), linewidth=1.6, **style)
        panel.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 0.95])
        panel.set_xlabel("share of OOD accepted (FPR)", fontsize=8, color=SOFT_INK)
        panel.set_ylabel("share of ID accepted (TPR)", fontsize=8, color=SOFT_INK)
        _text(panel.set_title(_short(ood_set), loc="left", **BOLD))
    entries = {name: line([], [], linewidth=2, **style) for name, style in zip(detectors, styles, strict=True)}
    _legend(figure, entries, loc="outside center right", ncols=1)
    return figure


def _panels(n_rows: int, n_columns: int, width: float, height: float, margin: float = 1.2) -> tuple[Figure, Any]:
    size = (width * n_columns + margin, height * n_rows + 0.7)
    figure = require("matplotlib.figure").Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GRID)
        panel.tick_params(labelsize=7, colors=SOFT_INK, color=GRID, length=2)
    return figure, axes


def _legend(figure: Figure, entries: dict[str, Any], **where: Any) -> None:
    """A legend that shows names as they are; matplotlib by itself reads `$` as mathematics and may drop `_name`."""
    placeholders = ["name"] * len(entries)
    legend = figure.legend(entries.values(), placeholders, frameon=False, fontsize=8, labelcolor=INK, **where)
    for text, name in zip(legend.get_texts(), entries, strict=True):
        _text(text).set_text(_short(name))


def _text(text: Any) -> Any:
    text.set_parse_math(False)
    return text


def _short(name: str, longest: int = 32) -> str:
    name = printable(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
    return buffer.getvalue()
