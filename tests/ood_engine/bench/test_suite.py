from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ood_engine.bench.cases import Case, Plan
from ood_engine.bench.rows import read_document
from ood_engine.bench.suite import DEFAULT_MINUTES, SUBJECTS, Recorder, Schedule, effort_for, environment

EFFORT = effort_for(True, torch.device("cpu"))


class Watch:
    """Time that passes only where a test says so."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def schedule(monkeypatch):
    """schedule({subject: seconds of each plan}, seconds) → (schedule, the names of what it ran)."""

    def make(subjects, seconds):
        watch = Watch()
        for subject, durations in subjects.items():
            plans = [
                Plan(f"{subject}{index}", "", {}, lambda: Case([]), seconds=duration)
                for index, duration in enumerate(durations)
            ]
            module = SimpleNamespace(plans=lambda effort, plans=plans: iter(plans))
            monkeypatch.setitem(sys.modules, f"ood_engine.bench.subjects.{subject}", module)
        made = Schedule(tuple(subjects), EFFORT, seconds, watch)
        names = []
        for plan in made:
            names.append(plan.subject)
            watch.now += plan.seconds
        return made, names

    return make


def test_all_plans_run_in_order_where_there_is_time(schedule):
    made, names = schedule({"a": [1, 1], "b": [1]}, 100)
    assert names == ["a0", "a1", "b0"]
    assert made.left_out == []
    assert made.total == 3


def test_every_subject_has_a_fair_share(schedule):
    made, names = schedule({"a": [1] * 50, "b": [1] * 50, "c": [1] * 50}, 30)
    assert [sum(name.startswith(subject) for name in names) for subject in "abc"] == [10, 10, 10]
    assert len(made.left_out) == 120
    assert str(made.left_out[0]).startswith("a10")


def test_time_that_is_left_goes_round(schedule):
    made, names = schedule({"a": [1] * 50, "b": [1] * 2, "c": [1] * 50}, 30)
    assert names[10:12] == ["b0", "b1"]
    assert len(names) == 30
    assert [plan.subject for plan in made.left_out][:1] == ["a12"] or len(made.left_out) == 72


def test_a_case_that_would_outlast_the_time_is_not_started(schedule):
    _, names = schedule({"a": [6] * 5, "b": [6] * 5}, 25)
    assert names == ["a0", "a1", "b0", "b1"]


def test_a_case_is_started_whatever_the_time(schedule):
    made, names = schedule({"a": [1, 1], "b": [1]}, 1e-9)
    assert names == ["a0"]
    assert len(made.left_out) == 2


def test_a_subject_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ood_engine.bench.subjects.head", None)
    made = Schedule(("head",), EFFORT, 1)
    assert "head" in made.broken
    assert list(made) == []


def test_every_subject_has_plans_of_both_efforts():
    for is_quick in (True, False):
        effort = effort_for(is_quick, torch.device("cpu"))
        made = Schedule(SUBJECTS, effort, 60)
        assert made.broken == {}
        assert {len(queue) > 0 for queue in made._queues.values()} == {True}
        assert effort.name in DEFAULT_MINUTES


def test_the_document_is_on_disk_after_every_case(tmp_path, row):
    path = tmp_path / "bench.json"
    recorder = Recorder(path, environment(torch.device("cpu")), EFFORT)
    plan = Plan("score", "R50", {"N": 1}, lambda: Case([]))
    for samples in (1, 10, 100):
        made = row(p50_ms=1e-3 * samples**2, N=samples, sweeps=["N"])
        recorder.keep(plan, [made], {"oodeel": "not installed"})
        document = read_document(path)
        assert document["rows"][-1] == made | {"disturbed": document["rows"][-1]["disturbed"]}
        assert not document["complete"]
    recorder.finish([plan], {"files": "broken"})
    document = read_document(path)
    assert document["complete"]
    assert document["left_out"] == ["score, R50 N=1 float32"]
    assert [entry["provider"] for entry in document["missing"]] == ["oodeel", "files"]
    assert [round(one["time_exponent"], 6) for one in document["growth"]] == [2]
    assert document["machine"]["effort"] == "quick"
    assert document["machine"]["device"] == "cpu"


def test_triton_is_not_imported_to_ask_its_version():
    # What comes first would settle for the whole process whether kernels are interpreted.
    code = (
        "import sys, torch; from ood_engine.bench.suite import environment; before = 'triton' in sys.modules;"
        " environment(torch.device('cpu')); assert ('triton' in sys.modules) == before"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
