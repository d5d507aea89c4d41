"""`python -m ood_kernels.emulation`: execute the compiled kernels without a GPU and compare them with fp64."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

from ..aot.compiled import TARGETS
from .cases import Row, all_rows

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a row fails, 2 if nothing can be executed."""
    options = _parser().parse_args(arguments)
    if find_spec("triton") is None:
        return _refuse(
            "Triton is not installed; `pip install triton` (Linux only) provides its compiler, no GPU needed"
        )
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no"):
        return _refuse("TRITON_INTERPRET is set, so kernels would be interpreted instead of compiled; unset it")
    rows = all_rows()
    chosen = [index for index, row in enumerate(rows) if all(word in _name(row) for word in options.words)]
    if not chosen:
        return _refuse(f"no row has all of these in its name: {' '.join(options.words)}")
    from .rows import execute, table

    start = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.rows", "triton"])
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        results = []
        for index, result in zip(chosen, pool.map(execute, chosen, [options.target] * len(chosen)), strict=True):
            results.append((rows[index], result))
            for line in result.problems:
                print(f"{_name(rows[index])}: {line}", file=sys.stderr, flush=True)
    print(table(results))
    failed = sum(bool(result.problems) for _, result in results)
    print(f"{len(results)} rows, {failed} failed, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 1 if failed else 0


def _name(row: Row) -> str:
    return f"{row.case} {row.variant}".strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m ood_kernels.emulation", description=__doc__.partition(": ")[2])
    parser.add_argument("words", nargs="*", help='only rows whose name contains all of these, such as "score" "tf32 "')
    targets = [name for name, target in TARGETS.items() if target.backend == "cuda"]
    parser.add_argument("--target", default="sm_90", choices=targets)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser


def _refuse(line: str) -> int:
    print(f"ood_kernels.emulation: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
