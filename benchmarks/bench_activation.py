"""pytest-benchmark suite: the activation pass; see `ood_engine.bench.subjects.activation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.activation import plans

__all__ = ["plans", "test_activation"]


def test_activation(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
