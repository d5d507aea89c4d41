"""`python -m ood_kernels.aot`: compile every kernel for absent GPUs and check resource bounds."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..cases import Case, all_cases
from ..triton_kernels.launch import CONFIGS
from .compiled import TARGETS
from .recording import record_jobs
from .rows import compile_all, table, violations

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, cases: Iterable[Case] | None = None) -> int:
    """Run the command; returns 0, 1 if a bound is broken, 2 if nothing can be compiled."""
    options = _parser().parse_args(arguments)
    if find_spec("triton") is None:
        return _refuse(
            "Triton is not installed; `pip install triton` (Linux only) provides its compiler, no GPU needed"
        )
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no"):
        return _refuse("TRITON_INTERPRET is set, so kernels would be interpreted instead of compiled; unset it")
    chosen = [
        case
        for case in (all_cases() if cases is None else cases)
        if not options.case or any(word in str(case) for word in options.case)
    ]
    recorded = record_jobs(chosen, options.target or list(TARGETS), options.kernel, options.configs)
    if not recorded:
        return _refuse(
            f"no kernel matches: expected part of its name in --kernel {options.kernel} and of a call in --case {options.case}"
        )
    rows = compile_all(recorded, options.processes, _progress(len(recorded)))
    rows.sort(key=lambda row: (row.recorded.job.kernel, row.recorded.case))
    broken = [line for row in rows for line in violations(row, options.shared and options.shared * 1024)]
    print(json.dumps([row.as_json() for row in rows], indent=1) if options.json else table(rows))
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{len(rows)} compiled, {len(broken)} bounds broken", file=sys.stderr)
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m ood_kernels.aot", description=__doc__.partition(": ")[2])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; repeatable")
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="WORD", help="only kernels whose name contains it"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help='only calls containing it, such as "R50 bfloat16"'
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of tuned configurations, also checked")
    parser.add_argument("--shared", type=int, metavar="KIB", help="lower shared memory limit, such as 99 for sm_86")
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
