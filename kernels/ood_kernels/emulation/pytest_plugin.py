"""Runs the tests of the Triton kernels as compiled code, without a GPU; findings fail the test.

    PYTHONPATH=kernels python -m pytest -p ood_kernels.emulation.pytest_plugin tests/ood_kernels/triton_kernels

Tests of what only the interpreter has, or that launch kernels of their own, are skipped.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Iterator
from importlib import import_module

# Kernels are compiled if they are imported without it; the tests' own configuration sets it later.
os.environ.pop("TRITON_INTERPRET", None)

import pytest
from triton.runtime.errors import InterpreterError

from .. import triton_kernels
from ..triton_kernels.launch import executed_by
from .executor import Executor

for _module in pkgutil.iter_modules(triton_kernels.__path__):
    import_module(f"{triton_kernels.__name__}.{_module.name}")
_executor = Executor(os.environ.get("OOD_ENGINE_EMULATED", "sm_90"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of the interpreter."""
    for item in items:
        reasons = [str(marker.kwargs.get("reason", "")) for marker in item.iter_markers("skipif")]
        if any("interpreter" in reason for reason in reasons):
            item.add_marker(pytest.mark.skip(reason="is about the interpreter"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skip tests whose own kernels are interpreted, and so cannot call compiled functions."""
    try:
        return (yield)
    except InterpreterError as error:
        pytest.skip(f"launches a kernel of its own: {error}")


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    """Execute a test's launches, and fail it on any finding."""
    _executor.reports.clear()
    with executed_by(_executor):
        yield
    findings = dict.fromkeys(line for report in _executor.reports for line in report.lines())
    assert not findings, "\n".join(findings)
