"""Rows executed: error against fp64, bits of samples alone, findings."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ptx_emulator import EmulationError

from ..cases import forced_by, run, run_reference
from ..triton_kernels.launch import executed_by, forced
from ..tune import tensors_of
from .cases import BOUNDS, Row, all_rows, operands_of, sample
from .executor import Executor

__all__ = ["Result", "execute", "table"]


class Result(NamedTuple):
    """One executed row.

    Attributes:
        kernels: launched.
        error: largest over all outputs, each relative to its largest magnitude in fp64.
        problems: one line each; none if all is right.
        seconds: with compilation.
    """

    kernels: tuple[str, ...]
    error: float
    problems: tuple[str, ...]
    seconds: float


def execute(index: int, target: str = "sm_90") -> Result:
    """Run a row of `all_rows` and compare it with fp64; an error that ends it is one of its problems."""
    torch.set_num_threads(1)
    start = time.process_time()
    executor = _executor(target)
    executor.reports.clear()
    row = all_rows()[index]
    error = float("nan")
    problems: list[str] = []
    try:
        error, problems = _compare(row, executor)
    except Exception as failure:
        problems = [f"{type(failure).__name__}: {' '.join(str(failure).split())}"]
        if isinstance(failure, EmulationError) and failure.report:
            executor.reports.append(failure.report)
    problems += dict.fromkeys(line for report in executor.reports for line in report.lines())
    kernels = dict.fromkeys(report.kernel for report in executor.reports)
    return Result(tuple(kernels), error, tuple(problems), time.process_time() - start)


@cache
def _executor(target: str) -> Executor:
    return Executor(target)


def _compare(row: Row, executor: Executor) -> tuple[float, list[str]]:
    """(error, problems) of the numbers."""
    values = operands_of(row)
    executor.order = np.random.default_rng(0)
    whole = sample(row, values, slice(None))
    ours = _run(row, whole, executor)
    truth = tensors_of(run_reference(row.case, tree_map_only(Tensor, _doubled, whole)))
    problems = []
    errors = [_error(one, other) for one, other in zip(ours, truth, strict=True) if other.numel()]
    bound = BOUNDS[row.case.precision]
    if not all(error <= bound for error in errors):
        told = ", ".join(f"{error:.1e}" for error in errors)
        problems.append(f"error {told} of the outputs in order, expected at most {bound:.1e}")
    rounded = _ROUNDED.get(row.case.precision)
    if row.case.function == "masked_energy" and rounded:
        # The operands are rounded once, and then as good as in fp32.
        products = {name: rounded(whole[name].float()) for name in ("h", "weight")}
        exact = tensors_of(run_reference(row.case, tree_map_only(Tensor, _doubled, whole | products)))
        error = _largest([_error(one, other) for one, other in zip(ours, exact, strict=True)])
        if not error <= BOUNDS["ieee"]:
            problems.append(
                f"error {error:.1e} against operands rounded to {row.case.precision}, expected {BOUNDS['ieee']:.1e}"
            )
    executor.order = None
    for first in (0, row.case.samples - 1):
        alone = _run(row, sample(row, values, slice(first, first + 1)), executor)
        changed = [
            index
            for index, (one, other) in enumerate(zip(alone, ours, strict=True))
            if not torch.equal(_bits(one), _bits(other[first : first + 1]))
        ]
        if changed:
            problems.append(f"outputs {changed} of sample {first} alone differ in bits from those in the batch")
    return _largest(errors), problems


def _tf32(tensor: Tensor) -> Tensor:
    """fp32 rounded to 10 bits of mantissa, ties away from 0."""
    return (tensor.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {"tf32": _tf32, "fp16": Tensor.half, "bf16": Tensor.bfloat16}


def _run(row: Row, values: dict[str, object], executor: Executor) -> list[Tensor]:
    with executed_by(executor), forced(forced_by(row.case)):
        return tensors_of(run(row.case, values))


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _error(ours: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest magnitude; NaN if NaN is elsewhere."""
    if not torch.equal(ours.isnan(), truth.isnan()):
        return float("nan")
    known = ~truth.isnan()
    if not known.any():
        return 0.0
    return float((ours[known] - truth[known]).abs().max() / truth[known].abs().max().clamp_min(1e-300))


def _largest(errors: list[float]) -> float:
    """NaN if any is, which compares as too large."""
    return float(np.max(errors))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def table(results: list[tuple[Row, Result]]) -> str:
    """The results as an aligned text table."""
    lines: list[tuple[str, ...]] = [("kernels", "sizes", "layout", "dtype", "precision", "error", "findings", "s", "")]
    for row, result in results:
        case = row.case
        options = [case.workload.name, f"N={case.samples}"]
        if case.function in ("masked_energy", "score"):
            options.append(f"mask={case.mask}")
        if case.function == "score":
            options += [str(case.basis), case.cotangent]
        lines.append(
            (
                " ".join(result.kernels),
                " ".join(options),
                row.layout,
                str(case.dtype).removeprefix("torch."),
                "-" if case.function.startswith("pool") else case.precision,
                f"{result.error:.1e}",
                str(len(result.problems)),
                f"{result.seconds:.1f}",
                "FAILED" if result.problems else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
