"""The benchmarks at tiny sizes, their arithmetic, and `pytest benchmarks/` as a command."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import clocks, common, engine, fitting, kernels, methods, peers, rows, targets
from benchmarks.cases import AUTOGRAD, COMPILED, COPY, OURS, PLAIN, REFERENCE, Case, Provider
from ood_engine.demo import small_cnn
from ood_kernels.workloads import WORKLOADS, Cost, Workload

ROOT = Path(__file__).resolve().parents[1]
EFFORT = common.Effort(rounds=2, seconds=0, least_rounds=2, turn_ms=0)
TINY = WORKLOADS["tiny"]
SMALL = Workload("small", 64, 8, 8, classes=8, anchors=64, components=8)


def measured(case: Case) -> dict[str, dict]:
    """Rows by provider."""
    with torch.no_grad():
        found = {row["provider"]: row for row in common.measure(case, common.Turns(), EFFORT)}
    assert [row["error"] for row in found.values() if "error" in row] == []
    assert found[case.reference]["ratio"] == 1
    return found


# Each case once, at sizes that take milliseconds

PROJECTIONS = {f"project {kind}": partial(kernels.project, kind) for kind in ("dual", "explicit", "factored")}
FUNCTIONS = {
    "pool_nap": kernels.pool_nap,
    "masked_energy": kernels.masked_energy,
    "score": kernels.score,
    **PROJECTIONS,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels(function, dtype):
    found = measured(FUNCTIONS[function](kernels.Size(TINY, 5, dtype, "channels_last", frozenset({"autograd"}))))
    assert (AUTOGRAD in found) == (function in PROJECTIONS)
    for name in (OURS, REFERENCE):
        row = found[name]
        assert row["subject"] == function
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert 0 < row["max_error"] <= kernels.TOLERANCES[dtype]
        assert min(row["peak_mib"], row["share_of_copy"], row["share_of_matmul"], row["limit_ms"]) > 0


@pytest.mark.parametrize("method", methods.MAKERS)
def test_methods(method):
    found = measured(methods.of_method(method, "R18", N=5, D=100, C=4, n=200))
    assert {OURS, PLAIN, COPY} <= found.keys()
    for name in peers.METHODS:
        assert (name in found) == (method in peers.METHODS[name])


@pytest.fixture(scope="module")
def engines():
    return engine.Engines(SMALL, small_cnn, lambda model: model.body, (1, 8, 8))


def test_engine(engines):
    found = measured(engine.around_a_forward(engines, 3))
    assert {OURS, engine.FORWARD, engine.ALONE, engine.ALL} < found.keys()
    assert found[OURS]["flops"] > found[engine.FORWARD]["flops"] > found[engine.ALONE]["flops"] > 0
    large = measured(engine.memory(engines, 16))
    assert large[engine.ALL]["peak_mib"] > 0


def test_fitting():
    size = SMALL._replace(height=1, width=1)
    found = measured(fitting.dual_basis(size))
    assert {OURS, PLAIN, fitting.SCIKIT_LEARN, COPY} == found.keys()
    assert found[fitting.SCIKIT_LEARN]["max_error"] <= 1e-3
    assert OURS in measured(fitting.whole_engine(size, 200, ("energy", "opnp", "low_dim_gradient_mahalanobis")))
    assert measured(fitting.forms(size, 4))[fitting.CHOSEN]["note"] in ("dual", "explicit")


def test_every_case_has_a_name_and_the_targets_have_cases():
    plans = [*kernels.cpu_cases(), *methods.cases(), *engine.cases(), *fitting.cases()]
    assert not [name for name, count in Counter(case.name for case in plans).items() if count > 1]
    assert 0 < sum(case.quick for case in plans) < len(plans)
    names = [case.name for case in kernels.cuda_cases()]
    assert len(names) == len(set(names))
    # If time runs out on a GPU, what the targets ask for has been measured.
    assert names[0].startswith("score R50")
    assert "N=256 bfloat16 channels_last" in names[0]
    assert {case.name.split()[1] for case in kernels.cuda_cases()} == {"R50", "ViT", "R18", "W21k"}
    assert all("R50" in case.name for case in kernels.cuda_cases() if case.quick)


# Measuring


def simple(*providers: Provider, truth: float = 1.0, **fields) -> Case:
    return Case("sum", "made", {"N": 4}, providers, REFERENCE, [torch.full((4,), truth, dtype=torch.float64)], **fields)


def test_a_wrong_provider_is_refused_and_the_others_are_measured():
    def fail():
        raise RuntimeError("no\nmemory")

    case = simple(
        Provider("wrong", lambda: torch.full((4,), 1.01)),
        Provider("nan", lambda: torch.tensor([1.0, math.nan, 1.0, 1.0])),
        Provider("another shape", lambda: torch.ones(3)),
        Provider("raises", fail),
        Provider(REFERENCE, lambda: torch.ones(4)),
        missing={"absent": "not installed"},
    )
    found = {row["provider"]: row for row in common.measure(case, common.Turns(), EFFORT)}
    assert found["wrong"]["error"] == "ValueError: wrong: largest error 1.00e-02, allowed 1e-04"
    assert "nan" in found["nan"]["error"]
    assert "shapes" in found["another shape"]["error"]
    assert found["raises"]["error"] == "RuntimeError: no"
    assert found["absent"]["missing"] == "not installed"
    assert [name for name, row in found.items() if "median_ms" in row] == [REFERENCE]


def test_turns_alternate_and_ratios_are_per_sample_and_round(monkeypatch):
    order = []
    times = {OURS: iter([9, 1, 2, 8]), REFERENCE: iter([9, 2, 4, 4])}

    class Clock(clocks.Clock):
        def time_ms(self, call, count, flush):
            name = call()
            order.append(name)
            return float(next(times[name]))

        def peak_mib(self, call, uses_numpy):
            return 0.0

    monkeypatch.setattr(common, "clock", Clock)
    case = Case(
        "sum",
        "made",
        {"N": 4},
        [Provider(OURS, lambda: OURS, samples=2), Provider(REFERENCE, lambda: REFERENCE)],
        REFERENCE,
    )
    before = common.Timer.seconds
    effort = common.Effort(rounds=3, seconds=100, least_rounds=3, turn_ms=9)
    ours, reference = common.measure(case, common.Turns(), effort)
    assert order[2:] == [REFERENCE, OURS] * 3
    assert (ours["median_ms"], ours["min_ms"], ours["rounds"]) == (2, 1, 3)
    assert ours["ratio"] == 2 * 0.5
    assert ours["ratio_spread"] == 2.5 - 1
    assert reference["ratio"] == 1
    # What pytest-benchmark is told is the time of our calls, without those around them.
    assert common.Timer.seconds - before == pytest.approx((1 + 2 + 8) / 1000)


def test_shares_are_of_the_copy_and_the_product_of_this_run(monkeypatch):
    class Clock(clocks.Clock):
        def time_ms(self, call, count, flush):
            return 4.0 if call() is None else 1.0

    monkeypatch.setattr(common, "clock", Clock)
    monkeypatch.setattr(common, "matmul_flops", lambda dtype: 1e9)
    monkeypatch.setattr(common, "torch", torch)
    provider = Provider(REFERENCE, lambda: None, tolerance=None)
    case = Case("sum", "made", {"N": 4}, [provider], REFERENCE, steps=[Cost(10**6, 10**6), Cost(10**6, 3 * 10**6)])
    row, copy = common.measure(case, common.Turns(), EFFORT)
    assert copy["bytes"] == 4 * 10**6
    assert row["share_of_copy"] == pytest.approx(1 / 4)
    assert row["share_of_matmul"] == pytest.approx(2e6 / 4e-3 / 1e9)
    # Each step at its own limit: 1 ms of arithmetic against 0.25 ms of traffic, then 1 against 0.75.
    assert row["limit_ms"] == pytest.approx(2)


def test_a_broken_device_ends_the_run_with_what_is_known(monkeypatch):
    class Clock(clocks.Clock):
        broken = False

        def synchronize(self):
            if Clock.broken:
                raise RuntimeError("illegal access")

    def break_it():
        Clock.broken = True
        raise RuntimeError("launch failed")

    monkeypatch.setattr(common, "clock", Clock)
    case = simple(Provider(OURS, break_it), Provider(REFERENCE, lambda: torch.ones(4)))
    with pytest.raises(common.BrokenDeviceError) as caught:
        common.measure(case, common.Turns(), EFFORT)
    message, known = caught.value.args
    assert message == "RuntimeError: launch failed"
    assert [row["error"] for row in known] == ["RuntimeError: launch failed"]


def test_the_cache_of_a_gpu_is_flushed_outside_the_events(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            self.index = None

        def record(self):
            order.append("event")
            self.index = len(order)

        def elapsed_time(self, other):
            return float(other.index - self.index)

    class Flush:
        def add_(self, value):
            order.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = clocks.CudaClock.__new__(clocks.CudaClock)
    clock._flush = Flush()
    assert clock.time_ms(lambda: order.append("call"), 2, True) == 2
    assert order == ["flush", "event", "call", "event"] * 2
    order.clear()
    clock.time_ms(lambda: order.append("call"), 1, False)
    assert order == ["call", "event", "call", "event"]


def test_memory_is_seen_at_its_peak():
    def call():
        big, small = torch.ones(4 * 2**20), torch.ones(2**20)
        total = big.sum() + small.sum()
        del big
        return total + torch.ones(2 * 2**20).sum()

    assert clocks.torch_peak_mib(call) == pytest.approx(20, abs=0.1)
    assert clocks.numpy_peak_mib(lambda: bytearray(2**20)) == pytest.approx(1, abs=0.1)


# Two runs


def row_of(provider=OURS, ratio=1.0, spread=0.01, **fields) -> dict:
    same = {
        "case": "a",
        "subject": "score",
        "workload": "R50",
        "shape": "N=64 D=8",
        "dtype": "float32",
        "layout": "rows",
    }
    return {
        **same,
        "provider": provider,
        "ratio": ratio,
        "ratio_spread": spread,
        "median_ms": ratio,
        "samples": 64,
        **fields,
    }


def test_a_slower_machine_is_no_slower_code():
    old = [row_of(), row_of(REFERENCE)]
    assert rows.slower(old, [row_of(median_ms=3.0), row_of(REFERENCE, median_ms=3.0)]) == []


def test_a_ratio_that_grows_beyond_its_spread_is_told():
    (line,) = rows.slower([row_of(), row_of(REFERENCE)], [row_of(ratio=2.0), row_of(REFERENCE)])
    assert line == "score, R50, N=64 D=8, float32, rows, ood-engine, 64: 1 → 2 × the reference row of its run"
    assert rows.slower([row_of(spread=0.3)], [row_of(ratio=2.0, spread=0.1)]) == []
    assert rows.slower([row_of()], [row_of(ratio=1.2)]) == []
    assert rows.slower([row_of(shape="N=1 D=8")], [row_of(ratio=2.0)]) == []


def test_a_file_is_named_after_its_machine_and_has_a_row_a_line(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    rows.write(path, {"cpu": "Some(R) CPU @ 2 GHz", "cores": 2}, [row_of(), row_of(REFERENCE)])
    assert len(path.read_text().splitlines()) == 5
    assert rows.read(path)["rows"][1]["provider"] == REFERENCE
    assert rows.name_of(rows.read(path)["machine"]) == "some-cpu-2-ghz-2-cores.json"
    assert rows.name_of({"gpu": "NVIDIA H100", "cpu": "x", "cores": 1}) == "nvidia-h100.json"


@pytest.mark.skipif(clocks.DEVICE.type == "cuda", reason="a GPU has no tiny case")
@pytest.mark.parametrize("plugin", [[], ["-p", "no:benchmark"]], ids=["pytest-benchmark", "without it"])
def test_the_command_writes_rows_resumes_and_compares_ratios(tmp_path, plugin):
    path, old = tmp_path / "rows.json", tmp_path / "old.json"
    earlier = row_of(case="test_kernels[measured before]")
    rows.write(path, {"cpu": "a"}, [earlier])
    shape = "N=64 D=10 C=3 H=3 W=3 n=21 K=5"
    rows.write(old, {}, [row_of(workload="tiny", shape=shape, ratio=1e-3, spread=-1e6)])
    options = ["-q", "--quick", "-k", "tiny", "--rows", str(path), "--compare-ratios", str(old)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/kernels.py",
        *options,
        *(["--resume"] if plugin else []),
        *plugin,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout
    assert ("OPS: Operations Per Second" in done.stdout) == (not plugin)
    assert f"score, tiny, {shape}, float32, rows, ood-engine, 64: 0.001 → " in done.stdout
    assert done.returncode == 1
    document = rows.read(path)
    assert ("torch" in document["machine"]) == (not plugin)
    assert (earlier in document["rows"]) == bool(plugin)
    new = [row["provider"] for row in document["rows"] if row != earlier]
    assert sorted(new) == sorted([OURS, REFERENCE, COPY])


# Targets


def verdicts(found: list[dict], is_gpu: bool = True) -> dict[str, str]:
    return {one.target: one.verdict for one in targets.evaluate(found, is_gpu)}


def test_every_target_is_told_apart():
    main = {"shape": "N=256 D=8", "samples": 256, "limit_ms": 1.0, "peak_mib": 20.0, "dtype": "bfloat16"}
    dual = {**main, "subject": "project dual", "case": "dual"}
    found = [
        row_of(**main, median_ms=1.2, ratio=0.09),
        row_of(REFERENCE, **main, median_ms=13.0, ratio=1.0),
        row_of(COMPILED, **main, median_ms=1.5, ratio=0.12),
        row_of(**dual, ratio=0.5),
        row_of(AUTOGRAD, **dual, ratio=600.0),
        row_of(**{**main, "subject": "pool_nap", "case": "pool", "share_of_copy": 0.91}),
        row_of(**{**main, "shape": "N=1 D=8", "case": "single", "median_ms": 0.04}),
        row_of(
            engine.FORWARD,
            subject="engine around a forward",
            shape="N=64 D=8",
            dtype="bfloat16",
            median_ms=40.0,
            samples=64,
        ),
    ]
    told = verdicts(found)
    assert list(told.values()) == ["met", "met", "met", "missed", "met", "met", "missed", "met"]
    assert set(verdicts([]).values()) == {"not measured"}
    assert len(verdicts([])) == len(told)


def test_the_worst_row_counts_and_growth_is_an_exponent(tmp_path):
    pool = {"subject": "pool_nap", "case": "pool"}
    fits = [
        row_of(subject="fit engine", workload="R18", shape=f"samples={n} D=8", median_ms=1e-3 * n**1.5)
        for n in (100, 1000, 10_000)
    ]
    found = [row_of(**pool, share_of_copy=share) for share in (0.9, 0.4, 0.8)] + fits
    told = {one.target: one for one in targets.evaluate(found, False)}
    copies, growth = (
        told["pooling: at most 2 copies of the same bytes"],
        told["fitting: grows at most with samples^1.1"],
    )
    assert (copies.verdict, copies.figure.split()[0]) == ("missed", "2.5")
    assert (growth.verdict, growth.figure.split()[0]) == ("missed", "1.5")
    path = tmp_path / "rows.json"
    rows.write(path, {}, found)
    assert targets.main([str(path)]) == 1
    assert targets.main([str(tmp_path / "none")]) == 2
