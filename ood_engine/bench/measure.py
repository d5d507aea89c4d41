"""What the benchmarks share: interleaved timing, peak memory, facts about the machine, tables and result files."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
_FRACTIONS = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
RESULTS = ROOT / "benchmarks" / "results"


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    least_seconds: float = 0.05,
) -> dict[str, list[float]]:
    """Milliseconds that a run of each subject took, round by round: in turns, so that a slow spell meets all of them.

    In a round each subject runs once, and again until `least_seconds` have passed; the round's figure is the mean of its runs.
    Which subject begins changes from round to round. The `warm_up` runs of each are not kept.
    """
    for call in subjects.values():
        for _ in range(warm_up):
            call()
    names = list(subjects)
    rounds_ms: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            count, start, elapsed = 0, time.perf_counter(), 0.0
            while count == 0 or elapsed < least_seconds:
                subjects[name]()
                count, elapsed = count + 1, time.perf_counter() - start
            rounds_ms[name].append(1000 * elapsed / count)
    return rounds_ms


def timing_fields(rounds_ms: Sequence[float]) -> dict[str, float | int]:
    """The columns of a result row that say how long a run took."""
    low, middle, high = torch.tensor(rounds_ms, dtype=torch.float64).quantile(_FRACTIONS).tolist()
    return {"p5_ms": low, "p50_ms": middle, "p95_ms": high, "runs": len(rounds_ms)}


def peak_allocated_mib(call: Callable[[], object]) -> float:
    """Largest sum of what torch's CPU allocator handed out during the call and had not got back, results included."""
    # Kineto otherwise writes a line to standard error at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recording:
        result = call()
    del result
    assert recording.profiler is not None
    kineto = recording.profiler.kineto_results
    assert kineto is not None
    memory = [event for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def peak_resident_mib(call: Callable[[], object]) -> float | None:
    """By how much the process outgrew its resident size during the call; None where Linux does not let it be measured.

    This also sees what torch's allocator does not, such as the packing buffers of the matrix products. Freed memory that
    the C library still holds would hide new allocations, so it is handed back first.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_mib("VmRSS")
        at_reset = _status_mib("VmHWM")
    except (OSError, AttributeError):
        return None
    if before is None or at_reset is None or at_reset > before + 1:
        return None
    result = call()
    peak = _status_mib("VmHWM")
    del result
    return None if peak is None else peak - before


def _status_mib(field: str) -> float | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None


def machine_facts() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Commit of the checkout, with "+" where it has changes of its own; None where the package is installed."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if status else "")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows under the titles of `columns` (key → title); a missing value is a dash."""
    cells = [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        first, *others = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join((first, *others)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_results(path: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """Write {"machine": ..., "rows": [...]} as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **extra, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


def default_results_path(name: str) -> Path:
    """benchmarks/results/<name>-<date>.json."""
    return RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
