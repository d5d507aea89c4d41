"""What has to be settled before the first test module is imported, and which files compare numbers."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

# Triton reads this once, at its first import, and other libraries import it too.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

COMPARES_NUMBERS = re.compile(r"torch\.equal|allclose|assert_close|assert_same|approx\(|tolerance")
# These compare numbers too, but not such as BLAS or vector instructions compute, or take minutes: interpreted and compiled kernels,
# the registration of operators with torch.compile, and whole runs of benchmarks and examples.
NOT_NUMERIC = (
    "ood_kernels/triton_kernels",
    "ood_kernels/aot",
    "ood_kernels/emulation",
    "ptx_emulator",
    "ood_kernels/test_ops.py",
    "ood_kernels/test_tune.py",
    "ood_engine/cli",
    "ood_engine/demo",
    "ood_engine/evaluation/test_report.py",
    "ood_engine/images",
    "ood_engine/model/test_zoo.py",
    "test_all_parameters.py",
    "test_benchmarks.py",
)
_HERE = Path(__file__).parent


@cache
def is_numeric(file: Path) -> bool:
    """Whether a file of tests compares numbers, and so runs under several instruction sets (the marker `numeric`)."""
    place = file.relative_to(_HERE)
    elsewhere = any(place.is_relative_to(other) for other in NOT_NUMERIC)
    return not elsewhere and COMPARES_NUMBERS.search(file.read_text(encoding="utf-8")) is not None


def pairwise(*factors: Iterable[object]) -> list[tuple[object, ...]]:
    """Rows of values in which any two values of different factors meet, far fewer than their product has."""
    values = [tuple(factor) for factor in factors]
    rows = list(product(*(range(len(choices)) for choices in values)))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing: set[object] = set().union(*pairs.values())
    chosen: list[tuple[int, ...]] = []
    used: Counter[tuple[int, int]] = Counter()
    while missing:
        # Of rows that add as many pairs, the one whose values are rare so far.
        best = max(rows, key=lambda row: (len(pairs[row] & missing), -sum(used[choice] for choice in enumerate(row))))
        chosen.append(best)
        used.update(enumerate(best))
        missing -= pairs[best]
    return [tuple(choices[index] for choices, index in zip(values, row, strict=True)) for row in sorted(chosen)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked `pairwise(name=values, ...)` once a row; names given alone before them are of fixtures."""

    def written(value: object) -> str | None:
        return str(value) if isinstance(value, (torch.dtype, tuple)) else None

    for marker in metafunc.definition.iter_markers("pairwise"):
        rows = pairwise(*marker.kwargs.values())
        metafunc.parametrize(list(marker.kwargs), rows, indirect=list(marker.args), ids=written)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of such a file."""
    for item in items:
        if item.path.is_relative_to(_HERE) and is_numeric(item.path):
            item.add_marker(pytest.mark.numeric)
