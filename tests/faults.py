"""Hand-made faults that hold the tests to account: each is put into a copy of the tree, where the tests it names must fail.

    python tests/faults.py [--only PATTERN] [--jobs N] [--limit SECONDS] [--list]

The faults are in tests/faults/*.toml. The exit code is 0 where every fault was caught, 1 where one survived or got no answer
within the limit, and 2 where a fault does not fit the tree: a snippet that is not in its file exactly once, or a test that is not
there. Who changes such a line or such a test moves the fault along.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path("tests/faults")
PASSED, FAILED = 0, 1
"""What pytest returns; anything else is no answer."""


class Fault(NamedTuple):
    """One wrong line.

    Attributes:
        name: unique, for `--only`.
        file: path below the root.
        old: what is there, exactly once.
        new: what takes its place.
        tests: pytest ids, functions or whole files, one of which must fail.
        reason: what the fault would do to a user.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    reason: str


class Outcome(NamedTuple):
    """What a run of pytest gave."""

    code: int | None
    seconds: float
    output: str


def read_faults(root: Path) -> list[Fault]:
    """The faults of all files of the table, in the order of their names."""
    tables = [tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted((root / TABLE).glob("*.toml"))]
    return [Fault(**fields) for table in tables for fields in table["fault"]]


def problems(faults: Sequence[Fault], root: Path) -> list[str]:
    """What keeps faults from being applied, a line each; empty where all fit."""
    lines = []
    names = [fault.name for fault in faults]
    lines += [f"{name}: the name is given twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for fault in faults:
        path = root / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
        if count != 1:
            lines.append(f"{fault.name}: its snippet occurs {count} times in {fault.file}, expected once")
        if fault.old == fault.new:
            lines.append(f"{fault.name}: changes nothing")
        lines += [f"{fault.name}: there is no {test}" for test in fault.tests or ["test"] if not _exists(test, root)]
    return lines


def _exists(test: str, root: Path) -> bool:
    file, _, names = test.partition("[")[0].partition("::")
    path = root / file
    return path.is_file() and f"def {names.rpartition('::')[2]}" in path.read_text(encoding="utf-8")


def copy_tree(root: Path, target: Path) -> Path:
    """The files that git knows of or would take, as they are now; returns `target`."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Run tests on the packages of a tree until the first fails; no code where the limit is passed."""
    # No bytecode: one as old and as long as the source before the fault would pass for that of the fault.
    path = os.pathsep.join([str(tree / "kernels"), str(tree)])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    # What is compiled with a fault goes with the trees.
    environment["OOD_ENGINE_CACHE"] = str(tree.parent / "cache")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=limit)[0]
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return Outcome(None, time.monotonic() - started, output)
    return Outcome(process.returncode, time.monotonic() - started, output)


def try_fault(fault: Fault, tree: Path, limit: float) -> Outcome:
    """Run the tests of a fault on a tree that has it; the tree is as before afterwards."""
    path = tree / fault.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return run_tests(tree, fault.tests, limit)
    finally:
        path.write_text(sound, encoding="utf-8")


def run(faults: Sequence[Fault], root: Path, jobs: int, limit: float) -> int:
    """Check the tests without a fault, then try every fault; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="ood-engine-faults-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            trees.put(copy_tree(root, Path(folder) / str(number)))
        tests = sorted({test for fault in faults for test in fault.tests})
        tree = trees.get()
        sound = run_tests(tree, tests, max(600, limit * len(tests)))
        trees.put(tree)
        if sound.code != PASSED:
            print(f"faults: the tests do not pass without any fault\n{_end(sound)}", file=sys.stderr)
            return 1
        print(f"{'passed':<9} {sound.seconds:6.1f} s  {len(tests)} tests without a fault", flush=True)

        def attempt(fault: Fault) -> bool:
            tree = trees.get()
            try:
                outcome = try_fault(fault, tree, limit)
            finally:
                trees.put(tree)
            word = {PASSED: "SURVIVED", FAILED: "caught"}.get(outcome.code, "NO ANSWER")
            detail = f": {fault.reason}" if outcome.code == PASSED else ""
            detail = detail if outcome.code in (PASSED, FAILED) else f"\n{_end(outcome)}"
            print(f"{word:<9} {outcome.seconds:6.1f} s  {fault.name}{detail}", flush=True)
            return outcome.code == FAILED

        started = time.monotonic()
        pool = ThreadPoolExecutor(jobs)
        try:
            caught = list(pool.map(attempt, faults))
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{sum(caught)} of {len(caught)} faults caught in {time.monotonic() - started:.0f} s")
    return 0 if all(caught) else 1


def _end(outcome: Outcome) -> str:
    reason = f"no answer after {outcome.seconds:.0f} s" if outcome.code is None else f"pytest returned {outcome.code}"
    return "\n".join([*outcome.output.splitlines()[-15:], reason])


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser("python tests/faults.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", help="faults whose name or file it matches, such as '*nap*'")
    parser.add_argument("--jobs", type=int, default=1, help="faults at the same time, each in a copy of its own")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for the tests of one fault")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    options: Any = parser.parse_args(arguments)
    faults = read_faults(root)
    for line in (wrong := problems(faults, root)):
        print(f"faults: {line}", file=sys.stderr)
    if wrong:
        return 2
    pattern = f"*{options.only or ''}*"
    chosen = [one for one in faults if any(fnmatch.fnmatch(text, pattern) for text in (one.name, one.file))]
    if not chosen:
        print(f"faults: none matches {options.only!r}", file=sys.stderr)
        return 2
    if options.list:
        for fault in chosen:
            print(f"{fault.name:<40} {fault.file}: {fault.reason}")
        return 0
    return run(chosen, root, max(1, options.jobs), options.limit)


if __name__ == "__main__":
    sys.exit(main())
