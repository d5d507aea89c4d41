"""The results file of a run on a GPU: written after every case, and able to take up a run that was cut off."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ood_engine.bench.measure import MIB, machine_facts

__all__ = ["ROW_FIELDS", "OtherRunError", "Results", "gpu_facts", "make_row"]

ROW_FIELDS = (
    *("case", "subject", "provider", "workload", "samples", "dtype", "layout", "precision", "shape"),
    *("p5_ms", "p50_ms", "p95_ms", "runs", "calls", "samples_run", "ms_per_sample", "peak_extra_mib"),
    *("max_error", "rms_error", "tolerance", "bytes", "flops", "gb_per_s", "tflop_per_s", "product"),
    *("share_of_copy", "roofline_ms", "times_roofline", "note", "error"),
)
_SAME = ("gpu", "driver", "torch", "triton", "commit")


class OtherRunError(RuntimeError):
    """A results file that comes from another GPU, other versions or another commit: its rows cannot stand beside new ones."""


def make_row(**fields: Any) -> dict[str, Any]:
    """A row with every field of the schema, None where nothing is known; TypeError for a field that it does not have."""
    unknown = fields.keys() - set(ROW_FIELDS)
    if unknown:
        raise TypeError(f"no such fields in a row: {', '.join(sorted(unknown))}")
    return dict.fromkeys(ROW_FIELDS) | fields


def gpu_facts() -> dict[str, Any]:
    """Facts about the machine and its GPU; no name of a host or user."""
    facts = machine_facts()
    # Tuning writes into the checkout, so a script that tunes first hands down the commit that it started from.
    facts["commit"] = os.environ.get("OOD_BENCH_COMMIT") or facts["commit"]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return facts | {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / MIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Results:
    """Rows of finished cases, kept in one JSON file that is whole at any moment.

    Args:
        path: of the file; an existing one is replaced by the first write unless `resume`.
        machine: facts from `gpu_facts`.
        resume: keep what an earlier run on the same GPU, versions and commit left in the file.

    Attributes:
        rows: all rows; those of a case stand together.
        finished: names of the cases that need no more measuring.
        left_out: names of the cases for which no time was left.

    Raises:
        OtherRunError: `resume`, and the file comes from another machine or commit.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], resume: bool = False) -> None:
        self.path = path
        self.machine = dict(machine)
        self.rows: list[dict[str, Any]] = []
        self.finished: list[str] = []
        self.left_out: list[str] = []
        if resume and path.exists():
            self._take_up(json.loads(path.read_text(encoding="utf-8")))

    def _take_up(self, content: Mapping[str, Any]) -> None:
        before = content["machine"]
        other = [name for name in _SAME if before.get(name) != self.machine.get(name)]
        if other:
            differences = ", ".join(f"{name} {before.get(name)} there, {self.machine.get(name)} here" for name in other)
            raise OtherRunError(
                f"{self.path.name} is of another run ({differences}): name another file, or do not resume"
            )
        self.rows = list(content["rows"])
        self.finished = list(content["finished"])

    def refused(self, case: str) -> set[tuple[str, str, str | None]]:
        """(subject, provider, precision) of what has failed in a case before."""
        failed = [row for row in self.rows if row["case"] == case and row["error"]]
        return {(row["subject"], row["provider"], row["precision"]) for row in failed}

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Put rows in place of earlier ones of the same case, subject, provider, precision and shape, and write the file."""
        new = list(rows)
        replaced = {_key(row) for row in new}
        self.rows = [row for row in self.rows if _key(row) not in replaced] + new
        self.write()

    def finish(self, case: str) -> None:
        """Note that nothing is left to measure in a case, and write the file."""
        self.finished = [*(name for name in self.finished if name != case), case]
        self.write()

    def write(self, **extra: Any) -> None:
        """Write the file; `extra` are further entries, such as the verdicts."""
        content = {
            "machine": self.machine,
            **extra,
            "finished": self.finished,
            "left_out": self.left_out,
            "rows": self.rows,
        }
        write_json(self.path, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one step, so that a process that is killed leaves the old or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _key(row: Mapping[str, Any]) -> Sequence[Any]:
    product = row["product"]
    names = ("case", "subject", "provider", "precision")
    return (*(row[name] for name in names), tuple(product) if product else None)
