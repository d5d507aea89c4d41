"""The README's section on cost says what the result files say, and nothing else."""

from __future__ import annotations

import json

import pytest

from benchmarks import readme


def test_the_section_is_what_the_result_files_say():
    assert readme.main(["--check"]) == 0


def test_a_stale_section_is_told_and_written_anew(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "README.md"
    fresh = readme.README.read_text(encoding="utf-8")
    section = readme.render()
    monkeypatch.setattr(readme, "README", stale)
    monkeypatch.setattr(readme, "render", lambda: section)
    stale.write_text(fresh.replace("MiB", "GiB"), encoding="utf-8")
    assert readme.main(["--check"]) == 1
    assert "run python -m benchmarks.readme" in capsys.readouterr().out
    stale.write_text(fresh.replace(section, readme.BEGIN + "old" + readme.END), encoding="utf-8")
    assert readme.main([]) == 0
    assert stale.read_text(encoding="utf-8") == fresh
    with pytest.raises(ValueError, match="expected the lines"):
        readme.replaced("no marks", section)


def document_of(day: str, rows=(), **machine):
    facts = {"cores": 2, "cpu": "some", "torch": "2", "commit": "0123456789+", "date": f"{day}T00:00"}
    return {"machine": facts | machine, "rows": list(rows)}


def test_the_newest_file_of_a_kind_is_read(tmp_path):
    for name, document in (
        ("a", document_of("2026-01-10")),
        ("b", document_of("2026-01-02")),
        ("c", document_of("2026-02-01", gpu="H100")),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    path, document = readme.newest(False, tmp_path)
    assert path.name == "a.json"
    where = "[all rows](benchmarks/results/a.json)"
    assert readme.made(path, document["machine"]) == f"(2 cores of some, torch 2, 2026-01-10, commit 0123456; {where})"
    assert readme.newest(True, tmp_path)[0].name == "c.json"
    assert "| missed |" not in readme.render(tmp_path)
    assert "not measured" in readme.render(tmp_path).partition("### Speed on a GPU")[2]
    (tmp_path / "c.json").unlink()
    assert readme.newest(True, tmp_path) is None
    assert "Not measured yet" in readme.render(tmp_path)


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.0, 3, "0"),
        (0.0456, 2, "0.046"),
        (1992.3, 3, "1,990"),
        (6.1439, 3, "6.14"),
        (8.4e-7, 1, "8e-07"),
    ],
)
def test_figures_are_rounded_and_plain(value, digits, expected):
    assert readme.figure(value, digits) == expected


def row_of(provider, **fields):
    same = {"case": "test_methods[energy]", "subject": "energy", "workload": "R50", "shape": "N=4", "dtype": "float32"}
    times = {"median_ms": 1.234, "spread_ms": 0.08, "ratio": 1.0, "peak_mib": 0.5, "samples": 4}
    return {**same, **times, "provider": provider, **fields}


def test_cases_put_the_providers_side_by_side():
    missing = {name: value for name, value in row_of("oodeel").items() if name != "median_ms"}
    rows = [row_of("ood-engine"), row_of("pytorch-ood", samples=2), missing]
    columns = ["ood-engine", "pytorch-ood", "oodeel", "reference"]
    *_, line = readme.table(rows, columns, readme.time_and_memory, "energy")
    assert line == "| R50 N=4 float32 | 1.23 (0.5) | 1.23 (0.5) | – | – |"
    *_, line = readme.table(rows, columns[:1], readme.time, "energy", "msp")
    assert line == "| energy: R50 N=4 float32 | 1.23 ± 0.04 |"


def test_a_result_file_takes_the_place_of_that_of_its_machine(tmp_path):
    pytest.importorskip("matplotlib")
    results, source = tmp_path / "results", tmp_path / "rows.json"
    for day in ("2026-01-02", "2026-01-03"):
        source.write_text(json.dumps(document_of(day, [row_of("ood-engine"), row_of("plain products")])))
        readme.take(source, results)
    assert sorted(path.name for path in results.iterdir()) == ["some-2-cores-methods.png", "some-2-cores.json"]
    assert readme.newest(False, results)[1]["machine"]["date"].startswith("2026-01-03")
