"""Compiled kernels as table rows, and their resource bounds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from .compiled import TARGETS, Job, Resources, compile_job
from .recording import Recorded

__all__ = ["Row", "compile_all", "table", "violations"]


class Row(NamedTuple):
    """One compiled kernel.

    Attributes:
        recorded: the job and its origin.
        resources: resource usage, or None if compilation failed.
        error: reason for the failure, else "".
    """

    recorded: Recorded
    resources: Resources | None
    error: str

    def as_json(self) -> dict[str, Any]:
        """The row as plain data; `wgmma` is whether that instruction was found."""
        case, job, wide, tuned = self.recorded
        row: dict[str, Any] = {"kernel": job.kernel, "case": case, "target": job.target, "tuned": tuned, "wide": wide}
        row |= {"config": job.config, "signature": job.signature, "error": self.error}
        if self.resources is None:
            return row | dict.fromkeys((*Resources._fields, "wgmma"))
        return row | self.resources._asdict() | {"wgmma": self.resources.tensor_core == "wgmma"}


def compile_all(
    recorded: Sequence[Recorded], processes: int, done: Callable[[int], object] = lambda count: None
) -> list[Row]:
    """Compile in parallel; `done` is called with the number of finished jobs."""
    rows = []
    with _pool(processes) as pool:
        futures = [pool.submit(_attempt, one.job) for one in recorded]
        for one, future in zip(recorded, futures, strict=True):
            try:
                resources, error = future.result()
            except BrokenProcessPool:
                resources, error = _alone(one.job)
            rows.append(Row(one, resources, error))
            done(len(rows))
    return rows


def _pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([compile_job.__module__, "triton"])
    return ProcessPoolExecutor(processes, mp_context=context)


def _alone(job: Job) -> tuple[Resources | None, str]:
    """Recompile in a separate process a job lost to a compiler crash."""
    with _pool(1) as pool:
        try:
            return pool.submit(_attempt, job).result()
        except BrokenProcessPool:
            return None, "the compiler crashed"


def _attempt(job: Job) -> tuple[Resources | None, str]:
    """The resources, or the error as one line, since Triton's exceptions cannot be pickled."""
    try:
        return compile_job(job), ""
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, f"{type(error).__name__}: {lines[-1] if lines else ''}"


def violations(row: Row, shared_bytes: int | None = None) -> list[str]:
    """One line per broken bound; a smaller `shared_bytes` replaces the target's limit."""
    case, job, wide, tuned = row.recorded
    where = f"{job.kernel} on {job.target} ({case}{f', {tuned}' if tuned else ''})"
    if row.resources is None:
        return [f"{where}: does not compile: {row.error}"]
    found = row.resources
    limit = min(TARGETS[job.target].shared_bytes, shared_bytes or TARGETS[job.target].shared_bytes)
    broken = {
        f"{found.stack} bytes of stack, expected none: registers spill": found.stack > 0,
        f"{found.shared} bytes of shared memory, expected at most {limit}": found.shared > limit,
        "no wgmma, expected it for products in less than fp32": (
            job.target == "sm_90" and found.reduced_dot and found.tensor_core != "wgmma"
        ),
        "packed 32-bit numbers overflow into each other: miscompiled": found.miscompiled,
        f"widest load {found.load_bytes} bytes, expected 16": wide and found.load_bytes < 16,
    }
    return [f"{where}: {line}" for line, is_broken in broken.items() if is_broken]


def table(rows: Sequence[Row]) -> str:
    """The rows as an aligned text table."""
    header = ("kernel", "case", "target", "registers", "stack", "shared", "tensor core", "load", "file", "config")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        case, job, _, tuned = row.recorded
        words = " ".join(f"{name}={value}" for name, value in job.config.items() if name != "enable_fp_fusion")
        found = row.resources
        cells = ("-",) * 6 if found is None else (*found[:3], found.tensor_core or "-", *found[5:7])
        lines.append((job.kernel, f"{case} {tuned}".strip(), job.target, *map(str, cells), words))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
