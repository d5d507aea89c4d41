"""`ood-engine bench` with a suite of tiny plans."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from ood_engine.bench.cases import OURS, Case, Effort, Plan, Provider
from ood_engine.bench.runner import SLOW
from ood_engine.cli import bench as bench_module
from ood_engine.cli import main
from ood_kernels.workloads import Cost

SIZES = (500, 1000, 2000, 4000)
ONE_THREAD = ("--only", "head", "--threads", "1")
"""So that other programs on the machine of the tests disturb little."""


def build(size):
    values = torch.rand(size, dtype=torch.float64)

    def slowly():
        result = values
        for _ in range(12):
            result = result.sin()
        return result

    truth = slowly().double()
    providers = [
        Provider(OURS, slowly),
        Provider("reference", lambda: slowly() + 0),
        Provider("wrong", lambda: values - 1),
    ]
    return Case(providers, (truth,), Cost(12 * size, 200 * size), {"oodeel": "not installed"})


def fake_plans(effort):
    for subject in ("sines", "more sines"):
        for size in SIZES:
            yield Plan(subject, "tiny", {"N": size}, lambda size=size: build(size), torch.float64, sweeps=("N",))


@pytest.fixture(autouse=True)
def suite(monkeypatch):
    """The subject "head" is made of tiny plans, and measured for a moment."""
    monkeypatch.setitem(sys.modules, "ood_engine.bench.subjects.head", SimpleNamespace(plans=fake_plans))
    monkeypatch.setattr(
        bench_module, "effort_for", lambda is_quick, device: Effort("quick", 5, 0.004, 0.5, device), raising=True
    )
    monkeypatch.setattr(bench_module, "SUBJECTS", ("head",))


@pytest.fixture
def call(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "before"


@pytest.fixture
def measured(call, kept):
    """Folder of a run that is done."""
    if not kept.exists():
        assert call("--output", kept, *ONE_THREAD)[0] == 0
    return kept


def one_line(error):
    return error.startswith("ood-engine: ") and error.count("\n") == 1


def test_a_run_leaves_table_document_csv_and_pictures(call, tmp_path):
    code, shown, errors = call("--quick", "--output", tmp_path / "out", *ONE_THREAD)
    assert code == 0
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert document["complete"]
    assert len(document["rows"]) == 2 * len(SIZES) * 4
    assert {row["threads"] for row in document["rows"]} == {1}
    assert all(row["disturbed"] in (True, False) for row in document["rows"])
    assert len(document["growth"]) == 2 * 2
    with (tmp_path / "out" / "bench.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    assert (tmp_path / "out" / "roofline.png").exists()
    assert "× ood-engine" in shown
    assert "sines: how cost grows" in shown
    assert shown.count("left out: oodeel: not installed") == 1
    assert "refused: wrong in 4 × sines: WrongResultError" in shown
    assert errors.count("no peers.png: no cases with ood-engine and one of") == 1


def test_json_is_one_object(call, tmp_path):
    code, shown, _ = call("--json", "--output", tmp_path, *ONE_THREAD, "--minutes", "1e-9")
    assert code == 0
    document = json.loads(shown)
    assert document["complete"]
    assert str(tmp_path / "bench.csv") in document["files"]


def test_the_same_code_twice_is_within_noise(call, measured, tmp_path):
    code, shown, _ = call("--output", tmp_path / "after", *ONE_THREAD, "--compare", measured / "bench.json")
    assert code == 0
    assert "0 slower" in shown


def test_a_slowed_provider_is_caught(call, measured, tmp_path, monkeypatch):
    monkeypatch.setenv(SLOW, f"{OURS}:3")
    after = tmp_path / "after"
    code, shown, _ = call("--output", after, *ONE_THREAD, "--compare", measured / "bench.json")
    assert code == 1
    together = shown.partition("all rows of a provider together\n")[2].partition("row by row")[0]
    verdicts = {line.split("  ")[0]: line.strip() for line in together.splitlines()}
    assert verdicts[OURS].endswith("slower")
    assert verdicts["reference"].endswith("within noise")
    code, shown, _ = call("--compare", measured / "bench.json", "--with", after / "bench.json", "--json")
    assert code == 1
    compared = json.loads(shown)
    assert {row["provider"] for row in compared["rows"] if row["verdict"] == "slower"} <= {OURS}
    assert call("--compare", after / "bench.json", "--with", measured / "bench.json")[0] == 0


def test_an_interrupted_run_keeps_its_rows(call, tmp_path, monkeypatch):
    def interrupted(effort):
        yield from list(fake_plans(effort))[:2]

        def stop():
            raise KeyboardInterrupt

        yield Plan("sines", "tiny", {"N": 1}, stop)

    monkeypatch.setitem(sys.modules, "ood_engine.bench.subjects.head", SimpleNamespace(plans=interrupted))
    code, _, errors = call("--output", tmp_path, *ONE_THREAD)
    assert code == 130
    assert errors == f"ood-engine: stopped; the 8 rows measured so far are kept in {tmp_path / 'bench.json'}\n"
    document = json.loads((tmp_path / "bench.json").read_text())
    assert len(document["rows"]) == 8
    assert not document["complete"]
    assert call("--compare", tmp_path / "bench.json", "--with", tmp_path / "bench.json")[0] == 0


def test_what_there_was_no_time_for_is_named(call, tmp_path):
    code, shown, _ = call("--output", tmp_path, "--only", "head", "--minutes", "1e-9")
    assert code == 0
    assert "no time for 7 cases (--minutes): sines, tiny N=1000 float64; " in shown


def test_where_nothing_can_be_measured_the_reason_is_said(call, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no such thing")

    plans = SimpleNamespace(plans=lambda effort: iter([Plan("sines", "tiny", {"N": 1}, fail)]))
    monkeypatch.setitem(sys.modules, "ood_engine.bench.subjects.head", plans)
    code, _, errors = call("--output", tmp_path, "--only", "head")
    assert code == 2
    assert one_line(errors)
    assert "nothing could be measured" in errors
    assert "no such thing" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "heads"], "'heads' is not known: expected some of activation, head,"),
        (["--minutes", "0"], "--minutes"),
        (["--threads", "0"], "--threads"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--device", "meta"], "only cpu and cuda are measured"),
        (["--with", "new.json"], "give --compare OLD.json as well"),
        (["--compare", "nowhere.json"], "nowhere.json: expected the bench.json of an earlier run"),
        (["--compare", __file__], "got no JSON"),
        (["--output", __file__], "cannot be made a folder"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_arguments_are_one_line(call, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown, errors = call(*arguments)
    assert code == 2
    assert shown == ""
    assert one_line(errors)
    assert said in errors
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_replace_what_it_is_compared_to(call, measured):
    before = (measured / "bench.json").read_bytes()
    code, _, errors = call("--output", measured, "--only", "head", "--compare", measured / "bench.json")
    assert code == 2
    assert one_line(errors)
    assert "give another --output" in errors
    assert (measured / "bench.json").read_bytes() == before


def test_a_wrong_slow_variable_is_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv(SLOW, "nonsense")
    code, _, errors = call("--output", tmp_path, "--only", "head")
    assert code == 2
    assert one_line(errors)
    assert SLOW in errors


def test_threads_are_those_asked_for_and_then_those_before(call, tmp_path):
    before = torch.get_num_threads()
    assert call("--output", tmp_path, *ONE_THREAD, "--minutes", "1e-9")[0] == 0
    assert torch.get_num_threads() == before
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["threads"] == 1
