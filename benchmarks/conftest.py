"""Options, fixture and results of `pytest benchmarks/`: a test a case, by pytest-benchmark where it is installed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .common import QUICK, BrokenDeviceError, Case, Effort, Timer, in_rounds, measure
from .results import machine_facts, read, slower, write

BROKEN = 3
"""Exit code where the device no longer answers: a new process with --resume goes on."""


class Recorder:
    """The rows of this run, on disk after every case, and the names of the cases that an earlier run has `done`."""

    def __init__(self, path: Path, resume: bool) -> None:
        known = resume and path.exists()
        document: dict[str, Any] = read(path) if known else {"machine": machine_facts(), "rows": []}
        self._path, self._machine = path, document["machine"]
        self.rows: list[dict[str, Any]] = document["rows"]
        self.done = {row["case"] for row in self.rows}

    def add(self, case: str, rows: list[dict[str, Any]]) -> None:
        self.rows += [{"case": case, **row} for row in rows]
        write(self._path, self._machine, self.rows)


KEY = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ood-engine")
    group.addoption("--quick", action="store_true", help="fewer and smaller cases, fewer rounds")
    group.addoption("--rows", type=Path, default=Path("bench-output/rows.json"), help="where the rows go (%(default)s)")
    group.addoption("--resume", action="store_true", help="go on with the cases that this file does not have")
    group.addoption("--compare-ratios", type=Path, metavar="OLD", help="exit with 1 where a ratio has grown since OLD")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Recorder(config.getoption("--rows"), config.getoption("--resume"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done, quick = config.stash[KEY].done, config.getoption("--quick")
    # What the targets ask for has been measured if time runs out.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    left_out = [item for item in items if item.name in done or (quick and item.get_closest_marker("slow"))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if config.pluginmanager.hasplugin("benchmark"):
            item.add_marker(pytest.mark.benchmark(timer=Timer.now, group=item.name.partition("[")[0]))
        # What a rival warns about is no reason to refuse it.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], Case]], None]]:
    """Measures a case and keeps its rows; fails where a provider was wrong."""
    recorder, has_plugin = request.config.stash[KEY], request.config.pluginmanager.hasplugin("benchmark")
    effort = QUICK if request.config.getoption("--quick") else Effort()
    pedantic = request.getfixturevalue("benchmark").pedantic if has_plugin else in_rounds

    def take(make: Callable[[], Case]) -> None:
        try:
            with torch.no_grad():
                rows = measure(make(), effort, pedantic)
        except BrokenDeviceError as error:
            recorder.add(request.node.name, error.args[1])
            pytest.exit(f"the device no longer answers: {error.args[0]}", BROKEN)
        recorder.add(request.node.name, rows)
        refused = [f"{row['provider']}: {row['error']}" for row in rows if "error" in row]
        if refused:
            pytest.fail("\n".join(refused), pytrace=False)

    yield take
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line a provider: milliseconds a call, and the ratio to the reference row."""
    shown = ""
    for row in config.stash[KEY].rows:
        if row["case"] != shown:
            shown = row["case"]
            terminalreporter.write_line(f"\n{row['subject']}, {row['workload']} {row['shape']} {row['dtype']}")
        figures = f"{row.get('median_ms', math.nan):10.3f} ms  x{row.get('ratio', math.nan):<9.3g}"
        terminalreporter.write_line(f"  {row['provider']:32}{figures}{row.get('error') or row.get('missing') or ''}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    old, recorder = session.config.getoption("--compare-ratios"), session.config.stash[KEY]
    if old is not None:
        lines = slower(read(old)["rows"], recorder.rows)
        print("", *(lines or [f"no ratio has grown beyond noise since {old}"]), sep="\n")
        if lines and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
