"""`python -m ood_kernels.aot`: compile every kernel for GPUs that are not here, and hold what comes out to its bounds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cases import Case, all_cases, forced_by, operands, run
from .compiled import TARGETS, Job, Resources, compile_job, specialise
from .triton_kernels.launch import Choice, Launch, alike, distance, forced, record

__all__ = ["CONFIGS", "Row", "compile_all", "main", "plan", "violations"]

CONFIGS = Path(__file__).parent / "triton_kernels" / "configs"
_META = torch.device("meta")


class Planned(NamedTuple):
    """A job, the case that it was recorded from, and what its loads should be like.

    Attributes:
        case: the first call that needs it.
        job: what to compile.
        wide: whether its loads should be 16 bytes wide.
        tuned: the file whose configuration it has; "" for a default.
    """

    case: str
    job: Job
    wide: bool
    tuned: str


class Row(NamedTuple):
    """One compiled kernel: a row of the table. `error` says why there are no resources."""

    planned: Planned
    resources: Resources | None
    error: str

    def as_json(self) -> dict[str, Any]:
        """The row in plain data; `wgmma` says whether that instruction was found."""
        case, job, wide, tuned = self.planned
        row: dict[str, Any] = {"kernel": job.kernel, "case": case, "target": job.target, "tuned": tuned, "wide": wide}
        row |= {"config": job.config, "signature": job.signature, "error": self.error}
        if self.resources is None:
            return row | dict.fromkeys((*Resources._fields, "wgmma"))
        return row | self.resources._asdict() | {"wgmma": self.resources.tensor_core == "wgmma"}


def plan(
    cases: Iterable[Case], targets: Sequence[str], kernels: Sequence[str] = (), configs: Path = CONFIGS
) -> list[Planned]:
    """What the cases launch, with their defaults and with every shipped configuration, each specialisation once.

    Args:
        cases: the calls; they are recorded on tensors without memory.
        targets: names of `TARGETS`.
        kernels: words, one of which must be in a kernel's name; none lets all pass.
        configs: folder of tuned configurations.
    """
    planned: dict[str, Planned] = {}
    for case, tuned, launches in _recordings(list(cases), configs):
        for launch in launches:
            if kernels and not any(word in launch.kernel.__name__ for word in kernels):
                continue
            for target in targets:
                job = specialise(launch, target)
                known = planned.setdefault(repr(job), Planned(str(case), job, launch.wide, tuned))
                planned[repr(job)] = known._replace(wide=known.wide or launch.wide)
    return list(planned.values())


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


def compile_all(
    planned: Sequence[Planned], processes: int, done: Callable[[int], object] = lambda count: None
) -> list[Row]:
    """Compile in so many processes; `done` is told how many have finished."""
    rows = []
    with _pool(processes) as pool:
        futures = [pool.submit(_attempt, one.job) for one in planned]
        for one, future in zip(planned, futures, strict=True):
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
    """Compile in a process of its own what was lost when the compiler took the others down."""
    with _pool(1) as pool:
        try:
            return pool.submit(_attempt, job).result()
        except BrokenProcessPool:
            return None, "the compiler crashed"


def _attempt(job: Job) -> tuple[Resources | None, str]:
    """The resources, or in one line why it did not compile; exceptions of Triton's do not travel between processes."""
    try:
        return compile_job(job), ""
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, f"{type(error).__name__}: {lines[-1] if lines else ''}"


def violations(row: Row, shared_bytes: int | None = None) -> list[str]:
    """One line for every bound that a compiled kernel breaks; `shared_bytes` replaces its target's limit where smaller."""
    case, job, wide, tuned = row.planned
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
        f"widest load {found.load_bytes} bytes, expected 16": wide and found.load_bytes < 16,
    }
    return [f"{where}: {line}" for line, is_broken in broken.items() if is_broken]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    header = ("kernel", "case", "target", "registers", "stack", "shared", "tensor core", "load", "file", "config")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        case, job, _, tuned = row.planned
        words = " ".join(f"{name}={value}" for name, value in job.config.items() if name != "enable_fp_fusion")
        found = row.resources
        cells = ("-",) * 6 if found is None else (*found[:3], found.tensor_core or "-", *found[5:])
        lines.append((job.kernel, f"{case} {tuned}".strip(), job.target, *map(str, cells), words))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None, cases: Iterable[Case] | None = None) -> int:
    """Run the command; returns 0, 1 where a bound is broken, 2 where nothing can be compiled."""
    options = _parser().parse_args(arguments)
    if find_spec("triton") is None:
        return _refuse(
            "Triton is not installed; `pip install triton` (Linux only) brings its compiler, no GPU is needed"
        )
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no"):
        return _refuse("TRITON_INTERPRET is set, so kernels would be interpreted and not compiled; unset it")
    chosen = [
        case
        for case in (all_cases() if cases is None else cases)
        if not options.case or any(word in str(case) for word in options.case)
    ]
    planned = plan(chosen, options.target or list(TARGETS), options.kernel, options.configs)
    if not planned:
        return _refuse(
            f"no kernel matches: expected a part of its name in --kernel {options.kernel} and of a call in --case {options.case}"
        )
    rows = compile_all(planned, options.processes, _progress(len(planned)))
    rows.sort(key=lambda row: (row.planned.job.kernel, row.planned.case))
    broken = [line for row in rows for line in violations(row, options.shared and options.shared * 1024)]
    print(json.dumps([row.as_json() for row in rows], indent=1) if options.json else table(rows))
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{len(rows)} compiled, {len(broken)} bounds broken", file=sys.stderr)
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m ood_kernels.aot", description=__doc__.partition(": ")[2])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="WORD", help="only kernels with it in their name"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help='only calls with it, such as "R50 bfloat16"'
    )
    parser.add_argument("--json", action="store_true", help="print rows for machines")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of tuned configurations to check as well")
    parser.add_argument(
        "--shared", type=int, metavar="KIB", help="a smaller limit of shared memory, such as 99 for sm_86"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser


def _progress(total: int) -> Callable[[int], object]:
    if not sys.stderr.isatty():
        return lambda count: None
    return lambda count: print(f"\r{count}/{total}", end="\n" if count == total else "", file=sys.stderr, flush=True)


def _refuse(line: str) -> int:
    print(f"ood_kernels.aot: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
