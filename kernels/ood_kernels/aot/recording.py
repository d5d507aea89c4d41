"""Compilation jobs: the launches of all cases, with default and with shipped configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..cases import Case, forced_by, operands, run
from ..triton_kernels.launch import CONFIGS, Choice, Launch, alike, distance, forced, record
from .compiled import Job, specialise

__all__ = ["Recorded", "record_jobs"]

_META = torch.device("meta")


class Recorded(NamedTuple):
    """A job with its originating case and expected load width.

    Attributes:
        case: first call that needs the job.
        job: compilation job.
        wide: whether loads should be 16 bytes wide.
        tuned: file of its configuration; "" for the default.
    """

    case: str
    job: Job
    wide: bool
    tuned: str


def record_jobs(
    cases: Iterable[Case], targets: Sequence[str], kernels: Sequence[str] = (), configs: Path = CONFIGS
) -> list[Recorded]:
    """The launches of the cases, with default and shipped configurations, without duplicate specialisations.

    Args:
        cases: calls, recorded on "meta" tensors.
        targets: keys of `TARGETS`.
        kernels: substrings of kernel names, any of which must match; empty for all.
        configs: folder of tuned configurations.
    """
    recorded: dict[str, Recorded] = {}
    for case, tuned, launches in _recordings(list(cases), configs):
        for launch in launches:
            if kernels and not any(word in launch.kernel.__name__ for word in kernels):
                continue
            for target in targets:
                job = specialise(launch, target)
                known = recorded.setdefault(repr(job), Recorded(str(case), job, launch.wide, tuned))
                recorded[repr(job)] = known._replace(wide=known.wide or launch.wide)
    return list(recorded.values())


def _recordings(cases: Sequence[Case], configs: Path) -> Iterator[tuple[Case, str, list[Launch]]]:
    """(case, file of its configuration or "", launches): each case with its defaults, then each tuned configuration."""
    asked: list[tuple[Case, Choice]] = []
    for case in cases:
        launches, choices = _recorded(case, {})
        asked += [(case, choice) for choice in choices]
        yield case, "", launches
    for file in sorted(configs.glob("*.json")):
        for family, rows in json.loads(file.read_text())["families"].items():
            for row in rows:
                near = [(case, choice.shape) for case, choice in asked if choice.family == family]
                near = [(case, shape) for case, shape in near if alike(row["shape"], shape)]
                if near:
                    case, _ = min(near, key=lambda pair: distance(row["shape"], pair[1]))
                    yield case, file.name, _recorded(case, {family: row["config"]})[0]


def _recorded(case: Case, configs: Mapping[str, Mapping[str, int | str]]) -> tuple[list[Launch], list[Choice]]:
    with forced({**forced_by(case), **configs}) as choices, record() as launches:
        run(case, operands(case, _META))
    return launches, choices
