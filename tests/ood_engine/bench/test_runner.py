"""Who is measured, in which order and how often, and what is left when something goes wrong."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from ood_engine.bench import runner
from ood_engine.bench.cases import Case, Effort, Plan, Provider
from ood_engine.bench.clock import Sample
from ood_engine.bench.limits import COPY
from ood_engine.bench.rows import FIELDS
from ood_engine.errors import InputError
from ood_kernels.workloads import Cost

CPU = torch.device("cpu")
EFFORT = Effort("quick", 3, 0.0, 10.0, CPU)
RIGHT = torch.tensor([1.0, 2.0], dtype=torch.float64)


class FakeClock:
    """Calls, and reports the times it was given, again and again."""

    def __init__(self, times_ms: Sequence[float] = (1.0,), device_ms: Sequence[float] | None = None) -> None:
        self.times_ms, self.device_ms = times_ms, device_ms
        self.cold: list[bool] = []
        self.captured: list[Callable[[], Any]] = []

    def time(self, call: Callable[[], Any], cold: bool) -> Sample:
        call()
        number = len(self.cold)
        self.cold.append(cold)
        device = None if self.device_ms is None else self.device_ms[number % len(self.device_ms)]
        return Sample(self.times_ms[number % len(self.times_ms)], device)

    def peak_extra_mib(self, call: Callable[[], Any], uses_numpy: bool) -> float:
        return 2.0 if uses_numpy else 1.0

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        self.captured.append(call)
        result = call()
        return lambda: result


@pytest.fixture
def clock(monkeypatch):
    """Takes the place of the device's clock."""
    fake = FakeClock()
    monkeypatch.setattr(runner, "clock_for", lambda device: fake)
    return fake


@pytest.fixture
def elapse(monkeypatch):
    """elapse(seconds) lets time pass, which it does not otherwise."""
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    stopped = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=pass_by)
    monkeypatch.setattr(runner, "time", stopped)
    return pass_by


def plan_of(*providers: Provider, truth: Sequence[torch.Tensor] = (), cost: Cost | None = None, **fields: Any) -> Plan:
    """A case with these providers."""
    return Plan("squares", "tiny", {"N": 2, "D": 3}, lambda: Case(providers, truth, cost), **fields)


def rows_of(*plans: Plan, effort: Effort = EFFORT) -> dict[str, dict[str, Any]]:
    """Provider → its row."""
    rows: list[dict[str, Any]] = []
    runner.run(plans, effort, {"device": "cpu"}, lambda _, found, __: rows.extend(found))
    return {row["provider"]: row for row in rows}


def quietly(name: str, **fields: Any) -> Provider:
    return Provider(name, lambda: RIGHT, **fields)


def raising() -> Any:
    raise ValueError("no memory left\nsecond line")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: torch.tensor([1.0, 2.1]), "largest error 5.00e-02, expected at most 1e-04"),
        (lambda: torch.tensor([1.0, float("nan")]), "result with NaN or infinite values"),
        (lambda: torch.tensor([1.0, float("inf")]), "result with NaN or infinite values"),
        (lambda: torch.ones(3), "result of shapes [[3]], expected [[2]]"),
        (lambda: (RIGHT, RIGHT), "result of shapes [[2], [2]], expected [[2]]"),
        (lambda: None, "TypeError"),
        (raising, "ValueError: no memory left"),
    ],
)
def test_a_wrong_provider_is_refused_and_the_others_are_measured(clock, call, reason):
    rows = rows_of(plan_of(Provider("wrong", call), quietly("right"), truth=[RIGHT]))
    assert list(rows) == ["right", "wrong"]
    assert reason in rows["wrong"]["refused"]
    assert "\n" not in rows["wrong"]["refused"]
    assert rows["wrong"]["p50_ms"] is None
    assert rows["right"]["refused"] is None
    assert rows["right"]["max_error"] == 0
    assert rows["right"]["runs"] == EFFORT.rounds


def test_a_refused_provider_is_not_called_again(clock):
    calls = []
    rows_of(plan_of(Provider("wrong", lambda: calls.append(1)), truth=[RIGHT]))
    assert len(calls) == 1


def test_a_tolerance_of_zero_asks_for_the_same_bits(clock):
    near = Provider("near", lambda: RIGHT + 1e-12, tolerance=0.0)
    rows = rows_of(plan_of(near, quietly("equal", tolerance=0.0), truth=[RIGHT]))
    assert rows["near"]["refused"] is not None
    assert rows["equal"]["refused"] is None
    assert rows["equal"]["tolerance"] == 0


def test_what_computes_another_thing_is_not_held_to_the_truth(clock):
    row = rows_of(plan_of(Provider("forward", lambda: "logits", tolerance=None), truth=[RIGHT]))["forward"]
    assert row["refused"] is None
    assert row["max_error"] is None


def test_fewer_samples_are_held_to_the_first_rows(clock):
    first = Provider("first", lambda: RIGHT[:1], samples=1)
    last = Provider("last", lambda: RIGHT[1:], samples=1)
    rows = rows_of(plan_of(first, last, truth=[RIGHT], cost=Cost(4, 8)))
    assert rows["first"]["max_error"] == 0
    assert rows["first"]["samples_run"] == 1
    assert rows["first"]["bytes"] is None
    assert rows["last"]["refused"] is not None


def test_check_makes_tensors_of_a_result(clock):
    made = Provider("dict", lambda: {"score": RIGHT.float()}, check=lambda found: [found["score"]])
    assert rows_of(plan_of(made, truth=[RIGHT]))["dict"]["refused"] is None


def test_the_worst_tensor_counts_relative_to_its_own_largest():
    truth = [torch.tensor([100.0, 1.0]).double(), torch.tensor([0.01]).double()]
    assert runner.errors([torch.tensor([101.0, 1.0]), torch.tensor([0.01])], truth) == pytest.approx(0.01)
    assert runner.errors([torch.tensor([100.0, 1.0]), torch.tensor([0.011])], truth) == pytest.approx(0.1)


def test_providers_take_turns_and_another_begins_every_round(clock):
    order: list[str] = []
    providers = [Provider(name, lambda name=name: order.append(name), tolerance=None) for name in "abc"]
    rows_of(plan_of(*providers), effort=EFFORT._replace(rounds=4))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 11), (0.4, 3), (0.9, 3), (1.5, 1), (50.0, 1)])
def test_a_slow_provider_is_called_three_times_and_once_where_a_call_alone_takes_too_long(
    clock, elapse, seconds, calls
):
    slow = Provider("slow", lambda: elapse(seconds))
    effort = EFFORT._replace(rounds=40, most_seconds=1.0)
    rows = rows_of(plan_of(slow, quietly("quick")), effort=effort)
    assert rows["slow"]["runs"] == calls
    assert rows["quick"]["runs"] == 40


def test_a_plan_may_ask_for_more_seconds(clock, elapse):
    slow = Provider("slow", lambda: elapse(1.5))
    effort = EFFORT._replace(rounds=40, most_seconds=1.0)
    assert rows_of(plan_of(slow, seconds=2.0), effort=effort)["slow"]["runs"] == 3


def test_a_turn_goes_on_until_its_seconds_have_passed_or_200_calls_were_made(clock, elapse):
    short = Provider("short", lambda: elapse(0.125))
    effort = EFFORT._replace(rounds=2, least_seconds=1.0)
    rows = rows_of(plan_of(short, quietly("at once")), effort=effort)
    assert rows["short"]["runs"] == 16
    assert len(rows["short"]["rounds_ms"]) == 2
    assert rows["at once"]["runs"] == 400


def test_percentiles_are_over_all_calls_and_medians_over_rounds(clock):
    clock.times_ms = [float(i) for i in range(101)]
    clock.device_ms = [i / 2 for i in range(101)]
    row = rows_of(plan_of(quietly("a")), effort=EFFORT._replace(rounds=101))["a"]
    assert [row[f"p{p}_ms"] for p in (5, 50, 95, 99)] == pytest.approx([5, 50, 95, 99])
    assert [row[f"device_p{p}_ms"] for p in (5, 50, 95, 99)] == pytest.approx([2.5, 25, 47.5, 49.5])
    assert row["rounds_ms"] == clock.times_ms
    assert row["runs"] == 101
    assert row["ms_per_sample"] == pytest.approx(25)


def test_the_median_of_an_even_round_lies_between_its_calls(clock, elapse):
    clock.times_ms = [1.0, 2.0]
    row = rows_of(plan_of(Provider("a", lambda: elapse(0.5))), effort=EFFORT._replace(rounds=1, least_seconds=1.0))["a"]
    assert row["runs"] == 2
    assert row["rounds_ms"] == [1.5]
    assert row["device_p50_ms"] is None


def test_cold_is_passed_on_and_written_down(clock):
    row = rows_of(plan_of(quietly("a"), cold=True), effort=EFFORT)["a"]
    assert clock.cold == [True] * 3
    assert row["cache"] == "cold"
    assert rows_of(plan_of(quietly("a")))["a"]["cache"] == "warm"
    assert clock.cold[3:] == [False] * 3


def test_a_row_has_every_field_and_says_what_was_measured(clock):
    provider = quietly("a", uses_numpy=True, note="a note")
    row = rows_of(plan_of(provider, dtype=torch.bfloat16, memory_format="NCHW", sweeps=("N",)))["a"]
    assert row.keys() == FIELDS.keys()
    expected = {"subject": "squares", "shape": "N=2 D=3", "N": 2, "D": 3, "C": None, "dtype": "bfloat16"}
    expected |= {"memory_format": "NCHW", "sweeps": ["N"], "note": "a note", "device": "cpu", "peak_extra_mib": 2.0}
    assert row.items() >= expected.items()


def test_rows_are_handed_on_after_every_case_and_kept_through_an_interruption(clock):
    kept: list[tuple[str, int]] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    plans = [plan_of(quietly("a"), quietly("b")), plan_of(Provider("c", interrupt)), plan_of(quietly("d"))]
    with pytest.raises(KeyboardInterrupt):
        runner.run(plans, EFFORT, {}, lambda plan, rows, _: kept.append((str(plan), len(rows))))
    assert kept == [("squares, tiny N=2 D=3 float32", 2)]


def test_plans_are_built_one_after_the_other(clock):
    events: list[str] = []

    def plans() -> Iterable[Plan]:
        for name in "ab":
            events.append(f"plan {name}")
            yield plan_of(quietly(name))

    runner.run(plans(), EFFORT, {}, lambda _, rows, __: events.append(f"rows {rows[0]['provider']}"))
    assert events == ["plan a", "rows a", "plan b", "rows b"]


def test_a_build_that_raises_is_told_and_the_others_go_on(clock):
    told = []
    broken = Plan("cubes", "tiny", {"N": 1}, raising)
    runner.run([broken, plan_of(quietly("a"))], EFFORT, {}, lambda _, rows, missing: told.append((len(rows), missing)))
    reason = "cubes, tiny N=1 float32: ValueError: no memory left"
    assert told == [(0, {"all": reason}), (1, {})]


def test_missing_providers_are_handed_on(clock):
    plan = Plan("squares", "tiny", {"N": 1}, lambda: Case([quietly("a")], missing={"peer": "not installed"}))
    told: list[Any] = []
    runner.run([plan], EFFORT, {}, lambda _, __, missing: told.append(missing))
    assert told == [{"peer": "not installed"}]


def test_a_provider_that_breaks_while_it_is_timed_is_refused_alone(clock):
    calls = iter(range(100))

    def breaks() -> torch.Tensor:
        return RIGHT if next(calls) < 2 else raising()

    rows = rows_of(plan_of(Provider("breaks", breaks), quietly("a"), truth=[RIGHT]))
    assert rows["breaks"]["refused"] == "ValueError: no memory left"
    assert rows["breaks"]["p50_ms"] is None
    assert next(calls) == 3
    assert rows["a"]["runs"] == 3


def test_garbage_of_the_first_call_is_gone_when_memory_is_looked_at(clock, monkeypatch):
    class Garbage:
        pass

    left: list[weakref.ref[Garbage]] = []
    seen: list[Any] = []

    def call() -> None:
        garbage = Garbage()
        garbage.itself = garbage
        left.append(weakref.ref(garbage))

    monkeypatch.setattr(clock, "peak_extra_mib", lambda *_: seen.append(left[0]()) or 0.0)
    gc.disable()
    try:
        rows_of(plan_of(Provider("a", call)))
    finally:
        gc.enable()
    assert seen == [None]


def test_building_does_not_change_the_threads_of_what_is_timed(clock):
    before, seen = torch.get_num_threads(), []

    def build() -> Case:
        torch.set_num_threads(before + 1)
        return Case([Provider("a", lambda: seen.append(torch.get_num_threads()))])

    rows_of(Plan("squares", "tiny", {"N": 1}, build))
    assert set(seen) == {before}


def test_a_cost_gives_rates_beside_the_limits_of_the_machine(clock):
    clock.times_ms = [2.0]
    own = quietly("own", cost=Cost(5000, 10**6))
    rows = rows_of(plan_of(quietly("a"), own, cost=Cost(4000, 3 * 10**6)))
    assert rows["a"]["gb_per_s"] == pytest.approx(1.5)
    assert rows["a"]["tflop_per_s"] == pytest.approx(2e-6)
    assert rows["own"]["bytes"] == 10**6
    # A copy of 3 MB took 2 ms as well, and a product of 1024 x 1024 matrices too.
    assert rows[COPY]["bytes"] == 3 * 10**6
    assert rows[COPY]["share_of_limit"] == pytest.approx(1)
    assert rows["a"]["limit_ms"] == pytest.approx(2)
    assert rows["own"]["share_of_limit"] == pytest.approx(1 / 3)
    assert rows_of(plan_of(quietly("a")))["a"]["gb_per_s"] is None


def test_arithmetic_limits_where_it_takes_longer_than_traffic(clock):
    clock.times_ms = [2.0]
    rows = rows_of(plan_of(quietly("a"), cost=Cost(4 * 1024**3, 4096)))
    assert rows["a"]["limit_ms"] == pytest.approx(4)


def test_a_gpu_runs_a_provider_as_a_graph_too(clock):
    clock.device_ms = [0.5]
    providers = [quietly("a", captures=True), quietly("b")]
    rows = rows_of(plan_of(*providers, truth=[RIGHT]), effort=EFFORT._replace(device=torch.device("cuda")))
    assert set(rows) == {"a", "a, CUDA graph", "b"}
    assert clock.captured == [providers[0].call]
    assert rows["a, CUDA graph"]["max_error"] == 0
    assert rows["a, CUDA graph"]["device_p50_ms"] == 0.5
    assert "a, CUDA graph" not in rows_of(plan_of(*providers, truth=[RIGHT]))


def test_a_graph_that_cannot_be_captured_is_refused_alone(clock, monkeypatch):
    monkeypatch.setattr(clock, "capture", lambda call: raising())
    rows = rows_of(plan_of(quietly("a", captures=True)), effort=EFFORT._replace(device=torch.device("cuda")))
    assert rows["a"]["refused"] is None
    assert rows["a, CUDA graph"]["refused"] == "ValueError: no memory left"


@pytest.mark.parametrize("name", ["slow", "limit: copy of the same bytes"])
def test_a_provider_can_be_slowed(clock, elapse, monkeypatch, name):
    monkeypatch.setenv(runner.SLOW, f"{name}:3")
    taken: list[float] = []

    def time(call: Callable[[], Any], cold: bool) -> Sample:
        start = runner.time.perf_counter()
        call()
        taken.append(runner.time.perf_counter() - start)
        return Sample(1000 * taken[-1], None)

    monkeypatch.setattr(clock, "time", time)
    rows = rows_of(plan_of(*(Provider(one, lambda: elapse(0.25)) for one in (name, "other"))))
    assert rows[name]["p50_ms"] == pytest.approx(750)
    assert rows["other"]["p50_ms"] == pytest.approx(250)


@pytest.mark.parametrize("text", ["reference", "reference:fast", ":2", "reference:", "reference:0.5", "a:nan", "a:inf"])
def test_a_malformed_slowdown_is_refused_before_anything_runs(clock, monkeypatch, text):
    monkeypatch.setenv(runner.SLOW, text)
    with pytest.raises(InputError, match="expected PROVIDER:FACTOR") as caught:
        rows_of(plan_of(Provider("a", raising)))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_slowdown_nothing_is_slowed(clock, monkeypatch):
    monkeypatch.setenv(runner.SLOW, "")
    provider = quietly("")
    assert rows_of(plan_of(provider))[""]["refused"] is None
