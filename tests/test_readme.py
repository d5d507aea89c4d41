"""The README's section on cost says what the result files say, and nothing else."""

from __future__ import annotations

import importlib
import json

import pytest


@pytest.fixture(scope="module")
def readme():
    return importlib.import_module("benchmarks.readme")


def test_the_section_is_what_the_result_files_say(readme):
    assert readme.main(["--check"]) == 0


def test_a_stale_section_is_told_and_written_anew(readme, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "README.md"
    fresh = readme.README.read_text(encoding="utf-8")
    section = readme.render()
    monkeypatch.setattr(readme, "README", stale)
    monkeypatch.setattr(readme, "render", lambda: section)
    stale.write_text(fresh.replace("MiB", "GiB"), encoding="utf-8")
    assert readme.main(["--check"]) == 1
    assert "run python benchmarks/readme.py" in capsys.readouterr().out
    stale.write_text(fresh.replace(section, readme.BEGIN + "old" + readme.END), encoding="utf-8")
    assert readme.main([]) == 0
    assert stale.read_text(encoding="utf-8") == fresh
    with pytest.raises(ValueError, match="expected the lines"):
        readme.replaced("no marks", section)


def test_the_newest_file_is_read(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    machine = {"cores": 2, "cpu": "some", "torch": "2", "commit": "0123456789+"}
    for day in ("2026-01-02", "2026-01-10", "2025-12-31"):
        document = {"machine": machine | {"date": f"{day}T00:00"}, "rows": [{"subject": "a"}, {"subject": "b"}]}
        (tmp_path / f"speed-{day}.json").write_text(json.dumps(document))
    found = readme.newest("speed", tmp_path)
    assert found.path == "speed-2026-01-10.json"
    assert found.made == "2 cores of some, torch 2, 2026-01-10, commit 0123456"
    assert found.one(subject="b") == {"subject": "b"}
    with pytest.raises(LookupError, match="0 rows"):
        found.one(subject="c")
    assert readme.newest("memory", tmp_path) is None


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (None, 3, "–"),
        (0.0, 3, "0"),
        (0.0456, 2, "0.046"),
        (1992.3, 3, "1,990"),
        (6.1439, 3, "6.14"),
        (8.4e-7, 1, "8e-07"),
    ],
)
def test_figures_are_rounded_and_plain(readme, value, digits, expected):
    assert readme.figure(value, digits) == expected


def bench_row(**fields):
    same = {
        "subject": "energy",
        "workload": "R50",
        "shape": "N=4",
        "dtype": "float32",
        "memory_format": "",
        "cache": "warm",
    }
    times = {
        "p5_ms": 1.04,
        "p50_ms": 1.234,
        "p95_ms": 2.0,
        "peak_extra_mib": 0.5,
        "flops": 10,
        "samples_run": 4,
        "N": 4,
    }
    return {**same, **times, **fields}


def test_cases_put_the_providers_side_by_side(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    rows = [
        bench_row(provider="ood-engine"),
        bench_row(provider="pytorch-ood", samples_run=2),
        bench_row(provider="oodeel", p50_ms=None),
        bench_row(provider="ood-engine", shape="N=8", flops=20, cache="cold"),
    ]
    results = readme.Results(tmp_path / "bench-cpu-1.json", {"machine": {}, "rows": rows})
    small, large = results.cases(subject="energy")
    assert small.title_with_subject == "energy: R50, N=4, float32"
    assert large.title == "R50, N=8, float32, cold"
    assert small.time("ood-engine") == "1.23 (1.04–2)"
    assert small.figures("ood-engine") == "1.23 (0.5)"
    assert small.figures("pytorch-ood") == "1.23 for 2 samples (0.5)"
    assert [small.time("oodeel"), small.figures("oodeel"), small.time("reference"), small.memory("reference")] == [
        "–"
    ] * 4
    assert small.memory("ood-engine") == "0.5 MiB"
    assert [case.title for case in results.largest_cases("energy", "msp")] == [large.title]
    assert results.pictures == "bench-cpu-1"
