"""The benchmark scripts at tiny sizes: they run, their rows have the schema, and they fail where they have to."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
COLUMNS = {"subject", "provider", "shape", "dtype", "p5_ms", "p50_ms", "p95_ms", "runs", "peak_extra_mib", "max_error"}
MACHINE = {"cpu", "cores", "threads", "memory_gib", "load_average", "platform", "python", "torch", "date", "commit"}
TINY_MEMORY = shlex.split("--samples 64 --features 128 --classes 10 --side 3 --anchors 32 --components 8")
TINY_SPEED = shlex.split(
    "--samples 6 --features 32 --classes 10 --anchors 40 --components 8 --loop-samples 2 --rounds 3"
)
DUAL = "closed form, dual"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch):
    """The scripts put the checkout on the path, and fitting lowers the number of threads."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict]:
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["machine"].keys() >= MACHINE
    for row in results["rows"]:
        assert row.keys() >= COLUMNS
        assert row["dtype"] == "float32"
    return results["rows"]


def test_memory_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, path = load("memory"), tmp_path / "memory.json"

    def measure_here(subject: str, arguments: list[str], state: Path) -> dict:
        # A new process for every subject would take seconds to import torch.
        options = memory.parse(arguments)
        return memory.fit_state(options, state) if subject == "fit" else memory.measure(subject, options, state)

    monkeypatch.setattr(memory, "measure_apart", measure_here)
    assert memory.main([*TINY_MEMORY, "--json", str(path)]) == 0
    *rows, naive = read(path)
    assert [row["subject"] for row in rows] == list(memory.SUBJECTS)
    map_mib = 64 * 128 * 9 * 4 / 2**20
    results_mib = (64 * 128 + 64 * 10 + 64 * 8 + 3 * 64) * 4 / 2**20
    for row in rows:
        assert map_mib < row["inputs_mib"] < 2 * map_mib
        assert row["peak_extra_mib"] >= row["allocated_mib"] > 0.9 * results_mib
        assert row["limit_mib"] == 200
    assert naive["peak_extra_mib"] == 64 * 10 * 129 * 4 / 2**20


def test_memory_fails_over_the_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    memory = load("memory")
    monkeypatch.setattr(memory, "measure_apart", lambda subject, *_: {"subject": subject, "peak_extra_mib": 5.0})
    assert memory.main([*TINY_MEMORY, "--limit-mib", "5"]) == 0
    assert memory.main([*TINY_MEMORY, "--limit-mib", "4"]) == 1
    assert "OVER THE LIMIT of 4 MiB: ok.score" in capsys.readouterr().out


def test_memory_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    row = load("memory").measure_apart("ok.score", TINY_MEMORY, tmp_path / "unused")
    assert row["subject"] == "ok.score"
    assert row["allocated_mib"] > 0


def test_allocations_are_seen_at_their_peak() -> None:
    def call() -> torch.Tensor:
        big = torch.ones(4 * 2**20)
        total = big.sum()
        del big
        return total + torch.ones(2**20).sum()

    measure = load("measure")
    assert measure.peak_allocated_mib(call) == pytest.approx(16, abs=0.1)
    resident = measure.peak_resident_mib(call)
    assert resident is None or 15 < resident < 30


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    subjects = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = load("measure").interleave(subjects, 3, warm_up=1, least_seconds=0)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(figures) == 3 and min(figures) >= 0 for figures in rounds.values())


def test_timing_fields_are_quantiles() -> None:
    fields = load("measure").timing_fields([float(i) for i in range(101)])
    assert fields == pytest.approx({"p5_ms": 5, "p50_ms": 50, "p95_ms": 95, "runs": 101})


def test_closed_form_writes_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    assert load("closed_form_vs_autograd").main([*TINY_SPEED, "--required-ratio", "0", "--json", str(path)]) == 0
    rows = read(path)
    assert len(rows) == 5
    for row in rows:
        assert 0 < row["p5_ms"] <= row["p50_ms"] <= row["p95_ms"]
        assert row["runs"] == 3
        assert row["ms_per_sample"] == pytest.approx(row["p50_ms"] / row["samples"])
        assert row["max_error"] < 1e-4
        assert row["peak_extra_mib"] > 0
    by_name = {row["subject"]: row for row in rows}
    autograd = by_name["autograd, a sample at a time"]
    assert autograd["times_autograd"] == 1
    assert by_name[DUAL]["times_autograd"] == pytest.approx(autograd["ms_per_sample"] / by_name[DUAL]["ms_per_sample"])


def test_closed_form_fails_below_the_required_ratio() -> None:
    assert load("closed_form_vs_autograd").main([*TINY_SPEED, "--required-ratio", "1e9"]) == 1


def test_a_wrong_subject_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("closed_form_vs_autograd")
    make_subjects = script.make_subjects

    def with_one_wrong(problem: tuple, options: Namespace) -> dict:
        subjects = make_subjects(problem, options)
        right = subjects[DUAL].call
        subjects[DUAL] = subjects[DUAL]._replace(call=lambda: right() * (1 + 1e-3))
        return subjects

    monkeypatch.setattr(script, "make_subjects", with_one_wrong)
    assert script.main([*TINY_SPEED, "--required-ratio", "0"]) == 1
    output = capsys.readouterr().out
    assert f"REFUSED {DUAL}: error" in output
    assert not any(line.startswith(f"{DUAL}  ") for line in output.splitlines())


def test_results_are_named_after_the_day() -> None:
    path = load("measure").default_results_path("memory")
    assert path.parent == FOLDER / "results"
    assert path.name.startswith("memory-20")
    assert len(path.stem) == len("memory-2000-01-01")
