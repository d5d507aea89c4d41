"""Reports of a sweep: a table, CSV, JSON, and figures of AUROC over K and over cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_atomically
from ..sweep import COLUMNS
from .drawing import BOLD, GRID, LINE_COLOURS, SOFT_INK, legend, new_panels, png, verbatim
from .evaluation import printable
from .extras import require
from .table import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["combinations", "print_sweep", "write_sweep_figures", "write_sweep_json", "write_sweep_table"]

Row = Mapping[str, Any]

FAMILIES = {
    "probe": ("probe_energy", "probe_msp", "probe_react", "probe_bats"),
    "distance": ("mahalanobis", "mahalanobis_pp", "knn"),
    "residual": ("residual", "vim"),
    "norm": ("projected_norm",),
}
"""Related heads share a panel and a marker."""
MARKERS = dict(zip(FAMILIES, "os^D", strict=True))
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MEAN_AXIS = "mean AUROC [%]"
SHOWN = 10


def combinations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per fitted combination, with `auroc` and `fpr95` averaged over the OOD sets; by AUROC, then by cost."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["refused"] is None:
            groups.setdefault((_subspace(row), row["components_wanted"], row["head"]), []).append(row)
    entries = [
        {
            **group[0],
            "ood_set": None,
            **{name: sum(row[name] for row in group) / len(group) for name in ("auroc", "fpr95")},
        }
        for group in groups.values()
    ]
    return sorted(entries, key=lambda entry: (-entry["auroc"], entry["flops_per_sample"], entry["bytes"]))


def write_sweep_json(rows: Sequence[Row], facts: Mapping[str, Any], path: Path, *, complete: bool = True) -> Path:
    """Write the rows as JSON, atomically; keys: `format` (1), `complete`, the facts, and `rows`; null for missing values.

    Raises:
        OodEngineError: the path cannot be written.
    """
    document = {"format": 1, "complete": complete, **facts, "rows": list(rows)}
    return write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def write_sweep_table(rows: Sequence[Row], path: Path) -> Path:
    """Write the rows as CSV; missing values are empty.

    Raises:
        OodEngineError: the path cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, text.getvalue().encode())


def write_sweep_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `sweep_components.png` and `sweep_cost.png`; nothing if no combination could be fitted.

    Raises:
        OodEngineError: matplotlib is not installed, or the folder cannot be written.
    """
    entries = combinations(rows)
    if not entries:
        return []
    pictures = {"sweep_components.png": _components(entries), "sweep_cost.png": _cost(entries)}
    return [write_atomically(folder / name, content) for name, content in pictures.items()]


def _components(entries: Sequence[Row]) -> bytes:
    """One panel per family of heads, one line per subspace: the family's best head at each K."""
    families = [family for family in FAMILIES if any(_family(entry) == family for entry in entries)]
    figure, axes = new_panels(1, len(families), width=2.9, height=2.9, margin=0.4)
    styles, low = _styles(entries), min(_best(entries).values())
    counts = sorted({entry["components_wanted"] or entry["n_components"] for entry in entries})
    for panel, family in zip(axes[0], families, strict=True):
        here = [entry for entry in entries if _family(entry) == family]
        for subspace, style in styles.items():
            best = _best([entry for entry in here if _subspace(entry) == subspace])
            points = sorted((count, 100 * value) for (_, _, count), value in best.items())
            panel.plot(*zip(*points, strict=True), **style) if points else None
        _count_axis(panel, counts)
        panel.set_ylim(max(0, 100 * low - 2), 101)
        heads = sorted({entry["head"] for entry in here}, key=FAMILIES[family].index)
        verbatim(panel.set_title(family, loc="left", pad=18, **BOLD))
        members = ("best of " if len(heads) > 1 else "") + ", ".join(name.replace("probe_", "") for name in heads)
        verbatim(panel.annotate(members, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7, color=SOFT_INK))
    axes[0][0].set_ylabel(MEAN_AXIS, fontsize=8, color=SOFT_INK)
    line = require("matplotlib.lines").Line2D
    legend(
        figure,
        {_name(subspace): line([], [], **style) for subspace, style in styles.items()},
        loc="outside lower center",
        ncols=min(4, len(styles)),
    )
    return png(figure)


def _cost(entries: Sequence[Row]) -> bytes:
    """Every combination: colour and edge say the subspace, the marker the family of heads."""
    figure, axes = new_panels(1, 1, width=5.4, height=3.6, margin=1.6)
    panel, styles = axes[0][0], _styles(entries)
    families = [family for family in FAMILIES if any(_family(entry) == family for entry in entries)]
    for entry in entries:
        panel.plot(
            entry["flops_per_sample"],
            100 * entry["auroc"],
            linestyle="",
            marker=MARKERS[_family(entry)],
            markersize=5.5,
            alpha=0.75,
            color=styles[_subspace(entry)]["color"],
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
    panel.set_xscale("log")
    panel.tick_params(which="minor", color=GRID)
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    panel.set_xlabel("floating-point operations per sample, beyond the model", fontsize=8, color=SOFT_INK)
    panel.set_ylabel(MEAN_AXIS, fontsize=8, color=SOFT_INK)
    line = require("matplotlib.lines").Line2D
    colours = {_name(subspace): line([], [], linewidth=3, color=style["color"]) for subspace, style in styles.items()}
    shapes = {
        family: line([], [], linestyle="", marker=MARKERS[family], markersize=5.5, color=SOFT_INK)
        for family in families
    }
    legend(figure, colours | shapes, loc="outside center right", ncols=1)
    return png(figure)


def _count_axis(panel: Axes, counts: Sequence[int]) -> None:
    panel.set_xscale("log")
    shown = [count for index, count in enumerate(counts) if index == 0 or count >= 1.6 * counts[index - 1]]
    panel.set_xticks(shown, [str(count) for count in shown])
    panel.set_xticks([], minor=True)
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    panel.set_xlabel("components K", fontsize=8, color=SOFT_INK)


def _styles(entries: Sequence[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """Markers shrink from one subspace to the next, so that coinciding lines (explicit and dual bases) stay visible."""
    subspaces = sorted(
        {_subspace(entry) for entry in entries}, key=lambda pair: (pair[0] == "class_average", pair[1], pair[0])
    )
    return {
        subspace: {
            "color": LINE_COLOURS[index % len(LINE_COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "linewidth": 1.8,
            "marker": "o",
            "markersize": max(3.0, 6.5 - 1.2 * index),
        }
        for index, subspace in enumerate(subspaces)
    }


def _best(entries: Sequence[Row]) -> dict[tuple[tuple[str, str], str, int], float]:
    best: dict[tuple[tuple[str, str], str, int], float] = {}
    for entry in entries:
        key = (_subspace(entry), _family(entry), entry["n_components"])
        best[key] = max(best.get(key, 0.0), entry["auroc"])
    return best


def _subspace(row: Row) -> tuple[str, str]:
    return row["basis"], row["normalisation"]


def _name(subspace: tuple[str, str]) -> str:
    basis, normalisation = subspace
    return basis if normalisation == "none" else f"{basis}, {normalisation}"


def _family(row: Row) -> str:
    return next(family for family, heads in FAMILIES.items() if row["head"] in heads)


def print_sweep(rows: Sequence[Row], echo: Callable[[str], Any] = print) -> None:
    """Print the best combinations by mean AUROC, and the reasons why others could not be fitted.

    Raises:
        OodEngineError: rich is not installed.
    """
    entries = combinations(rows)
    box, console = require("rich.box").SIMPLE_HEAD, require("rich.console").Console()
    table = require("rich.table").Table(box=box, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Basis")
    table.add_column("Head")
    for heading in ("K", "AUROC", "FPR95", "kflop", "KiB", "fit s"):
        table.add_column(heading, justify="right")
    for entry in entries[:SHOWN]:
        table.add_row(
            printable(_name(_subspace(entry))),
            printable(entry["head"]),
            str(entry["n_components"]),
            percent(entry["auroc"]),
            percent(entry["fpr95"]),
            f"{entry['flops_per_sample'] / 1e3:,.1f}",
            f"{entry['bytes'] / 2**10:,.1f}",
            f"{entry['fit_seconds']:.2f}",
        )
    console.print(table)
    echo(
        f"{min(SHOWN, len(entries))} best of {len(entries)} combinations by mean AUROC, in percent; kflop per sample and KiB of"
        " basis and head."
    )
    echo("Settings selected on the evaluation sets are optimistically biased: select them on other sets.")
    refused: dict[str, int] = {}
    for row in rows:
        if row["refused"] is not None:
            refused[row["refused"]] = refused.get(row["refused"], 0) + 1
    for reason, count in refused.items():
        echo(f"{count} not fitted: {printable(reason)}")
