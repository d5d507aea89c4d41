"""All subjects in order, each with a fair share of the time, and the document that a run leaves."""

from __future__ import annotations

import importlib
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .cases import Effort, Plan
from .disturbance import Disturbance
from .growth import growth_rows
from .measure import machine_facts
from .rows import FIELDS, write_document
from .runner import run

__all__ = ["DEFAULT_MINUTES", "FORMAT", "SUBJECTS", "Recorder", "Schedule", "effort_for", "environment", "measure"]

FORMAT = 1

SUBJECTS = (
    "activation",
    "head",
    "projection",
    "single_pass",
    "latency",
    "engine",
    "fitting",
    "metrics",
    "peer_methods",
    "files",
)
"""Modules of `ood_engine.bench.subjects`, each with `plans(effort)`, in the order in which they are measured."""

DEFAULT_MINUTES = {"quick": 2.4, "full": 7.5}
"""Until no new case is started, by the name of the effort."""


def effort_for(is_quick: bool, device: torch.device) -> Effort:
    """Rounds and seconds of a quick or of a full run."""
    return Effort("quick", 7, 0.02, 1.0, device) if is_quick else Effort("full", 10, 0.03, 2.0, device)


def environment(device: torch.device) -> dict[str, Any]:
    """Facts about the machine, the GPU and the versions; those that are fields of a row are in every row of the run."""
    is_gpu = device.type == "cuda"
    return machine_facts() | {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if is_gpu else None,
        "driver": _driver() if is_gpu else None,
        "triton": _triton_version(),
    }


class Schedule:
    """Plans in the order of the subjects, as long as there is time.

    A subject starts no new case after its share, which is what is left of the time by the subjects that are left, nor one that
    would outlast it if it took as long as the subject's case before. Time that is left at the end goes round the subjects that
    have plans left. At least one case is started, whatever the time.

    Args:
        subjects: names out of `SUBJECTS`.
        effort: is given to `plans`.
        seconds: from now; after them no new case is started.
        clock: seconds now.

    Attributes:
        total: number of plans.
        broken: subject → why it has no plans, in one line.
    """

    def __init__(
        self,
        subjects: Sequence[str],
        effort: Effort,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._queues: dict[str, deque[Plan]] = {}
        self.broken: dict[str, str] = {}
        for subject in subjects:
            try:
                module = importlib.import_module(f"{__package__}.subjects.{subject}")
                self._queues[subject] = deque(module.plans(effort))
            except ImportError as error:
                self.broken[subject] = f"cannot be imported ({error})"
        self.total = sum(map(len, self._queues.values()))

    @property
    def left_out(self) -> list[Plan]:
        """Plans for which there was no time."""
        return [plan for queue in self._queues.values() for plan in queue]

    def __iter__(self) -> Iterator[Plan]:
        queues = [_Queue(queue) for queue in self._queues.values() if queue]
        if queues:
            yield from self._next(queues[0])
        for index, queue in enumerate(queues):
            now = self._clock()
            share_ends = now + (self._end - now) / (len(queues) - index)
            while self._has_time(queue, share_ends):
                yield from self._next(queue)
        while waiting := [queue for queue in queues if self._has_time(queue, self._end)]:
            for queue in waiting:
                if self._has_time(queue, self._end):
                    yield from self._next(queue)

    def _next(self, queue: _Queue) -> Iterator[Plan]:
        begun = self._clock()
        yield queue.plans.popleft()
        queue.last_seconds = self._clock() - begun

    def _has_time(self, queue: _Queue, end: float) -> bool:
        now = self._clock()
        return bool(queue.plans) and now < end and now + queue.last_seconds <= end


class _Queue:
    def __init__(self, plans: deque[Plan]) -> None:
        self.plans, self.last_seconds = plans, 0.0


class Recorder:
    """The document of a run, on disk after every case.

    Args:
        path: of the document.
        machine: facts, see `environment`.
        effort: quick or full.

    Attributes:
        document: format, machine, complete, left_out (cases for which there was no time), missing (provider and reason), growth
            (see `growth_rows`), rows.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], effort: Effort) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "machine": {**machine, "effort": effort.name},
            "complete": False,
            "left_out": [],
            "missing": [],
            "growth": [],
            "rows": [],
        }
        self._disturbance = Disturbance()

    def keep(self, plan: Plan, rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> None:
        """Add the rows of one case; a provider that is missing for the same reason again is not added again."""
        disturbed = self._disturbance()
        self.document["rows"].extend({**row, "disturbed": disturbed} for row in rows)
        for provider, reason in missing.items():
            entry = {"provider": provider, "reason": reason}
            if entry not in self.document["missing"]:
                self.document["missing"].append(entry)
        self._write()

    def finish(self, left_out: Sequence[Plan], broken: Mapping[str, str]) -> None:
        """Add what was left out and how cost grows."""
        self.document["left_out"] = [str(plan) for plan in left_out]
        self.document["missing"] += [{"provider": subject, "reason": reason} for subject, reason in broken.items()]
        self.document["growth"] = growth_rows(self.document["rows"])
        self.document["complete"] = True
        self._write()

    def _write(self) -> None:
        write_document(self.path, self.document)


def measure(
    schedule: Schedule,
    effort: Effort,
    recorder: Recorder,
    progress: Callable[[Schedule], Iterator[Plan]] = iter,
) -> None:
    """Run a schedule to its end; the document is whole after every case, and complete after the last.

    Args:
        schedule: plans.
        effort: how much of each is measured.
        recorder: takes the rows.
        progress: hands the plans on, and shows them.

    Raises:
        InputError: see `ood_engine.bench.runner.run`.
    """
    machine = {name: value for name, value in recorder.document["machine"].items() if name in FIELDS}
    run(progress(schedule), effort, machine, recorder.keep)
    recorder.finish(schedule.left_out, schedule.broken)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return torch.version.hip
    return lines[0] if lines else None


def _triton_version() -> str | None:
    # Not imported to ask it: what Triton is, compiled or interpreted, is settled by its first import.
    for name in ("triton", "pytorch-triton-rocm", "triton-windows"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None
