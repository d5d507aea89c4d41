from __future__ import annotations

import math
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

from ood_kernels import triton_kernels
from ood_kernels.cases import forced_by, run
from ood_kernels.checks import PRECISIONS
from ood_kernels.emulation import rows
from ood_kernels.emulation.cases import BOUNDS, Row, all_rows, operands_of, sample
from ood_kernels.triton_kernels.launch import executed_by, forced

ROOT = Path(__file__).parents[3]


def launched(row: Row) -> set[str]:
    """Names of the kernels of a row, none of which is run."""
    kernels = set()
    with executed_by(lambda launch: kernels.add(launch.kernel.fn.__name__)), forced(forced_by(row.case)):
        run(row.case, sample(row, operands_of(row), slice(0, 1)))
    return kernels


def test_the_rows_cover_every_kernel_and_precision():
    modules = [
        import_module(f"{triton_kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    rows = all_rows()
    assert len(set(rows)) == len(rows)
    assert set().union(*map(launched, rows)) == defined
    for function in ("masked_energy", "project_dual", "project_explicit", "project_factored", "score"):
        assert {row.case.precision for row in rows if row.case.function == function} == set(PRECISIONS) == set(BOUNDS)


def test_storages_of_a_row_keep_its_values():
    for row in all_rows():
        values = operands_of(row)
        part = sample(row, values, slice(1, 3))
        for name in ("feature_map", "h", "a"):
            if name in values:
                assert torch.equal(part[name], values[name][1:3])
        if row.variant == "class factors transposed":
            assert torch.equal(part["basis"].class_factors, values["basis"].class_factors)
            assert part["basis"].class_factors.stride(0) == 1


def test_the_largest_error_is_relative_and_nan_where_nan_is_elsewhere():
    truth = torch.tensor([4.0, math.nan, -8.0], dtype=torch.float64)
    assert rows._error(torch.tensor([4.0, math.nan, -8.0]), truth) == 0
    assert rows._error(torch.tensor([5.0, math.nan, -8.0]), truth) == 0.125
    assert math.isnan(rows._error(torch.tensor([4.0, 1.0, -8.0]), truth))
    assert math.isnan(rows._largest([0.0, math.nan, 1.0]))
    assert rows._tf32(torch.tensor([1 + 2.0**-11, 1 + 2.0**-12])).tolist() == [1 + 2.0**-10, 1.0]


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as `make emulate` runs it, with this environment's Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), **variables}
    arguments = [sys.executable, "-m", "ood_kernels.emulation", *words, "--processes", "1"]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_runs_rows_as_compiled_code(tmp_path):
    done = command("pool_nap 4×4 bfloat16 rows", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, line = done.stdout.splitlines()
    assert header.split()[:2] == ["kernels", "sizes"]
    assert line.startswith("pool_kernel")
    assert "bfloat16" in line
    assert list(tmp_path.rglob("pool_kernel.ptx"))
    assert "1 rows, 0 failed" in done.stderr


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["nothing"], {}, "no row has all of these in its name: nothing"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(words, variables, expected):
    done = command(*words, **variables)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
