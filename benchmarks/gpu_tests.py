"""The whole test suite on a GPU machine, several files at a time, each in a process of its own.

A kernel that puts the GPU out of order then fails its own file and no other; and kernels are compiled side by side. A file that
cannot be imported because a package is missing is skipped, and said so. Everything goes to the log, a line a file to the terminal.

    python benchmarks/gpu_tests.py [--minutes 2.5] [--log FILE] [--jobs 8] [FILE ...]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PASSED, NO_TESTS, TIMED_OUT = 0, 5, -1


class Outcome(NamedTuple):
    """What became of one test file: "passed", "FAILED", "SKIPPED" or "NOT FINISHED", and why in a few words."""

    file: Path
    verdict: str
    reason: str
    seconds: float
    output: str


def suite() -> list[Path]:
    """All test files, the kernels' own first: they take longest."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return sorted(files, key=lambda file: ("triton_kernels" not in file.parts, "ood_kernels" not in file.parts))


def judge(file: Path, code: int, seconds: float, output: str) -> Outcome:
    """Read pytest's exit code and its last lines."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    summary = lines[-1].strip(" =") if lines else ""
    if code == TIMED_OUT:
        return Outcome(file, "NOT FINISHED", "no time was left", seconds, output)
    if code in (PASSED, NO_TESTS):
        return Outcome(file, "passed", summary, seconds, output)
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", output)
    if missing and find_spec(missing[1]) is None and re.search(r"\berrors? during collection\b|^ERROR ", output, re.M):
        return Outcome(file, "SKIPPED", f"{missing[1]} is not installed", seconds, output)
    return Outcome(file, "FAILED", summary or f"exit code {code}", seconds, output)


def run(file: Path, end: float, threads: int, workers: int) -> Outcome:
    """Run one file until `end` of `time.monotonic`."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "--color=no"]
    if workers > 1 and "triton_kernels" in file.parts and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(python_path())}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(0.1, end - start),
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = TIMED_OUT, bytes(error.stdout or b"").decode(errors="replace")
    return judge(file, code, time.monotonic() - start, output)


def python_path() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [str(ROOT / "kernels"), str(ROOT), *([given] if given else [])]


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every file passed or lacks a package, 1 where one failed or was not finished, 2 without pytest."""
    parser = argparse.ArgumentParser(description="The test suite, several files at a time.")
    cores = os.cpu_count() or 1
    parser.add_argument("files", type=Path, nargs="*", help="only these")
    parser.add_argument("--minutes", type=float, default=2.5, help="when to stop (default 2.5)")
    parser.add_argument("--log", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-tests.log")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, cores // 2)), help="files at a time")
    options = parser.parse_args(argv)
    if find_spec("pytest") is None:
        print("SKIPPED the tests: pytest is not installed", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes
    threads = max(1, cores // options.jobs)
    workers = max(1, cores // 4)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    outcomes = []
    files = options.files or suite()
    with options.log.open("w", encoding="utf-8") as log, ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(run, file.resolve(), end, threads, workers) for file in files]
        for done in as_completed(waiting):
            outcome = done.result()
            outcomes.append(outcome)
            name = os.path.relpath(outcome.file, ROOT)
            line = f"{outcome.verdict} {name} in {outcome.seconds:.0f} s: {outcome.reason}"
            print(line, flush=True)
            log.write(f"{line}\n{outcome.output}\n")
            log.flush()
    counts = Counter(outcome.verdict for outcome in outcomes)
    print("test files:", ", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.items()))
    return 1 if counts["FAILED"] or counts["NOT FINISHED"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
