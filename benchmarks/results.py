"""Result files, {"machine": ..., "rows": [...]}, one a machine; and what is slower in one than in another."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .common import Row

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"

LEAST_CHANGE, SPREADS = 1.25, 3.0
"""A ratio has grown where it did by this factor, and by more than so many spreads of both runs."""


def machine_facts() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("OOD_BENCH_COMMIT") or _commit(),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or torch.version.hip}
        facts["triton"] = metadata.version("triton")
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout, with "+" where it has changes of its own."""
    try:
        command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
        return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def name_of(machine: Mapping[str, Any]) -> str:
    """File name of a machine's results: its GPU, else its CPU and number of cores."""
    words = machine.get("gpu") or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-") + ".json"


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write a result file, a row a line; a killed process leaves the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    part = path.with_suffix(".part")
    part.write_text(f'{{"machine": {json.dumps(machine)},\n "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    os.replace(part, path)


def slower(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """A line for every row whose ratio to the reference row of its own run has grown beyond the spread of both runs."""
    known = {(row["case"], row["provider"]): row for row in old if "ratio" in row}
    pairs = [(known.get((row["case"], row["provider"])), row) for row in new if "ratio" in row]
    return [
        f"{row['case']}, {row['provider']}: {before['ratio']:.3g} → {row['ratio']:.3g} × the reference row of its run"
        for before, row in pairs
        if before is not None
        and row["ratio"] > LEAST_CHANGE * before["ratio"]
        and row["ratio"] - before["ratio"] > SPREADS * (row["ratio_spread"] + before["ratio_spread"])
    ]
