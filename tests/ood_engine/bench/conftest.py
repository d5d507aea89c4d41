"""Result rows that were never measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ood_engine.bench.rows import SIZES, make_row


def synthetic_row(provider: str = "ood-engine", p50_ms: float | None = 1.0, **fields: Any) -> dict[str, Any]:
    """A warm fp32 row of the CPU; `shape` follows from the sizes, `rounds_ms` and percentiles from the median."""
    sizes = {name: fields.get(name) for name in SIZES}
    times = {} if p50_ms is None else dict.fromkeys(("p5_ms", "p95_ms", "p99_ms"), p50_ms) | {"runs": 5}
    known = {
        "subject": "score",
        "workload": "R50",
        "shape": " ".join(f"{name}={size}" for name, size in sizes.items() if size is not None),
        "dtype": "float32",
        "memory_format": "",
        "cache": "warm",
        "sweeps": [],
        "rounds_ms": None if p50_ms is None else [p50_ms] * 5,
        "samples_run": sizes["N"],
        "device": "cpu",
        "threads": 2,
        **times,
    }
    return make_row(**{**known, "provider": provider, "p50_ms": p50_ms, **fields})


@pytest.fixture(scope="session")
def row() -> Callable[..., dict[str, Any]]:
    """row(provider, p50_ms, **fields) → a row with every field."""
    return synthetic_row
