"""pytest-benchmark suite: methods that peers have too; see `ood_engine.bench.subjects.peer_methods`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ood_engine.bench.subjects.peer_methods import plans

__all__ = ["plans", "test_peer_methods"]


def test_peer_methods(measured: Callable[[Any], None], benchmark: Any) -> None:
    measured(benchmark)
