"""What the GPU benchmarks do without a GPU: arithmetic, rows, verdicts, results files, pictures, and the order of the stages."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ood_kernels as ok
from ood_engine.bench.resnet50 import ResNet50
from ood_kernels.workloads import WORKLOADS, Cost

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = frozenset({"bases", "precisions", "autograd", "compile"})
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


class FakeInstrument:
    """A device on which a run takes half a millisecond, and which breaks when it is told to."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self.cache_bytes = cache_bytes
        self.is_broken = False

    def time_ms(self, runs) -> float:
        for run in runs:
            run()
        return 0.5 * len(runs)

    def capture(self, runs):
        results = [run() for run in runs]
        return (lambda: [run() for run in runs]), results[-1]

    def peak_bytes(self, run) -> int:
        return 3 * 2**20 + sum(
            tensor.numel() * tensor.element_size() for tensor in load("gpu_timing").tensors_of(run())
        )

    def synchronize(self) -> None:
        if self.is_broken:
            raise RuntimeError("an illegal memory access was encountered")


def tiny(
    samples: int = 3, dtype: torch.dtype = torch.float32, layout: str = "NCHW", extras=frozenset(), precisions=("ieee",)
):
    return load("gpu_problems").Case(WORKLOADS["tiny"], samples, dtype, layout, tuple(precisions), frozenset(extras))


def problem_of(case):
    torch.manual_seed(0)
    return load("gpu_problems").Problem(case, CPU, 0)


def subject(**changes):
    timing = load("gpu_timing")
    fields = {"subject": "sum", "provider": "ours", "call": lambda _: torch.ones(2), "cost": Cost(4, 8)}
    return timing.Subject(**fields | {"truth": (torch.ones(2).double(),), "tolerance": 1e-3} | changes)


def measure_all(cases, results, instrument, subjects, seconds: float = 60, rounds: int = 2) -> bool:
    end = time.monotonic() + seconds
    return load("gpu_kernels").measure_all(cases, results, instrument, CPU, end, subjects, rounds, least_ms=1)


MACHINE = {"gpu": "Some GPU", "driver": "1.2", "torch": "2.11", "triton": "3.6", "commit": "abc", "python": "3.12"}


def results_at(path: Path, resume: bool = False, **changes):
    return load("gpu_results").Results(path, MACHINE | changes, resume)


# Arithmetic


def test_the_roofline_of_score_sums_the_larger_side_of_each_step() -> None:
    roofline = load("gpu_roofline")
    costs = {"pool": Cost(10, 4000), "head": Cost(1000, 100), "projection": Cost(600, 2000)}
    shapes = {"head": ((5, 10, 10),), "projection": ((1, 10, 10), (1, 20, 5))}
    product_ms = {(5, 10, 10): 2.0, (1, 10, 10): 1.0, (1, 20, 5): 3.0}
    # The head runs at 1000 flops in 2 ms, the projection at 200 + 200 flops in 4 ms; the memory moves 1000 bytes a ms.
    steps = roofline.score_roofline_ms(costs, shapes, 1e6, product_ms)
    assert steps == pytest.approx({"pool": 4.0, "head": 2.0, "projection": 6.0})
    slower_memory = roofline.score_roofline_ms(costs, shapes, 1e5, product_ms)
    assert slower_memory == pytest.approx({"pool": 40.0, "head": 2.0, "projection": 20.0})
    with pytest.raises(KeyError):
        roofline.score_roofline_ms(costs, shapes, 1e6, {(5, 10, 10): 2.0})


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_products_make_up_the_flops_of_their_steps(workload) -> None:
    shapes = load("gpu_roofline").products(workload, 7)
    flops = {step: sum(2 * m * n * k for m, n, k in found) for step, found in shapes.items()}
    assert flops["projection"] == workload.projection(7, 2).flops
    assert 2 * flops["head"] == workload.head(7, 2).flops


def test_errors_are_relative_to_each_tensor_and_keep_nan() -> None:
    errors = load("gpu_timing").errors
    truth = (torch.tensor([100.0, 0.0]).double(), torch.tensor([1.0, 0.0]).double())
    largest, root = errors((torch.tensor([100.0, 1.0]), torch.tensor([1.0, 0.3])), truth)
    assert largest == pytest.approx(0.3)
    assert root == pytest.approx((0.3**2 / 2) ** 0.5)
    assert errors((torch.tensor([100.0, 1.0]), torch.tensor([1.0, torch.nan])), truth)[0] != 0.3
    assert not errors((torch.tensor([100.0, 1.0]), torch.tensor([1.0, torch.nan])), truth)[0] <= 1
    with pytest.raises(ValueError, match=r"shapes \[\[1\]\], expected \[\[2\]\]"):
        errors(torch.ones(1), (torch.ones(2),))


# Measuring


def test_every_case_of_the_issue_is_planned_once_and_the_headline_comes_first() -> None:
    cases = list(load("gpu_problems").all_cases())
    names = [str(case) for case in cases]
    assert len(set(names)) == len(names) == 3 * 5 * (3 * 2 + 1)
    assert names[:3] == [
        f"R50 N={n} bfloat16 {layout}" for n, layout in ((256, "channels_last"), (256, "NCHW"), (1, "channels_last"))
    ]
    assert cases[0].extras == {"compile", "autograd", "forward", "bases"}
    assert any("precisions" in case.extras and case.dtype == torch.float32 for case in cases)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "tokens"])
def test_problem_stores_the_map_as_the_layout_says(layout: str) -> None:
    problem = problem_of(tiny(layout=layout, dtype=torch.bfloat16))
    feature_map = problem.maps[1]
    assert feature_map.dtype == torch.bfloat16
    if layout == "tokens":
        assert feature_map.shape == (3, 9, 10)
        assert feature_map.is_contiguous()
    else:
        assert feature_map.shape == (3, 10, 3, 3)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert feature_map.is_contiguous(memory_format=memory_format)
    assert torch.equal(problem.maps[0], feature_map)
    assert problem.maps[0].data_ptr() != feature_map.data_ptr()
    assert float(problem.dual.coefficients.float().sum(0).abs().max()) < 0.01


def test_copies_fill_twice_the_cache() -> None:
    problem = problem_of(tiny())
    problem.cache_bytes = 100_000
    assert len(problem.copies(torch.empty(10_000))) == 6
    assert len(problem.copies((torch.empty(10_000), None, torch.empty(10_000)))) == 4
    assert len(problem.copies(torch.empty(1))) == 512


def test_explicit_basis_is_the_dual_one() -> None:
    problem = problem_of(tiny())
    dual, explicit = problem.projection_truth(problem.dual)[0], problem.projection_truth(problem.explicit())[0]
    torch.testing.assert_close(dual, explicit, rtol=1e-5, atol=1e-6)


def test_calls_take_the_copies_in_turn() -> None:
    timing = load("gpu_timing")
    seen: list[int] = []
    one = subject(call=lambda i: seen.append(i) or torch.ones(2), cost=Cost(0, 100))
    ready = timing.prepare(one, FakeInstrument(cache_bytes=150), least_ms=2)
    assert len(ready.runs) == 1 + 3  # 300 bytes to flush, 100 a call, and one more
    assert (ready.turns, ready.calls) == (4, 1)
    seen.clear()
    timing.interleave({0: ready}, FakeInstrument(), rounds=1)
    assert seen == [0, 1, 2, 3] * 2
    graph = timing.prepare(one._replace(mode="graph"), FakeInstrument(cache_bytes=150), least_ms=3)
    assert (len(graph.runs), graph.turns, graph.calls) == (1, 1, 6)
    single = timing.prepare(one._replace(mode="one-call graphs"), FakeInstrument(cache_bytes=150), least_ms=3)
    assert (len(single.runs), single.turns, single.calls) == (4, 6, 1)


def test_subjects_are_timed_in_turns_and_a_call_is_what_counts() -> None:
    timing = load("gpu_timing")
    order: list[str] = []
    prepared = {
        i: timing.Prepared([lambda name=name: order.append(name)], calls, 1, {})
        for i, (name, calls) in enumerate([("a", 1), ("b", 5)])
    }
    times = timing.interleave(prepared, FakeInstrument(), rounds=2)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert times == {0: [0.5, 0.5], 1: [0.1, 0.1]}


def test_memory_is_what_a_call_takes_beyond_its_result() -> None:
    ready = load("gpu_timing").prepare(subject(), FakeInstrument(), 1)
    assert ready.fields == {"tolerance": 1e-3, "max_error": 0, "rms_error": 0, "peak_extra_mib": 3}


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "ieee"), (torch.bfloat16, "bf16")])
def test_all_subjects_of_a_tiny_case_are_right_on_the_cpu(tmp_path, monkeypatch, dtype, precision) -> None:
    subjects = load("gpu_subjects")
    monkeypatch.setattr(subjects, "_compiled", lambda function: function)
    case = tiny(1, dtype, "channels_last", EXTRAS, [precision])
    results = results_at(tmp_path / "r.json")
    with torch.no_grad():
        assert measure_all(
            [case], results, FakeInstrument(), lambda problem: subjects.subjects_of(problem, "reference")
        )
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["finished"] == [str(case)]
    rows = content["rows"]
    fields = load("gpu_results").ROW_FIELDS
    assert all(tuple(row) == fields for row in rows)
    assert all(row["p50_ms"] == 0.5 or row["provider"].endswith("graph") for row in rows)
    checked = [row for row in rows if row["subject"] not in ("matmul", "copy of the map", "copy of half the map")]
    assert all(row["max_error"] <= row["tolerance"] for row in checked)
    names = {(row["subject"], row["provider"]) for row in rows}
    for kind in ("pool_nap", "masked_energy", "project dual", "project explicit", "project factored", "score"):
        assert {(kind, "triton"), (kind, "triton, CUDA graph"), (kind, "reference")} <= names
    assert ("score", "triton, a CUDA graph a call") in names
    assert ("project", "autograd, a sample at a time") in names
    assert {row["precision"] for row in rows if row["subject"] == "project dual"} == {*ok.PRECISIONS, None}
    score = next(row for row in rows if (row["subject"], row["provider"]) == ("score", "triton"))
    assert score["times_roofline"] == pytest.approx(score["p50_ms"] / score["roofline_ms"])
    assert score["peak_extra_mib"] == 3
    copied = next(row for row in rows if row["subject"] == "copy of the map")["gb_per_s"] * 1e9
    parts = [
        row for row in rows if row["provider"] == "triton" and row["precision"] == precision and row["roofline_ms"]
    ]
    steps = {row["subject"]: row["roofline_ms"] for row in parts}
    pool_ms = 1000 * case.workload.pool(1, dtype.itemsize).bytes / copied
    assert steps.keys() == {"masked_energy", "project dual", "score"}
    assert steps["score"] == pytest.approx(pool_ms + steps["masked_energy"] + steps["project dual"])
    pool = next(row for row in rows if (row["subject"], row["provider"]) == ("pool_nap", "triton"))
    copy = next(row for row in rows if row["subject"] == "copy of the map")
    assert pool["share_of_copy"] == pytest.approx(pool["gb_per_s"] / copy["gb_per_s"])


def test_what_is_wrong_or_fails_is_refused_and_the_rest_measured(tmp_path, capsys) -> None:
    def fail(_):
        raise ValueError("no such tile\nand more")

    subjects = [
        subject(),
        subject(provider="wrong", call=lambda _: torch.tensor([1.0, 1.01])),
        subject(provider="nan", call=lambda _: torch.tensor([1.0, torch.nan])),
        subject(provider="failing", call=fail),
        subject(provider="wrong in the graph", mode="graph", call=iter_of(1, 1, 1, 1, 1, 1, 2)),
        subject(provider="last"),
    ]
    results = results_at(tmp_path / "r.json")
    assert not measure_all([tiny()], results, FakeInstrument(), lambda _: subjects)
    errors = {row["provider"]: row["error"] for row in results.rows}
    assert errors["ours"] is errors["last"] is None
    assert errors["wrong"] == "WrongResultError: wrong: largest error 1.00e-02, allowed 1e-03"
    assert errors["nan"] == "WrongResultError: wrong: largest error nan, allowed 1e-03"
    assert errors["failing"] == "ValueError: no such tile"
    assert "wrong: largest error 1.00e+00" in errors["wrong in the graph"]
    assert all(row["p50_ms"] is None for row in results.rows if row["error"])
    assert "refused sum, failing" in capsys.readouterr().out


def iter_of(*values: float):
    """A call that returns these values one after the other, and the last one for ever."""
    left = itertools.chain(values, itertools.repeat(values[-1]))
    return lambda _: torch.full((2,), float(next(left)))


# The results file


def test_a_broken_device_is_left_for_a_new_process_that_goes_without_the_culprit(tmp_path) -> None:
    instrument, path = FakeInstrument(), tmp_path / "r.json"

    def harmful(_):
        instrument.is_broken = True
        return torch.ones(2)

    subjects = [subject(), subject(provider="harmful", call=harmful), subject(provider="after")]
    cases = [tiny(1), tiny(2)]
    for case in cases:
        with pytest.raises(load("gpu_kernels").BrokenDeviceError, match="illegal memory access"):
            measure_all(cases, results_at(path, resume=True), instrument, lambda _: subjects)
        assert json.loads(path.read_text())["rows"][-1]["case"] == str(case)
        instrument.is_broken = False
    results = results_at(path, resume=True)
    assert not measure_all(cases, results, instrument, lambda _: subjects)
    assert results.finished == [str(case) for case in cases]
    for case in cases:
        rows = {row["provider"]: row for row in results.rows if row["case"] == str(case)}
        assert "illegal memory access" in rows["harmful"]["error"]
        assert rows["ours"]["p50_ms"] == rows["after"]["p50_ms"] == 0.5


def test_what_is_finished_is_on_disk_when_the_run_is_cut_off_and_is_not_measured_again(tmp_path) -> None:
    path, measured = tmp_path / "r.json", []

    def subjects(problem):
        measured.append(str(problem.case))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [subject()]

    cases = [tiny(1), tiny(2), tiny(3)]
    with pytest.raises(KeyboardInterrupt):
        measure_all(cases, results_at(path), FakeInstrument(), subjects)
    content = json.loads(path.read_text())
    assert [row["case"] for row in content["rows"]] == content["finished"] == [str(cases[0])]
    assert content["left_out"] == [str(case) for case in cases[1:]]
    assert measure_all(cases, results_at(path, resume=True), FakeInstrument(), subjects)
    assert measured == [str(cases[index]) for index in (0, 1, 1, 2)]
    content = json.loads(path.read_text())
    assert [row["case"] for row in content["rows"]] == [str(case) for case in cases]
    assert content["left_out"] == []
    assert list(tmp_path.iterdir()) == [path]


def test_without_time_nothing_is_measured_and_all_is_left_out(tmp_path) -> None:
    results = results_at(tmp_path / "r.json")
    measure_all([tiny()], results, FakeInstrument(), lambda _: [subject()], seconds=-1)
    assert (results.rows, results.left_out) == ([], [str(tiny())])


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "triton", "commit"])
def test_rows_of_another_machine_or_commit_are_not_mixed_in(tmp_path, name: str) -> None:
    path = tmp_path / "r.json"
    results_at(path).write()
    assert results_at(path, resume=True, python="3.13").rows == []
    with pytest.raises(
        load("gpu_results").OtherRunError, match=f"r.json is of another run .{name} .* there, other here"
    ):
        results_at(path, resume=True, **{name: "other"})
    assert results_at(path, **{name: "other"}).rows == []


def test_new_rows_replace_old_ones_of_the_same_measurement(tmp_path) -> None:
    make_row, results = load("gpu_results").make_row, results_at(tmp_path / "r.json")
    known = {"case": "a", "subject": "matmul", "provider": "library", "precision": "bf16"}
    results.add([make_row(**known, product=[1, 2, 3], p50_ms=1.0), make_row(**known, product=[1, 2, 4], p50_ms=2.0)])
    results.add([make_row(**known, product=[1, 2, 3], p50_ms=3.0)])
    assert sorted(row["p50_ms"] for row in results.rows) == [2.0, 3.0]
    with pytest.raises(TypeError, match="no such fields in a row: p50"):
        make_row(p50=1)


# Verdicts and pictures


def rows_of_a_run() -> list[dict]:
    """A made-up run: R50 in bf16, both layouts; channels_last does well, NCHW does not."""
    make_row, rows = load("gpu_results").make_row, []

    def add(samples: int, layout: str, subject: str, provider: str, p50: float, **fields) -> None:
        known = {"workload": "R50", "samples": samples, "dtype": "bfloat16", "layout": layout, "p50_ms": p50}
        case = f"R50 N={samples} bfloat16 {layout}"
        rows.append(
            make_row(case=case, subject=subject, provider=provider, ms_per_sample=p50 / samples, **known, **fields)
        )

    for layout, slow in (("channels_last", 1.0), ("NCHW", 1.5)):
        for samples in (1, 8, 64, 256):
            time_ms = (0.02 + samples * 0.0005) * slow
            ratio = {"precision": "bf16", "roofline_ms": time_ms / slow / 1.2, "times_roofline": 1.2 * slow}
            add(samples, layout, "pool_nap", "triton, CUDA graph", 0.02, share_of_copy=0.95 / slow, gb_per_s=3000.0)
            add(samples, layout, "score", "triton", 1.3 * time_ms, peak_extra_mib=40.0 * slow, **ratio)
            add(samples, layout, "score", "triton, CUDA graph", time_ms, **ratio)
            add(samples, layout, "score", "reference", 12 * 1.3 * time_ms / slow)
        add(256, layout, "score", "torch.compile", 0.3)
        add(256, layout, "score", "torch.compile, CUDA graph", 0.25)
    add(256, "channels_last", "ResNet-50 forward", "eager", 20.0)
    add(256, "channels_last", "ResNet-50 forward", "eager, CUDA graph", 10.0)
    add(4, "channels_last", "project", "autograd, a sample at a time", 8.0)
    rows[-1] |= {"case": "R50 N=256 bfloat16 channels_last", "samples": 256, "ms_per_sample": 2.0}
    add(1, "channels_last", "score", "triton, a CUDA graph a call", 0.0251, precision="bf16")
    for precision, error in zip(ok.PRECISIONS, (1e-6, 2e-6, 1e-4, 1e-3, 2e-3), strict=True):
        add(
            256,
            "NCHW",
            "project dual",
            "triton, CUDA graph",
            0.1,
            precision=precision,
            max_error=error,
            rms_error=error / 3,
        )
        rows[-1]["dtype"] = "float32"
    return rows


def verdicts_of(rows: list[dict]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for verdict in load("gpu_roofline").evaluate(rows):
        found.setdefault(verdict.target, []).append((verdict.figure, verdict.verdict))
    return found


def test_every_target_is_told_met_or_missed() -> None:
    verdicts = verdicts_of(rows_of_a_run())
    assert list(verdicts.values()) == [
        [("95.0%", "met"), ("63.3%", "missed")],
        [("1.20 ×", "met"), ("1.80 ×", "missed")],
        [("12.0 ×", "met"), ("8.0 ×", "missed")],
        [("1.7 ×", "met"), ("1.1 ×", "missed")],
        [("2,661 ×, autograd's loop extrapolated", "met")],
        [("1.48%", "missed")],
        [("25.1 µs", "met")],
        [("60.0 MiB at worst, in score", "met")],
    ]
    assert len(verdicts) == 8


def test_boundaries_count_as_met_and_a_near_roofline_leaves_no_room() -> None:
    rows = rows_of_a_run()
    for row in rows:
        if row["subject"] == "score" and row["layout"] == "NCHW" and row["provider"].startswith("triton"):
            row["roofline_ms"] = row["p50_ms"] / 1.25
            row["times_roofline"] = 1.25
        if row["subject"] == "pool_nap":
            row["share_of_copy"] = 0.9
        if row["provider"] == "triton" and row["layout"] == "NCHW":
            row["peak_extra_mib"] = 64.0
    verdicts = list(verdicts_of(rows).values())
    assert verdicts[0] == [("90.0%", "met")] * 2
    assert verdicts[1][1] == ("1.25 ×", "met")
    assert verdicts[2][1] == ("8.0 ×", "missed")  # 10 × would still be slower than the roofline
    assert verdicts[3][1] == ("1.1 ×; 80% of the roofline", "no room")
    assert verdicts[7] == [("64.0 MiB at worst, in score", "met")]


def test_what_was_not_measured_is_told_so_and_refused_rows_do_not_count() -> None:
    refused = [row | {"p50_ms": None, "error": "wrong"} for row in rows_of_a_run()]
    for rows in ([], refused):
        assert all(found == [("", "not measured")] for found in verdicts_of(rows).values())


def written_run(tmp_path: Path) -> Path:
    results = results_at(tmp_path / "gpu.json")
    results.left_out = ["R50 N=1024 float32 NCHW"]
    results.add(
        [*rows_of_a_run(), load("gpu_results").make_row(case="x", subject="score", provider="triton", error="wrong: 1")]
    )
    return results.path


def test_the_report_writes_verdicts_stages_and_pictures(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="without it the report has no pictures")
    path, stages = written_run(tmp_path), tmp_path / "stages"
    stages.write_text("tests\t80\t160\t1\ttest files: 3 passed, 1 failed\ntuning\t90\t100\t0\tdone\n")
    assert load("gpu_report").main([str(path), "--stages", str(stages)]) == 0
    content = json.loads(path.read_text())
    assert content["stages"][0] == {
        "name": "tests",
        "seconds": 80,
        "limit_seconds": 160,
        "exit_code": 1,
        "note": "test files: 3 passed, 1 failed",
    }
    assert {verdict["verdict"] for verdict in content["targets"]} == {"met", "missed"}
    assert len(content["rows"]) == len(rows_of_a_run()) + 1
    for name in ("bandwidth", "latency", "roofline"):
        assert (tmp_path / f"gpu-{name}.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "REFUSED x: score, triton: wrong: 1" in output
    assert "no time was left for 1 cases, the first of them R50 N=1024 float32 NCHW" in output
    assert "tf32x3" in output
    assert "25.1 µs" in output


def test_the_report_does_without_matplotlib_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = written_run(tmp_path)
    assert load("gpu_report").main([str(path)]) == 0
    assert "SKIPPED the pictures: matplotlib is not installed" in capsys.readouterr().out
    assert json.loads(path.read_text())["targets"]
    assert load("gpu_report").main([str(tmp_path / "none.json")]) == 1


# The test stage


@pytest.fixture
def suite(tmp_path):
    contents = {
        "good": "def test_it(): assert True",
        "bad": "def test_it(): assert False",
        "lacking": "import a_package_that_nobody_has\ndef test_it(): pass",
        "slow": "import time\ndef test_it(): time.sleep(20)",
    }
    for name, content in contents.items():
        (tmp_path / f"test_{name}.py").write_text(content)
    return lambda *names: [str(tmp_path / f"test_{name}.py") for name in names]


def test_the_tests_tell_failed_from_lacking_and_unfinished(suite, tmp_path, capsys) -> None:
    log = tmp_path / "log"
    tests = load("gpu_tests")
    assert tests.main([*suite("good", "bad", "lacking"), "--log", str(log), "--minutes", "1", "--jobs", "3"]) == 1
    output = capsys.readouterr().out
    verdicts = re.findall(r"^(\w+) \S+/test_(\w+)\.py in", output, re.MULTILINE)
    assert sorted(verdicts) == [("FAILED", "bad"), ("SKIPPED", "lacking"), ("passed", "good")]
    assert "test files: " in output.splitlines()[-1]
    assert "a_package_that_nobody_has is not installed" in output
    assert "assert False" in log.read_text()
    assert tests.main([*suite("good", "lacking"), "--log", str(log), "--minutes", "1"]) == 0
    assert tests.main([*suite("slow"), "--log", str(log), "--minutes", "0.03"]) == 1
    assert "NOT FINISHED" in capsys.readouterr().out


def test_the_suite_is_every_test_file_and_kernels_come_first() -> None:
    files = load("gpu_tests").suite()
    assert set(files) == set((ROOT / "tests").rglob("test_*.py"))
    assert "triton_kernels" in files[0].parts
    assert "ood_kernels" not in files[-1].parts


# The script


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OOD_BENCH") and name != "OUT"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60)


def test_a_dry_run_lists_the_stages_within_nine_minutes() -> None:
    done = run_script("--dry-run", OUT="elsewhere")
    assert done.returncode == 0
    *stages, together = done.stdout.splitlines()
    assert [line.split()[0] for line in stages] == ["tests", "tuning", "benchmarks", "report"]
    seconds = [int(line.split("at most")[1].split()[0]) for line in stages]
    assert sum(seconds) < 540
    assert together == f"together at most {sum(seconds)} s; what comes out goes to elsewhere"
    assert "--resume" not in done.stdout
    assert "--resume" in run_script("--dry-run", "--resume", "benchmarks").stdout
    assert not (ROOT / "elsewhere").exists()


def test_without_a_gpu_there_is_one_line_and_exit_code_2(tmp_path) -> None:
    done = run_script(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", OUT=str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.sh: nothing to measure on: torch finds no GPU\n"
    assert not (tmp_path / "out").exists()
    done = run_script(PYTHON="/no/such/python")
    assert (done.returncode, done.stderr) == (2, "gpu.sh: nothing to measure on: /no/such/python cannot import torch\n")


def test_a_word_it_does_not_know_is_refused() -> None:
    done = run_script("--quick")
    assert done.returncode == 64
    assert done.stderr.startswith("gpu.sh: unknown argument --quick; usage: ")


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that has a GPU, notes what it is asked to run, and does with it what a line of shell says."""

    def make(body: str) -> str:
        path = tmp_path / "python"
        script = f'#!/bin/bash\n[ "$1" = -c ] && exit 0\necho "$*|$PYTHONPATH|$OOD_BENCH_COMMIT" >>{tmp_path}/calls\n{body}\n'
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_a_failed_stage_stops_none_and_shows_in_the_exit_code(fake_python, tmp_path) -> None:
    python, out = fake_python('echo "said by $1"; case $1 in *gpu_tests.py) exit 7;; esac'), tmp_path / "out"
    done = run_script(PYTHON=python, OUT=str(out), OOD_BENCH_SITE="/carried", PYTHONPATH="/own", OOD_BENCH_COMMIT="abc")
    assert done.returncode == 1
    assert "== tests: 0 s, FAILED: exit code 7" in done.stdout
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0].split()[0] for call in calls] == [
        "benchmarks/gpu_tests.py",
        "-m",
        "benchmarks/gpu_kernels.py",
        "benchmarks/gpu_report.py",
    ]
    assert all(call[1:] == ["kernels:.:/carried:/own", "abc"] for call in calls)
    assert "said by benchmarks/gpu_tests.py" in (out / "gpu.log").read_text()
    assert run_script("tuning", PYTHON=python, OUT=str(out)).returncode == 0


def test_the_report_gets_a_table_of_the_stages(fake_python, tmp_path) -> None:
    python = fake_python(f'case $1 in *gpu_report.py) cp "$4" {tmp_path}/table;; *) echo "end of $1";; esac')
    assert run_script(PYTHON=python, OUT=str(tmp_path / "out")).returncode == 0
    stages = load("gpu_report").read_stages(tmp_path / "table")
    assert [(stage["name"], stage["exit_code"]) for stage in stages] == [("tests", 0), ("tuning", 0), ("benchmarks", 0)]
    assert stages[2]["note"] == "end of benchmarks/gpu_kernels.py"
    # What tests and tuning did not need goes to the benchmarks.
    assert stages[2]["limit_seconds"] >= 525 - 30 - 5 > 235


def test_a_stage_that_hangs_is_stopped_and_the_next_ones_run(fake_python, tmp_path) -> None:
    python = fake_python("case $1 in *gpu_tests.py) exec sleep 50;; esac")
    start = time.monotonic()
    done = run_script(PYTHON=python, OUT=str(tmp_path / "out"), OOD_BENCH_TOTAL="33")
    assert time.monotonic() - start < 20
    assert done.returncode == 1
    assert "FAILED: stopped after 3 s" in done.stdout
    assert (tmp_path / "calls").read_text().count("\n") == 4


# The yardstick


def test_resnet50_has_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        model = ResNet50()
        images = torch.empty(2, 3, 224, 224)
        assert model.features(images).shape == (2, 2048, 7, 7)
        assert model(images).shape == (2, 1000)
    assert sum(weight.numel() for weight in model.parameters()) == 25_557_032
