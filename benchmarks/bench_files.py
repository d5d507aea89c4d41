"""pytest-benchmark suite: scoring images from files; see `ood_engine.bench.subjects.files`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.files import plans

__all__ = ["plans", "test_files"]


def test_files(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
