"""Reports of a sweep: a table, CSV, JSON, and figures of AUROC over K and over cost."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import RUN_BY_SPREADSHEETS, write_atomically
from ..sweep import COLUMNS
from .drawing import BOLD, GRID, LINE_COLOURS, SOFT_INK, legend, new_panels, png, verbatim
from .evaluation import printable
from .extras import require
from .table import percent, rich_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["combinations", "print_sweep", "write_sweep_figures", "write_sweep_json", "write_sweep_table"]

Row = Mapping[str, Any]
Subspace = tuple[str, str]
Styles = Mapping[Subspace, dict[str, Any]]

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
    entries = []
    for group in groups.values():
        means = {name: sum(row[name] for row in group) / len(group) for name in ("auroc", "fpr95")}
        entries.append({**group[0], "ood_set": None, **means})
    return sorted(entries, key=lambda entry: (-entry["auroc"], entry["flops_per_sample"], entry["bytes"]))


def write_sweep_json(rows: Sequence[Row], facts: Mapping[str, Any], path: Path, *, complete: bool = True) -> Path:
    """Write the rows as JSON, atomically; keys: `format` (1), `complete`, the facts, and `rows`; null for missing values.

    Raises:
        OodEngineError: the path cannot be written.
    """
    document = {"format": 1, "complete": complete, **facts, "rows": list(rows)}
    return write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def write_sweep_table(rows: Sequence[Row], path: Path) -> Path:
    """Write the rows as CSV; missing values are empty, and an apostrophe is before text that a spreadsheet would run.

    Raises:
        OodEngineError: the path cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _escaped(value) for name, value in row.items()} for row in rows)
    return write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def _escaped(value: Any) -> Any:
    return re.sub(RUN_BY_SPREADSHEETS, r"'\1", value) if isinstance(value, str) else value


def write_sweep_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `sweep_components.png` and `sweep_cost.png`; nothing if no combination could be fitted.

    Raises:
        OodEngineError: matplotlib is not installed, or the folder cannot be written.
    """
    entries = combinations(rows)
    if not entries:
        return []
    families = {family: [entry for entry in entries if entry["head"] in heads] for family, heads in FAMILIES.items()}
    families = {family: members for family, members in families.items() if members}
    styles = _styles(entries)
    pictures = {"sweep_components.png": _components(families, styles), "sweep_cost.png": _cost(families, styles)}
    return [write_atomically(folder / name, content) for name, content in pictures.items()]


def _components(families: Mapping[str, Sequence[Row]], styles: Styles) -> bytes:
    """One panel per family of heads, one line per subspace: the family's best head at each K."""
    figure, axes = new_panels(1, len(families), width=2.9, height=2.9, margin=0.4)
    best = {family: _best(entries) for family, entries in families.items()}
    low = min(value for of_family in best.values() for value in of_family.values())
    every = [entry for entries in families.values() for entry in entries]
    counts = sorted({entry["components_wanted"] or entry["n_components"] for entry in every})
    shown = [count for index, count in enumerate(counts) if index == 0 or count >= 1.6 * counts[index - 1]]
    for panel, (family, entries) in zip(axes[0], families.items(), strict=True):
        for subspace, style in styles.items():
            points = sorted((count, 100 * value) for (of, count), value in best[family].items() if of == subspace)
            panel.plot(*zip(*points, strict=True), **style) if points else None
        _log_axis(panel, "components K")
        panel.set_xticks(shown, [str(count) for count in shown])
        panel.set_xticks([], minor=True)
        panel.set_ylim(max(0, 100 * low - 2), 101)
        heads = sorted({entry["head"] for entry in entries}, key=FAMILIES[family].index)
        verbatim(panel.set_title(family, loc="left", pad=18, **BOLD))
        members = ("best of " if len(heads) > 1 else "") + ", ".join(name.replace("probe_", "") for name in heads)
        verbatim(panel.annotate(members, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7, color=SOFT_INK))
    axes[0][0].set_ylabel(MEAN_AXIS)
    lines = {_name(subspace): style for subspace, style in styles.items()}
    legend(figure, lines, loc="outside lower center", ncols=min(4, len(styles)))
    return png(figure)


def _cost(families: Mapping[str, Sequence[Row]], styles: Styles) -> bytes:
    """Every combination: colour and edge say the subspace, the marker the family of heads."""
    figure, axes = new_panels(1, 1, width=5.4, height=3.6, margin=1.6)
    panel = axes[0][0]
    shapes = {family: {"linestyle": "", "marker": MARKERS[family], "markersize": 5.5} for family in families}
    edge = {"alpha": 0.75, "markeredgecolor": "white", "markeredgewidth": 0.4}
    for family, entries in families.items():
        for entry in entries:
            colour = styles[_subspace(entry)]["color"]
            panel.plot(entry["flops_per_sample"], 100 * entry["auroc"], color=colour, **shapes[family], **edge)
    _log_axis(panel, "floating-point operations per sample, beyond the model")
    panel.tick_params(which="minor", color=GRID)
    panel.set_ylabel(MEAN_AXIS)
    colours = {_name(subspace): {"linewidth": 3, "color": style["color"]} for subspace, style in styles.items()}
    grey = {family: shape | {"color": SOFT_INK} for family, shape in shapes.items()}
    legend(figure, colours | grey, loc="outside center right", ncols=1)
    return png(figure)


def _log_axis(panel: Axes, label: str) -> None:
    panel.set(xscale="log", xlabel=label)
    panel.grid(axis="y", color=GRID, linewidth=0.7)


def _styles(entries: Sequence[Row]) -> Styles:
    """Markers shrink from one subspace to the next, so that coinciding lines (explicit and dual bases) stay visible."""
    found = {_subspace(entry) for entry in entries}
    subspaces = sorted(found, key=lambda pair: (pair[0] == "class_average", pair[1], pair[0]))
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


def _best(entries: Sequence[Row]) -> dict[tuple[Subspace, int], float]:
    best: dict[tuple[Subspace, int], float] = {}
    for entry in entries:
        key = (_subspace(entry), entry["n_components"])
        best[key] = max(best.get(key, 0.0), entry["auroc"])
    return best


def _subspace(row: Row) -> Subspace:
    return row["basis"], row["normalisation"]


def _name(subspace: Subspace) -> str:
    basis, normalisation = subspace
    return basis if normalisation == "none" else f"{basis}, {normalisation}"


def print_sweep(rows: Sequence[Row], echo: Callable[[str], Any] = print) -> None:
    """Print the best combinations by mean AUROC, and the reasons why others could not be fitted.

    Raises:
        OodEngineError: rich is not installed.
    """
    entries = combinations(rows)
    table = rich_table()
    for heading in ("Basis", "Head", "K", "AUROC", "FPR95", "kflop", "KiB", "fit s"):
        table.add_column(heading, justify="left" if heading in ("Basis", "Head") else "right")
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
    require("rich.console").Console().print(table)
    best = f"{min(SHOWN, len(entries))} best of {len(entries)} combinations by mean AUROC, in percent"
    echo(f"{best}; kflop per sample and KiB of basis and head.")
    echo("Settings selected on the evaluation sets are optimistically biased: select them on other sets.")
    for reason, count in Counter(row["refused"] for row in rows if row["refused"] is not None).items():
        echo(f"{count} not fitted: {printable(reason)}")
