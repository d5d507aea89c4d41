"""Metrics as rows, and the table of detectors by OOD sets shared by terminal, Markdown and HTML page."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import write_atomically
from .. import metrics
from .evaluation import Evaluation, finite, printable
from .extras import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = [
    "METRICS",
    "Summary",
    "markdown_table",
    "percent",
    "print_table",
    "rich_table",
    "rows",
    "summarise",
    "write_json",
]

METRICS = ("auroc", "aupr_id", "aupr_ood", "fpr95_id", "fpr95_ood")
MEAN = "mean"
FORMAT_VERSION = 1
NAME_WIDTH, PAIR_WIDTH = 32, 13
CONVENTION = "In percent, ID as the positive class. AUROC: higher is better, FPR95: lower."


def rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row per detector and OOD set, and, with several sets, one mean row per detector.

    Keys: `detector`, `ood_set`, `kind` (None if not given), `mean` (True for the mean row), `n_id` and `n_ood` (scores used),
    `n_invalid` (non-finite scores excluded from both sets), and the metrics `auroc`, `aupr_id`, `aupr_ood`, `fpr95_id`, `fpr95_ood`
    as fractions in [0, 1]. A metric is None if either set has no finite score; a mean is None if any of its metrics is, so that all
    means cover the same sets.
    """
    table = []
    for detector in evaluation.detectors:
        of_detector = [_row(evaluation, detector, ood_set) for ood_set in evaluation.ood_scores]
        table += of_detector
        if len(of_detector) > 1:
            table.append(_mean_row(evaluation, detector, of_detector))
    return table


def _row(evaluation: Evaluation, detector: str, ood_set: str) -> dict[str, Any]:
    id_all, ood_all = evaluation.id_scores[detector], evaluation.ood_scores[ood_set][detector]
    id_scores, ood_scores = finite(id_all), finite(ood_all)
    measured = metrics.evaluate(id_scores, ood_scores) if id_scores.size and ood_scores.size else {}
    return {
        "detector": detector,
        "ood_set": ood_set,
        "kind": evaluation.kinds.get(ood_set),
        "mean": False,
        "n_id": id_scores.size,
        "n_ood": ood_scores.size,
        "n_invalid": id_all.size + ood_all.size - id_scores.size - ood_scores.size,
        **{metric: float(measured[metric]) if measured else None for metric in METRICS},
    }


def _mean_row(evaluation: Evaluation, detector: str, of_sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n_id, n_ood = of_sets[0]["n_id"], sum(row["n_ood"] for row in of_sets)
    n_given = sum(scores[detector].size for scores in (evaluation.id_scores, *evaluation.ood_scores.values()))
    means = {metric: _mean([row[metric] for row in of_sets]) for metric in METRICS}
    counts = {"n_id": n_id, "n_ood": n_ood, "n_invalid": n_given - n_id - n_ood}
    return {"detector": detector, "ood_set": MEAN, "kind": None, "mean": True, **counts, **means}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


@dataclass(frozen=True)
class Cell:
    """A number of the table in percent, as shown, and whether it is the best of its column."""

    text: str
    best: bool


@dataclass(frozen=True)
class Summary:
    """The table as shown.

    Attributes:
        columns: (name, kind, is the mean) per column group: the OOD sets in order, then the mean.
        lines: detector → pairs of cells (AUROC, FPR95), best detector first.
        ranking: the row by which each detector is ranked (the mean, or the only set), best first.
    """

    columns: list[tuple[str, str | None, bool]]
    lines: dict[str, list[tuple[Cell, Cell]]]
    ranking: list[dict[str, Any]]


def summarise(table: Sequence[dict[str, Any]]) -> Summary:
    """Arrange `rows` as detectors by OOD sets, sorted by mean AUROC, then FPR95.

    Numbers equal as printed tie for best; if a whole column is equal, none is marked.
    """
    by_detector: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        by_detector.setdefault(row["detector"], []).append(row)
    ranking = sorted((of_detector[-1] for of_detector in by_detector.values()), key=_rank)
    ordered = [by_detector[row["detector"]] for row in ranking]
    columns = [(row["ood_set"], row["kind"], row["mean"]) for row in ordered[0]]
    groups = []
    for index in range(len(columns)):
        auroc = _cells([of_detector[index]["auroc"] for of_detector in ordered], best=max)
        fpr95 = _cells([of_detector[index]["fpr95_id"] for of_detector in ordered], best=min)
        groups.append(list(zip(auroc, fpr95, strict=True)))
    lines = {row["detector"]: [group[line] for group in groups] for line, row in enumerate(ranking)}
    return Summary(columns, lines, ranking)


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return (math.inf, math.inf) if row["auroc"] is None else (-row["auroc"], row["fpr95_id"])


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; an en dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def _cells(values: Sequence[float | None], best: Any) -> list[Cell]:
    known = [value for value in values if value is not None]
    texts = [percent(value) for value in values]
    winner = percent(best(known)) if known and len(set(texts)) > 1 else None
    return [Cell(text, text == winner) for text in texts]


def _notes(evaluation: Evaluation) -> list[str]:
    """Notes below the table: the convention, and the calibration errors of the heads if measured."""
    errors = ", ".join(f"{name} {percent(value)}" for name, value in evaluation.ece.items())
    return [CONVENTION, *([f"Expected calibration error of the head: {printable(errors)}."] if errors else [])]


def _heading(name: str, kind: str | None, is_mean: bool) -> str:
    return f"{printable(name)} ({printable(kind)})" if kind and not is_mean else printable(name)


def print_table(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print one line per detector with AUROC and FPR95 on each OOD set, the best of each column in bold.

    Sets that exceed the width of the terminal continue in further tables below.

    Raises:
        OodEngineError: rich is not installed.
    """
    rich_console, rich_text = require("rich.console"), require("rich.text")
    console = console or rich_console.Console()
    summary = summarise(rows(evaluation))
    longest = max(len(printable(name)) for name in ("Detector", *summary.lines))
    per_table = max(1, (console.width - min(longest, NAME_WIDTH) - 1) // (PAIR_WIDTH + 2))
    console.print(rich_text.Text(f"{printable(evaluation.title)}\n", style="bold"))
    for start in range(0, len(summary.columns), per_table):
        console.print(_rich_table(summary, slice(start, start + per_table)))
        console.print()
    console.print(rich_text.Text("\n".join(_notes(evaluation)), style="dim"))


def rich_table(**options: Any) -> Any:
    """An empty table with a line below its headings."""
    box = require("rich.box").SIMPLE_HEAD
    return require("rich.table").Table(box=box, show_edge=False, padding=(0, 1, 0, 0), **options)


def _rich_table(summary: Summary, groups: slice) -> Any:
    text, table = require("rich.text").Text, rich_table(header_style="")
    table.add_column("Detector", max_width=NAME_WIDTH, overflow="fold", vertical="middle")
    for column in summary.columns[groups]:
        heading = text.assemble((_heading(*column), "bold"), ("\n AUROC  FPR95", "dim"), overflow="fold")
        table.add_column(heading, justify="right", width=PAIR_WIDTH)
    for detector, pairs in summary.lines.items():
        table.add_row(text(printable(detector)), *[_rich_pair(pair, text) for pair in pairs[groups]])
    return table


def _rich_pair(pair: tuple[Cell, Cell], text: type[Text]) -> Text:
    auroc, fpr95 = ((f"{cell.text:>6}", "bold" if cell.best else "") for cell in pair)
    return text.assemble(auroc, " ", fpr95)


def markdown_table(evaluation: Evaluation) -> str:
    """The table of `print_table` in GitHub-flavoured Markdown, the best of each column in bold; ends with a newline."""
    summary = summarise(rows(evaluation))
    headings = ["Detector", *(_markdown(_heading(*column)) for column in summary.columns)]
    body = [
        [_markdown(detector), *(f"{_marked(auroc)} / {_marked(fpr95)}" for auroc, fpr95 in pairs)]
        for detector, pairs in summary.lines.items()
    ]
    rule = ["---", *["---:"] * len(summary.columns)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *body)]
    notes = " ".join(map(_markdown, _notes(evaluation)))
    return "\n".join([*lines, "", f"AUROC / FPR95. {notes}", ""])


def _marked(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.best else cell.text


def _markdown(name: str) -> str:
    """A name escaped for Markdown: entities for characters special to HTML or the table, backslashes for the rest."""
    text = re.sub(r"([\\`*\[\]~$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(name))
    return escape(text, quote=False).replace("|", "&#124;")


def write_json(evaluation: Evaluation, path: str | os.PathLike[str]) -> Path:
    """Write rows and facts as one JSON object, atomically.

    Keys: `format` (1), `title`, `id_name`, `score_direction`, `accuracy`, `ece`, `thresholds`, `information` and `rows` (as
    returned by `rows`); null for missing values.

    Raises:
        OodEngineError: the path cannot be written.
    """
    thresholds = {name: float(value) for name, value in evaluation.thresholds.items()}
    document = {
        "format": FORMAT_VERSION,
        "title": evaluation.title,
        "id_name": evaluation.id_name,
        "score_direction": "higher = more in-distribution",
        "accuracy": None if evaluation.accuracy is None else float(evaluation.accuracy),
        "ece": {name: float(value) for name, value in evaluation.ece.items()},
        "thresholds": {name: value if math.isfinite(value) else None for name, value in thresholds.items()},
        "information": {str(key): str(value) for key, value in evaluation.information.items()},
        "rows": rows(evaluation),
    }
    return write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
