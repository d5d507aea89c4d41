"""Tables for the reader: the rows of a run, every provider beside ood-engine; what was left out; a comparison."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .cases import OURS
from .compare import Comparison, is_disturbed
from .measure import print_table
from .rows import KEY

__all__ = ["print_comparison", "print_left_out", "print_rows"]

Row = Mapping[str, Any]

_CASE = tuple(name for name in KEY if name not in ("subject", "provider"))
_COLUMNS = {
    "provider": "provider",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "per_sample": "ms a sample",
    "as_long": f"× {OURS}",
    "peak_extra_mib": "MiB",
    "max_error": "error",
    "share": "of limit",
}
_COMPARED_ROWS = {
    "verdict": "verdict",
    "case": "case",
    "provider": "provider",
    "old_ms": "old ms",
    "new_ms": "new ms",
    "ratio": "new/old",
    "spread": "99 % of rounds",
    "effect": "held to its case",
}
_COMPARED_PROVIDERS = {
    "provider": "provider",
    "rows": "rows",
    "effect": "new/old",
    "spread": "99.9 % of rows",
    "verdict": "verdict",
}
_NAMED = 12


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table a subject with a block a case; "× ood-engine" is the time a sample by that of ood-engine."""
    cases: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    subjects: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        key = (row["subject"], *(row[name] for name in _CASE))
        if key not in cases:
            subjects[row["subject"]].append(key)
        cases[key].append(row)
    for subject, keys in subjects.items():
        print(f"\n{subject}")
        lines: list[dict[str, Any]] = []
        for key in keys:
            title = dict.fromkeys(_COLUMNS, "") | {"provider": " ".join(str(part) for part in key[1:] if part)}
            lines += [title, *_lines(cases[key])]
        print_table(lines, _COLUMNS)


def print_left_out(document: Mapping[str, Any]) -> None:
    """Print once each: providers that were missing, rows that were refused, cases for which there was no time or no peace."""
    disturbed = sum(is_disturbed(row) for row in document["rows"])
    if disturbed:
        print(
            f"{disturbed} of {len(document['rows'])} rows are not those of an idle machine: other programs wanted the same cores,"
            " and threads waited for each other"
        )
    for entry in document["missing"]:
        print(f"left out: {entry['provider']}: {entry['reason']}")
    refused = Counter(
        (row["subject"], row["provider"], row["refused"]) for row in document["rows"] if row["refused"] is not None
    )
    for (subject, provider, reason), count in refused.items():
        print(f"refused: {provider} in {count} × {subject}: {reason}")
    names = document["left_out"]
    if names:
        more = f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        print(f"no time for {len(names)} cases (--minutes): {'; '.join(names[:_NAMED])}{more}")


def print_comparison(comparison: Comparison) -> None:
    """Print what differs, the providers as a whole, and the rows, those beyond noise first."""
    for fact in comparison.facts:
        print(f"not the same: {fact}")
    print(
        f"machine itself: {comparison.drift:.2f} × as long as before; what did not change differs by {comparison.scatter:.2f} ×"
        f" and by up to {comparison.disturbance_ms:.3g} ms"
    )
    if comparison.disturbed:
        print(
            f"not judged, since other programs wanted the same cores: {comparison.disturbed:.0%} of the rows; measure again on an"
            " idle machine, or both runs with --threads 1"
        )
    for title, names in (("old", comparison.only_old), ("new", comparison.only_new)):
        if names:
            print(f"only in the {title} run ({len(names)}): {'; '.join(names)}")
    print("\nnew by old, all rows of a provider together")
    print_table([_compared(row) for row in comparison.providers], _COMPARED_PROVIDERS)
    print("\nnew by old, row by row")
    order = {"slower": 0, "faster": 1, "within noise": 2, "disturbed": 3, "control": 4}
    ordered = sorted(comparison.rows, key=lambda row: (order[row["verdict"]], -abs(math.log(row["effect"]))))
    print_table([_compared(row) for row in ordered], _COMPARED_ROWS)
    counts = Counter(row["verdict"] for row in comparison.rows)
    print("\n" + ", ".join(f"{counts[verdict]} {verdict}" for verdict in order))


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    ours = next((_each(row) for row in rows if row["provider"] == OURS), None)
    lines = []
    for row in sorted(rows, key=lambda row: (_each(row) is None, _each(row) or 0)):
        each = _each(row)
        lines.append(
            {
                **row,
                "provider": f"  {row['provider']}" + ("" if row["refused"] is None else " (refused)"),
                "per_sample": row["ms_per_sample"],
                "as_long": None if each is None or ours is None else each / ours,
                "share": None if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}",
            }
        )
    return lines


def _each(row: Row) -> float | None:
    """Milliseconds a sample; of a call where there are no samples."""
    milliseconds: float | None = row["ms_per_sample"] or row["p50_ms"]
    return milliseconds


def _compared(row: Row) -> dict[str, Any]:
    case = " ".join(str(row[name]) for name in KEY if name not in ("provider", "device") and row.get(name))
    numbers = {name: f"{row[name]:.2f}" for name in ("ratio", "effect") if name in row}
    return {**row, **numbers, "case": case, "spread": f"{row['low']:.2f}–{row['high']:.2f}"}
