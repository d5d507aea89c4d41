"""The result rows: one long-format row a subject, provider, size, dtype and memory format. `FIELDS` is the schema."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["FIELDS", "KEY", "SIZES", "make_row", "read_document", "write_csv", "write_document"]

SIZES = ("N", "D", "C", "H", "W", "n", "K")

FIELDS = {
    "subject": "what is computed",
    "provider": "who computes it",
    "workload": "whose sizes",
    "shape": "all sizes, as text",
    **{
        name: f"{meaning}; null where it has no meaning"
        for name, meaning in zip(
            SIZES,
            ("samples", "features", "classes", "map height", "map width", "anchors or fit samples", "components"),
            strict=True,
        )
    },
    "dtype": "of map, head and basis",
    "memory_format": "NCHW, channels_last, tokens, or empty",
    "cache": "warm: called again and again on the same operands; cold: these were pushed out of the caches before every call",
    "sweeps": "sizes along which the row belongs to a growth series",
    "p5_ms": "5th percentile over all calls of host time, end to end, in milliseconds",
    "p50_ms": "median of it",
    "p95_ms": "95th percentile",
    "p99_ms": "99th percentile",
    "runs": "calls that were timed",
    "rounds_ms": "the median of every round, in the order of the rounds (not in the CSV)",
    "device_p5_ms": "the same on the GPU alone, between events around the call; null on a CPU",
    "device_p50_ms": "median of it",
    "device_p95_ms": "95th percentile",
    "device_p99_ms": "99th percentile",
    "samples_run": "samples of one call",
    "ms_per_sample": "p50_ms by samples_run",
    "peak_extra_mib": "most memory that a call held beyond its operands, its result included, in MiB",
    "max_error": "largest difference to fp64, relative to the largest magnitude of each result; null where there is no truth",
    "tolerance": "what max_error was held to",
    "bytes": "least that has to be read and written, from the shapes",
    "flops": "least that has to be computed, from the shapes",
    "gb_per_s": "bytes by p50_ms",
    "tflop_per_s": "flops by p50_ms",
    "limit_ms": "the larger of bytes by the bandwidth of a copy and flops by the rate of a large matrix product, both in this run",
    "share_of_limit": "limit_ms by p50_ms (of the GPU alone, where there is one)",
    "note": "for the reader",
    "refused": "why the row has no times: a wrong result, or an error",
    "disturbed": "whether other programs wanted the same cores while the case was made and measured; null if unknown",
    "device": "cpu or cuda",
    "threads": "of torch",
    "cpu": "model",
    "gpu": "model; null without one",
    "driver": "of the GPU",
    "torch": "version",
    "triton": "version; null where it is not installed",
    "commit": "of the checkout, with + where it had changes; null where the package is installed",
    "date": "UTC",
}
"""Field → meaning."""

KEY = ("subject", "provider", "workload", "shape", "dtype", "memory_format", "cache", "device")
"""What makes two rows of two runs the same measurement."""


def make_row(**fields: Any) -> dict[str, Any]:
    """A row with every field of the schema, None where nothing is known; TypeError for a field that it does not have."""
    unknown = fields.keys() - FIELDS.keys()
    if unknown:
        raise TypeError(f"no such fields in a row: {', '.join(sorted(unknown))}")
    return dict.fromkeys(FIELDS) | fields


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write {"machine": ..., "rows": [...], ...} as JSON; the old file stays until the new one is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows without `rounds_ms`."""
    names = [name for name in FIELDS if name != "rounds_ms"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "sweeps": " ".join(row["sweeps"] or ())} for row in rows)


def read_document(path: Path) -> dict[str, Any]:
    """Read what `write_document` wrote.

    Raises:
        InputError: no such file, or not such a file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected the bench.json of an earlier run ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: expected the bench.json of an earlier run, got no JSON ({error})") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    is_ours = isinstance(rows, list) and all(isinstance(row, dict) and FIELDS.keys() <= row.keys() for row in rows)
    if not rows or not is_ours:
        raise InputError(
            f"{path}: expected the bench.json of an earlier run, got other fields; run `ood-engine bench` anew"
        )
    return dict(document)
