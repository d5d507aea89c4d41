"""How time and memory grow with one size while the others stay: the exponent b of cost ≈ a · size^b, from the rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .limits import COPY
from .measure import print_table
from .rows import SIZES

__all__ = ["ALONG", "SUSPICIOUS", "Fit", "fit_exponent", "growth_rows", "print_growth"]

Row = Mapping[str, Any]

ALONG = ("N", "n", "C", "D", "K")
"""Sizes along which a series may run."""

SUSPICIOUS = 0.5
"""A last exponent that is so much above that of the least work is told as too fast a growth."""

_LEAST_POINTS = 3
_SERIES = ("subject", "provider", "workload", "dtype", "memory_format", "cache", "device")
_COLUMNS = {
    "along": "along",
    "range": "from–to",
    "provider": "provider",
    "case": "case",
    "time_exponent": "time ∝",
    "time_last_exponent": "last two",
    "work_exponent": "least work ∝",
    "time_deviation": "off the fit ×",
    "memory_exponent": "memory ∝",
    "memory_last_exponent": "last two",
    "told": "",
}


class Fit(NamedTuple):
    """A line through logs.

    Attributes:
        exponent: b of cost ≈ a · size^b, by least squares of log cost on log size.
        last_exponent: b between the two largest sizes alone, to which a constant share of the cost matters least.
        deviation: largest factor between a point and the line, at least 1.
    """

    exponent: float
    last_exponent: float
    deviation: float


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Fit cost ≈ a · size^b.

    Args:
        sizes: positive, ascending, at least two.
        costs: positive, one a size.
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    slope, offset = np.polyfit(x, y, 1)
    deviation = math.exp(float(np.abs(y - slope * x - offset).max()))
    return Fit(float(slope), float((y[-1] - y[-2]) / (x[-1] - x[-2])), deviation)


def growth_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row for every series: rows that name a size in `sweeps` and are alike in everything else, three or more of them.

    Time is that of the GPU alone where there is one. A provider that takes fewer samples than its case has is left out along
    N, where its time says nothing, and counted by the sample elsewhere.

    Returns:
        Rows with the fields of a series (subject, provider, workload, dtype, memory_format, cache, device, along, case: the
        fixed sizes as text), `smallest`, `largest`, `points`, and
        time_exponent, time_last_exponent, time_deviation: see `Fit`;
        memory_exponent, memory_last_exponent, memory_deviation: the same for peak_extra_mib, None where a row has none;
        work_exponent: between the two largest sizes, of the least bytes or flops, whichever grows faster; None where unknown;
        grows_too_fast: whether time_last_exponent is more than `SUSPICIOUS` above work_exponent, or memory_last_exponent above
            it and 1: a result alone may grow as its size.
    """
    found = []
    for (along, *names), members in _series(rows).items():
        points = [members[size] for size in sorted(members)]
        sizes = [row[along] for row in points]
        if len(points) < _LEAST_POINTS:
            continue
        time = fit_exponent(sizes, [_milliseconds(row) for row in points])
        memory = _fit_or_none(sizes, points, lambda row: row["peak_extra_mib"])
        work = max(
            (fit.last_exponent for name in ("bytes", "flops") if (fit := _fit_or_none(sizes, points, _field(name)))),
            default=None,
        )
        found.append(
            {
                **dict(zip((*_SERIES, "case"), names, strict=True)),
                "along": along,
                "smallest": sizes[0],
                "largest": sizes[-1],
                "points": len(points),
                **_named("time", time),
                **_named("memory", memory),
                "work_exponent": work,
                "grows_too_fast": _grows_too_fast(time, memory, work),
            }
        )
    return found


def print_growth(growth: Sequence[Row]) -> None:
    """Print a table a subject; series that grow too fast are marked."""
    subjects: dict[str, list[Row]] = defaultdict(list)
    for row in growth:
        subjects[row["subject"]].append(row)
    for subject, members in subjects.items():
        print(f"\n{subject}: how cost grows, as exponent of the size")
        lines = [
            {
                **{name: _rounded(value) for name, value in row.items()},
                "range": f"{row['smallest']:,}–{row['largest']:,}",
                "case": f"{row['workload']} {row['case']} {row['dtype']} {row['memory_format']}".strip(),
                "told": "grows faster than the least work" if row["grows_too_fast"] else "",
            }
            for row in sorted(members, key=lambda row: (row["along"], row["workload"], row["case"], row["provider"]))
        ]
        print_table(lines, _COLUMNS)


def _grows_too_fast(time: Fit, memory: Fit | None, work: float | None) -> bool:
    if work is None:
        return False
    of_memory = memory is not None and memory.last_exponent > max(1.0, work) + SUSPICIOUS
    return of_memory or time.last_exponent > work + SUSPICIOUS


def _series(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[int, Row]]:
    """(along, fields of `_SERIES`, fixed sizes) → size → row; of rows that are there twice the last."""
    series: dict[tuple[str, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["p50_ms"] is None or row["provider"] == COPY:
            continue
        for along in _axes(row):
            fixed = " ".join(f"{name}={row[name]}" for name in SIZES if name != along and row[name] is not None)
            series[(along, *(row[name] for name in _SERIES), fixed)][row[along]] = row
    return series


def _axes(row: Row) -> Iterator[str]:
    partial = row["N"] is not None and row["samples_run"] not in (None, row["N"])
    for along in row["sweeps"] or ():
        if along in ALONG and row[along] and not (along == "N" and partial):
            yield along


def _milliseconds(row: Row) -> float:
    """Of the whole case, also where a provider ran fewer samples than it has."""
    milliseconds = float(row["device_p50_ms"] or row["p50_ms"])
    return milliseconds * row["N"] / row["samples_run"] if row["N"] and row["samples_run"] else milliseconds


def _field(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def _fit_or_none(sizes: Sequence[int], points: Sequence[Row], value: Callable[[Row], Any]) -> Fit | None:
    costs = [value(row) for row in points]
    return fit_exponent(sizes, costs) if all(costs) and min(costs) > 0 else None


def _named(what: str, fit: Fit | None) -> dict[str, float | None]:
    return {f"{what}_{name}": None if fit is None else getattr(fit, name) for name in Fit._fields}


def _rounded(value: Any) -> Any:
    return f"{value:.2f}" if isinstance(value, float) else value
