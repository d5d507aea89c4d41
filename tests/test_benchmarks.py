"""The benchmarks at tiny sizes, their arithmetic, and `pytest benchmarks/` as a command."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import clocks, common, engine, fitting, kernels, methods, peers, readme, results
from benchmarks.common import AUTOGRAD, COPY, OURS, PLAIN, REFERENCE, Case, Provider
from ood_engine.demo import small_cnn
from ood_kernels.workloads import WORKLOADS, Cost, Workload

ROOT = Path(__file__).resolve().parents[1]
EFFORT = common.Effort(rounds=2, seconds=0, least_rounds=2, turn_ms=0)
TINY, SMALL = WORKLOADS["tiny"], Workload("small", 64, 8, 8, classes=8, anchors=64, components=8)


def measured(case: Case) -> dict[str, dict]:
    """Rows by provider."""
    with torch.no_grad():
        found = {row["provider"]: row for row in common.measure(case, EFFORT)}
    assert [row["error"] for row in found.values() if "error" in row] == []
    assert found[case.reference]["ratio"] == 1
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", kernels.FUNCTIONS)
def test_kernels(function, dtype):
    rivals = frozenset() if "factored" in function else frozenset({"autograd"})
    found = measured(kernels.FUNCTIONS[function](kernels.Size(TINY, 5, dtype, "channels_last", rivals)))
    assert (AUTOGRAD in found) == (function in ("project_dual", "project_explicit"))
    for name in (OURS, REFERENCE):
        row = found[name]
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert 0 < row["max_error"] <= kernels.TOLERANCES[dtype]
        assert min(row["peak_mib"], row["share_of_copy"], row["share_of_matmul"], row["limit_ms"]) > 0


@pytest.mark.parametrize("method", methods.MAKERS)
def test_methods(method):
    found = measured(methods.of_method(method, "R18", N=5, D=100, C=4, n=200))
    assert found.keys() == {OURS, PLAIN, COPY} | {name for name in peers.METHODS if method in peers.METHODS[name]}


def test_engine():
    model = small_cnn()
    with torch.no_grad():
        made = engine.Engines(SMALL, model, nn.Sequential(model.body), (1, 8, 8))
        found = measured(engine.around_a_forward(lambda: made, 3))
    assert {OURS, engine.FORWARD, engine.ALONE, engine.ALL} < found.keys()
    assert found[OURS]["flops"] > found[engine.FORWARD]["flops"] > found[engine.ALONE]["flops"] > 0
    assert measured(engine.memory(lambda: made, 16))[engine.ALL]["peak_mib"] > 0


def test_fitting():
    size = SMALL._replace(height=1, width=1)
    assert measured(fitting.dual_basis(size)).keys() == {OURS, PLAIN, COPY}
    assert OURS in measured(fitting.whole_engine(size, 200, ("energy", "opnp", "low_dim_gradient_mahalanobis")))
    assert measured(fitting.forms(size, 4))[fitting.CHOSEN]["note"] in ("dual", "explicit")


def simple(*providers: Provider, **fields) -> Case:
    return Case("sum", "made", {"N": 4}, providers, REFERENCE, [torch.ones(4, dtype=torch.float64)], **fields)


def test_a_wrong_provider_is_refused_and_the_others_are_measured():
    def fail():
        raise RuntimeError("no\nmemory")

    case = simple(
        Provider("wrong", lambda: torch.full((4,), 1.01)),
        Provider("nan", lambda: torch.tensor([1.0, math.nan, 1.0, 1.0])),
        Provider("another shape", lambda: torch.ones(3)),
        Provider("raises", fail),
        Provider(REFERENCE, lambda: torch.ones(4)),
        Provider("absent", missing="not installed"),
    )
    found = {row["provider"]: row for row in common.measure(case, EFFORT)}
    assert found["wrong"]["error"] == "ValueError: wrong: largest error 1.00e-02, allowed 1e-04"
    assert "nan" in found["nan"]["error"]
    assert "shapes" in found["another shape"]["error"]
    assert found["raises"]["error"] == "RuntimeError: no"
    assert found["absent"]["missing"] == "not installed"
    assert [name for name, row in found.items() if "median_ms" in row] == [REFERENCE]


def test_turns_alternate_and_ratios_are_per_sample_and_round(monkeypatch):
    order, times = [], {OURS: iter([9, 1, 2, 8]), REFERENCE: iter([9, 2, 4, 4])}

    def time_ms(call, count):
        order.append(call())
        return float(next(times[order[-1]]))

    monkeypatch.setattr(common, "time_ms", time_ms)
    providers = [Provider(OURS, lambda: OURS, samples=2), Provider(REFERENCE, lambda: REFERENCE)]
    case = Case("sum", "made", {"N": 4}, providers, REFERENCE)
    before, effort = common.Timer.seconds, common.Effort(rounds=3, seconds=100, least_rounds=3, turn_ms=9)
    ours, reference = common.measure(case, effort)
    assert order[2:] == [REFERENCE, OURS] * 3
    assert (ours["median_ms"], ours["min_ms"], ours["rounds"]) == (2, 1, 3)
    assert (ours["ratio"], ours["ratio_spread"], reference["ratio"]) == (2 * 0.5, 2.5 - 1, 1)
    # What pytest-benchmark is told is the time of our calls, without those around them.
    assert common.Timer.seconds - before == pytest.approx((1 + 2 + 8) / 1000)


def test_shares_are_of_the_copy_and_the_product_of_this_run(monkeypatch):
    monkeypatch.setattr(common, "time_ms", lambda call, count: 4.0 if call() is None else 1.0)
    monkeypatch.setattr(common, "matmul_flops", lambda dtype: 1e9)
    provider = Provider(REFERENCE, lambda: None, tolerance=None)
    row, copy = common.measure(simple(provider, steps=[Cost(10**6, 10**6), Cost(10**6, 3 * 10**6)]), EFFORT)
    assert copy["bytes"] == 4 * 10**6
    assert row["share_of_copy"] == pytest.approx(1 / 4)
    assert row["share_of_matmul"] == pytest.approx(2e6 / 4e-3 / 1e9)
    # Each step at its own limit: 1 ms of arithmetic against 0.25 ms of traffic, then 1 against 0.75.
    assert row["limit_ms"] == pytest.approx(2)


def test_a_broken_device_ends_the_run_with_what_is_known(monkeypatch):
    def broken():
        raise RuntimeError("launch failed")

    monkeypatch.setattr(common, "synchronize", broken)
    with pytest.raises(common.BrokenDeviceError) as caught:
        common.measure(simple(Provider(OURS, broken), Provider(REFERENCE, lambda: torch.ones(4))), EFFORT)
    assert [row["error"] for row in caught.value.args[1]] == [caught.value.args[0]] == ["RuntimeError: launch failed"]


def test_the_cache_of_a_gpu_is_flushed_outside_the_events(monkeypatch):
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.index = 0

        def record(self):
            order.append("event")
            self.index = len(order)

        def elapsed_time(self, other):
            return float(other.index - self.index)

    flush = SimpleNamespace(add_=lambda value: order.append("flush"))
    monkeypatch.setattr(clocks, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(clocks, "_flush_buffer", lambda: flush)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert clocks.time_ms(lambda: order.append("call"), 2) == 2
    assert order == ["flush", "event", "call", "event"] * 2


def test_memory_is_seen_at_its_peak():
    def call():
        big, small = torch.ones(4 * 2**20), torch.ones(2**20)
        total = big.sum() + small.sum()
        del big
        return total + torch.ones(2 * 2**20).sum()

    assert clocks.peak_mib(call) == pytest.approx(20, abs=0.1)
    assert clocks.peak_mib(lambda: bytearray(2**20)) == pytest.approx(1, abs=0.1)


def row_of(provider=OURS, ratio=1.0, spread=0.01, **fields) -> dict:
    same = {"case": "a", "subject": "score", "workload": "R50", "shape": "N=64", "dtype": "float32", "layout": "rows"}
    times = {"ratio": ratio, "ratio_spread": spread, "median_ms": ratio, "samples": 64}
    return same | times | {"provider": provider, **fields}


def test_ratios_are_compared_and_not_times():
    (line,) = results.slower([row_of()], [row_of(ratio=2.0)])
    assert line == "a, ood-engine: 1 → 2 × the reference row of its run"
    assert results.slower([row_of()], [row_of(median_ms=3.0)]) == []
    assert results.slower([row_of(spread=0.3)], [row_of(ratio=2.0, spread=0.1)]) == []
    assert results.slower([row_of()], [row_of(ratio=1.2)]) == []
    assert results.slower([row_of(case="b")], [row_of(ratio=2.0)]) == []


@pytest.mark.skipif(clocks.DEVICE.type == "cuda", reason="a GPU has no tiny case")
@pytest.mark.parametrize("plugin", [[], ["-p", "no:benchmark"]], ids=["pytest-benchmark", "without it"])
def test_the_command_writes_rows_resumes_and_compares_ratios(tmp_path, plugin):
    path, old, earlier = tmp_path / "rows.json", tmp_path / "old.json", row_of(case="measured before")
    case = f"test_kernels[score {kernels.Size(TINY)}]"
    results.write(path, {"cpu": "a"}, [earlier])
    results.write(old, {}, [row_of(case=case, ratio=1e-3, spread=-1e6)])
    command = [sys.executable, "-m", "pytest", "benchmarks/kernels.py", "-q", "--quick", "-k", "tiny", "--rows", path]
    command += ["--compare-ratios", old, *(["--resume"] if plugin else []), *plugin]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout
    assert ("OPS: Operations Per Second" in done.stdout) == (not plugin)
    assert f"{case}, ood-engine: 0.001 → " in done.stdout
    assert done.returncode == 1
    document = results.read(path)
    assert ("torch" in document["machine"]) == (not plugin)
    assert (earlier in document["rows"]) == bool(plugin)
    assert [row["provider"] for row in document["rows"] if row != earlier] == [OURS, REFERENCE, COPY]


def test_the_worst_row_decides_a_target(tmp_path, capsys):
    pool = [row_of(subject="pool_nap", case="pool", share_of_copy=share) for share in (0.9, 0.4, 0.8)]
    dual = {"subject": "project dual", "case": "dual"}
    fits = [row_of(subject="fit engine", shape=f"samples={n} D=8", median_ms=1e-3 * n**1.5) for n in (100, 10_000)]
    path = tmp_path / "rows.json"
    results.write(path, {}, [*pool, row_of(**dual, ratio=0.5), row_of(AUTOGRAD, **dual, ratio=300.0), *fits])
    assert readme.main(["--targets", str(path)]) == 1
    told = {line[14:].split(": ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for target, start, worst in (
        ("pooling in fp32", "missed ", ": 2.5 ("),
        ("dual", "met ", ": 600 ("),
        ("fitting", "missed ", ": 1.5 ("),
        ("chosen form", "not measured ", ": –"),
    ):
        assert told[target].startswith(start)
        assert worst in told[target]
