"""Pictures of how time and memory run with a size: the single pass against N, the forms of a basis against K and n."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.report.curves import LINE_COLOURS
from ..evaluation.report.figures import INK, SOFT_INK, _legend, _panels
from ..evaluation.report.files import require
from .cases import OURS
from .drawing import (
    GRAPH,
    NothingToShowError,
    duration,
    factor,
    log_axis,
    name_axes,
    size_axis,
    style_of,
    times_as_fast,
    titled,
)
from .growth import fit_exponent
from .limits import COPY
from .rivals import REFERENCE
from .rows import SIZES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bases", "latency", "memory"]

Row = Mapping[str, Any]
Points = list[tuple[int, float]]

SINGLE_PASS = "score"
FORMS = {"project dual": "dual", "project explicit": "explicit", "project factored": "factored"}
"""Subject → name of the form."""

_CASE = ("workload", "dtype", "memory_format", "cache", "device")


def latency(rows: Sequence[Row]) -> Figure:
    """Time of the single pass against N, every provider, and the limit."""
    lines = _lines_of(rows, lambda row: row["p50_ms"])
    limit = sorted({row["N"]: row["limit_ms"] for row in _members(rows) if row["limit_ms"]}.items())
    largest, ours = lines[_ours(lines)][-1]
    message = f"A single pass over {largest:,} samples takes {duration(ours)}"
    rival = dict(lines.get(_ours(lines).replace(OURS, REFERENCE), ())).get(largest)
    if rival is not None:
        message += f", {times_as_fast(ours, rival)} the reference"
    figure = _line_figure(lines, message, rows, "time a batch [ms]", limit)
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """Most memory of the single pass against N, every provider."""
    lines = _lines_of(rows, lambda row: row["peak_extra_mib"])
    largest, ours = lines[_ours(lines)][-1]
    message = f"Scoring {largest:,} samples needs {factor(ours)} MiB beside its inputs"
    rival = dict(lines.get(REFERENCE, ())).get(largest)
    if rival is not None:
        message += f", the reference {factor(rival)} MiB"
    return _line_figure(lines, message, rows, "most memory beyond the inputs [MiB]")


def bases(rows: Sequence[Row]) -> Figure:
    """Time of the projection with each form of a basis against K and against n."""
    axes_of = {"K": "components K", "n": "anchors n"}
    series = {along: found for along in axes_of if (found := _forms(rows, along))}
    if not series:
        raise NothingToShowError("no series of a projection along K or n")
    figure, panels = _panels(1, len(series), width=4.4, height=3.4, margin=0.2)
    for panel, (along, lines) in zip(panels[0], series.items(), strict=True):
        exponents: dict[str, str] = {}
        for (form, fixed), points in lines.items():
            index = list(FORMS.values()).index(form)
            style = {"color": LINE_COLOURS[index], "marker": "os^"[index], "linewidth": 2, "markersize": 5}
            panel.plot(*zip(*points, strict=True), label=f"{form}, {fixed}", **style)
            exponents[form] = f"{along}^{fit_exponent(*zip(*points[-2:], strict=True)).exponent:.1f}"
        ends = sorted({*exponents.values()}, key=lambda text: float(text.partition("^")[2]))
        details = ", ".join(f"{form} {exponent}" for form, exponent in exponents.items())
        message = f"Time grows as {' to '.join(dict.fromkeys((ends[0], ends[-1])))}"
        titled(panel, message, f"{details}, between the two largest sizes")
        log_axis(panel.yaxis)
        size_axis(panel, [size for points in lines.values() for size, _ in points])
        name_axes(panel, axes_of[along], "time a batch [ms]")
        low, high = panel.get_ylim()
        # Room for the legend, whose names say at which sizes the lines were measured.
        panel.set_ylim(low, high * (high / low) ** (0.12 + 0.09 * len(lines)))
        legend = panel.legend(loc="upper left", frameon=False, fontsize=7, labelcolor=INK)
        legend.set_zorder(5)
    return figure


def _members(rows: Sequence[Row]) -> list[Row]:
    """Rows of the single pass that belong to its longest series along N."""
    cases: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["subject"] == SINGLE_PASS and "N" in (row["sweeps"] or ()) and row["p50_ms"] is not None:
            cases[tuple(row[name] for name in _CASE)].append(row)
    if not cases:
        raise NothingToShowError(f"no series of {SINGLE_PASS!r} along N")
    return max(cases.values(), key=lambda members: len({row["N"] for row in members}))


def _lines_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, Points]:
    lines: dict[str, Points] = defaultdict(list)
    for row in _members(rows):
        found = value(row)
        if row["provider"] != COPY and found and row["samples_run"] == row["N"]:
            lines[row["provider"]].append((row["N"], found))
    if len(lines.get(OURS, ())) < 2:
        raise NothingToShowError(f"{OURS} has no series of {SINGLE_PASS!r} along N")
    return {provider: sorted(points) for provider, points in lines.items()}


def _ours(lines: Iterable[str]) -> str:
    return OURS + GRAPH if OURS + GRAPH in lines else OURS


def _line_figure(
    lines: Mapping[str, Points], message: str, rows: Sequence[Row], vertical: str, limit: Points | None = None
) -> Figure:
    figure, panels = _panels(1, 1, width=5.2, height=3.6, margin=1.6)
    panel, line = panels[0][0], require("matplotlib.lines").Line2D
    entries = {}
    # From the slowest down, as the lines lie at the right end.
    for provider, points in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        panel.plot(*zip(*points, strict=True), **style_of(provider))
        entries[provider] = line([], [], **style_of(provider))
    if limit:
        style = {"color": SOFT_INK, "linewidth": 1.2, "linestyle": (0, (1, 1.5))}
        panel.plot(*zip(*limit, strict=True), **style)
        entries["limit of the machine"] = line([], [], **style)
    member = _members(rows)[0]
    sizes = " ".join(f"{name}={member[name]}" for name in SIZES if name != "N" and member[name])
    titled(panel, message, f"{member['workload']}, {sizes}, {member['dtype']}, {member['device']}; medians")
    log_axis(panel.yaxis)
    size_axis(panel, [size for points in lines.values() for size, _ in points])
    name_axes(panel, "samples a batch, N", vertical)
    _legend(figure, entries, loc="outside center right", ncols=1)
    return figure


def _forms(rows: Sequence[Row], along: str) -> dict[tuple[str, str], Points]:
    """(form, fixed sizes) → points of the longest series of each form; of equally long ones that of the larger sizes."""
    series: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        swept = along in (row["sweeps"] or ()) and row["subject"] in FORMS
        if not swept or row["provider"] != OURS or row["p50_ms"] is None:
            continue
        fixed = " ".join(f"{name}={row[name]}" for name in SIZES if name != along and row[name])
        series[FORMS[row["subject"]], fixed][row[along]] = row["p50_ms"]
    best: dict[str, tuple[tuple[str, str], Points]] = {}
    for key, members in series.items():
        points = sorted(members.items())
        if len(points) >= 2 and (key[0] not in best or _weight(points) > _weight(best[key[0]][1])):
            best[key[0]] = key, points
    return dict(best[form] for form in FORMS.values() if form in best)


def _weight(points: Points) -> tuple[int, float]:
    return len(points), points[-1][1]
