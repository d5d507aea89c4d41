"""pytest-benchmark suite: the single pass; see `ood_engine.bench.subjects.single_pass`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.single_pass import plans

__all__ = ["plans", "test_single_pass"]


def test_single_pass(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
