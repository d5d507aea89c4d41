"""The benchmark scripts at tiny sizes: they run, their rows have the schema, and they fail where they have to."""

from __future__ import annotations

import importlib
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
TINY_CPU = shlex.split(
    "--samples 4 --maps 20x3 --tokens 16x9 --rounds 2 --forward-rounds 2 --features 2048 --classes 10 --anchors 40"
    " --components 8 --image 32"
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

    measure = importlib.import_module("ood_engine.bench.measure")
    assert measure.peak_allocated_mib(call) == pytest.approx(16, abs=0.1)
    resident = measure.peak_resident_mib(call)
    assert resident is None or 15 < resident < 30


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    subjects = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = importlib.import_module("ood_engine.bench.measure").interleave(subjects, 3, warm_up=1, least_seconds=0)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(figures) == 3 and min(figures) >= 0 for figures in rounds.values())


def test_timing_fields_are_quantiles() -> None:
    fields = importlib.import_module("ood_engine.bench.measure").timing_fields([float(i) for i in range(101)])
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
    path = importlib.import_module("ood_engine.bench.measure").default_results_path("memory")
    assert path.parent == FOLDER / "results"
    assert path.name.startswith("memory-20")
    assert len(path.stem) == len("memory-2000-01-01")


def test_cpu_path_writes_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "cpu_path.json"
    load("cpu_path").main([*TINY_CPU, "--output", str(path)])
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["compile_seconds"] > 0
    assert len(results["rows"]) == 3 * 3 * 3 + 2
    for row in results["rows"]:
        assert row.keys() >= COLUMNS
        assert 0 < row["p5_ms"] <= row["p50_ms"] <= row["p95_ms"]
    pooling = [row for row in results["rows"] if row["subject"].startswith("pooling")]
    assert [(row["limit"], row["dtype"]) for row in pooling if row["limit"] == 3] == [(3.0, "bfloat16")]
    assert all(row["max_error"] <= 1e-6 and row["peak_extra_mib"] > 0 for row in pooling)
    forward, score = results["rows"][-2:]
    assert forward["ratio"] == 1
    assert score["limit"] == 0.02


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"ratio": 2.0, "limit": 2.0, "max_error": 1e-6}, None),
        ({"ratio": 9.0, "limit": None, "max_error": None}, None),
        ({"ratio": 2.1, "limit": 2.0, "max_error": 0.0}, "TOO SLOW pooling [1] float32: 2.1 > 2"),
        ({"ratio": 1.0, "limit": 2.0, "max_error": 2e-6}, "WRONG pooling [1] float32: error 2.0e-06 > 1e-06"),
    ],
)
def test_cpu_path_names_what_is_wrong_or_too_slow(row: dict, line: str | None) -> None:
    lines = load("cpu_path").failures([{"subject": "pooling", "shape": "[1]", "dtype": "float32", **row}])
    assert lines == ([] if line is None else [line])


def test_cpu_path_fails_where_a_limit_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("cpu_path")
    arguments = [*TINY_CPU, "--forward-rounds", "0"]
    monkeypatch.setattr(script, "failures", lambda rows: [])
    assert script.main(arguments) == 0
    monkeypatch.setattr(script, "failures", lambda rows: ["TOO SLOW"])
    assert script.main(arguments) == 1


def test_cpu_path_sees_a_wrong_maximum_and_a_wrong_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("cpu_path")
    feature_map = script.make_map("channels_last", (2, 5, 3), torch.float32)
    right = script.pooling.pool_statistics(feature_map)
    assert script.pooling_error(feature_map) <= 1e-6
    monkeypatch.setattr(script.pooling, "pool_statistics", lambda _: right._replace(maximum=right.maximum + 1))
    assert script.pooling_error(feature_map) == float("inf")
    monkeypatch.setattr(script.pooling, "pool_statistics", lambda _: right._replace(h=right.h * 1.01))
    assert script.pooling_error(feature_map) == pytest.approx(0.01, rel=1e-3)


def test_fitting_grows_with_the_samples_and_not_in_memory(tmp_path, monkeypatch):
    fit_scale = importlib.import_module("benchmarks.fit_scale")
    path = tmp_path / "rows.json"
    arguments = ["--sizes", "300,900", "--features", "16", "--classes", "5", "--anchors", "50", "--components", "5"]
    assert fit_scale.main([*arguments, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    fits = [row for row in document["rows"] if row["subject"].startswith("fit ")]
    expected = [(f"fit {name}", samples) for samples in (300, 900) for name in fit_scale.DETECTORS]
    assert [(row["subject"], row["samples"]) for row in fits] == expected
    assert [row["samples"] for row in document["rows"] if row["subject"].startswith("dual basis")] == [50]
    assert set(document["time_exponents"]) == {subject for subject, _ in expected}
    made = [{"subject": "fit opnp", "samples": n, "seconds": 3e-6 * n**1.5} for n in (10, 100, 1000)]
    assert fit_scale.exponents(made) == {"fit opnp": pytest.approx(1.5)}


def test_the_chosen_form_is_held_to_the_faster_one(tmp_path):
    crossover = importlib.import_module("benchmarks.form_crossover")
    rows = [{"p50_ms": 3.0, "chosen": True}, {"p50_ms": 2.0, "chosen": False}]
    assert crossover.regret(rows) == 1.5
    path = tmp_path / "rows.json"
    options = ["--classes", "3", "--features", "16", "--anchors", "40", "--components", "4", "--rounds", "2"]
    assert crossover.main([*options, "--json", str(path)]) in (0, 1)
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows} == {"dual", "explicit"}
    assert max(row["max_error"] for row in rows) < 1e-4
    assert sum(row["chosen"] for row in rows) == 1
