from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ood_engine.bench.compare import compare
from ood_engine.bench.limits import COPY
from ood_engine.bench.table import print_comparison

PROVIDERS = {"ood-engine": 1.0, "reference": 3.0, "pytorch-ood": 30.0, COPY: 0.5}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@pytest.fixture(scope="module")
def run(row):
    """run(seed, ...) → a document of made-up times.

    `noise` is the spread of rounds and `between` that of runs, as logarithms; `machine` and `changed(row)` are factors by which
    all rows, or one row, take longer; `stalled(row)` is milliseconds on top.
    """

    def make(
        seed=0,
        noise=0.05,
        between=0.05,
        machine=1.0,
        rounds=7,
        changed=lambda row: 1.0,
        stalled=lambda row: 0.0,
        providers=PROVIDERS,
        **facts,
    ):
        generator = np.random.default_rng(seed)
        rows = []
        for size in SIZES:
            for provider, weight in providers.items():
                made = row(provider, 0.1 * weight * size, N=size, sweeps=["N"])
                here = made["p50_ms"] * machine * changed(made) * math.exp(between * generator.standard_normal())
                times = here * np.exp(noise * generator.standard_normal(rounds)) + stalled(made)
                rows.append({**made, "rounds_ms": times.tolist()})
        return {"machine": facts, "rows": rows}

    return make


def verdicts(comparison, provider):
    return {row["verdict"] for row in comparison.rows if row["provider"] == provider}


def summary(comparison):
    return {row["provider"]: row["verdict"] for row in comparison.providers}


def slower(factor, *providers):
    return lambda row: factor if row["provider"] in providers else 1.0


# What is drawn stays the same: one pair of runs in thousands may well be called different.
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.005, 0.05, 0.2]),
    between=st.sampled_from([0.0, 0.03, 0.1, 0.2]),
    machine=st.sampled_from([0.6, 1.0, 1.8]),
    rounds=st.sampled_from([1, 3, 7, 15]),
)
def test_two_runs_of_the_same_code_are_within_noise(run, seed, noise, between, machine, rounds):
    options = {"noise": noise, "between": between, "rounds": rounds}
    comparison = compare(run(seed, **options), run(seed + 1, machine=machine, **options))
    assert not comparison.is_slower
    assert all(row["verdict"] in ("within noise", "control") for row in comparison.rows)


def test_a_run_is_itself(run):
    comparison = compare(run(), run())
    assert all(row["ratio"] == 1 for row in comparison.rows)
    assert not comparison.is_slower
    assert comparison.drift == 1


@pytest.mark.parametrize("provider", ["ood-engine", "reference", "pytorch-ood"])
@pytest.mark.parametrize("machine", [0.7, 1.0, 1.5])
def test_a_provider_twice_as_slow_is_caught_and_no_other(run, provider, machine):
    comparison = compare(run(1), run(2, changed=slower(2.2, provider), machine=machine))
    assert comparison.is_slower
    assert summary(comparison) == {
        name: "slower" if name == provider else "within noise" for name in PROVIDERS if name != COPY
    }
    for name in PROVIDERS:
        found = verdicts(comparison, name)
        assert found == {"control"} if name == COPY else found <= {"slower", "within noise"}
        # Where the machine itself is slower, only all rows together can show that this is not all.
        assert ("slower" in found) == (name == provider and machine <= 1)


def test_small_differences_are_noise_however_quiet_the_machine(run):
    quiet = {"noise": 0.001, "between": 0.0}
    small = compare(run(1, **quiet), run(2, changed=slower(1.08, "ood-engine"), **quiet))
    assert verdicts(small, "ood-engine") == {"within noise"}
    assert summary(small)["ood-engine"] == "within noise"
    moderate = compare(run(1, **quiet), run(2, changed=slower(1.2, "ood-engine"), **quiet))
    assert verdicts(moderate, "ood-engine") == {"within noise"}
    assert summary(moderate)["ood-engine"] == "slower"


def test_what_is_faster_is_told_and_is_no_failure(run):
    comparison = compare(run(1), run(2, changed=slower(0.4, "ood-engine")))
    assert verdicts(comparison, "ood-engine") == {"faster"}
    assert not comparison.is_slower


def test_one_slow_case_of_a_provider_is_caught(run):
    hit = compare(run(1), run(2, changed=lambda row: 3.0 if (row["provider"], row["N"]) == ("ood-engine", 64) else 1.0))
    assert [(row["provider"], row["shape"]) for row in hit.rows if row["verdict"] == "slower"] == [
        ("ood-engine", "N=64")
    ]
    assert hit.is_slower
    assert summary(hit)["ood-engine"] == "within noise"


def test_a_slow_spell_of_one_case_is_no_change_of_the_code(run):
    spell = compare(run(1), run(2, changed=lambda row: 4.0 if row["N"] == 64 else 1.0))
    assert all(row["verdict"] in ("within noise", "control") for row in spell.rows)


def test_clocks_that_slow_work_more_than_copies_are_no_change(run):
    """Two threads of one core: a copy loses a third, arithmetic two thirds."""
    lost = {COPY: 1.33, "pytorch-ood": 1.33}
    slow = compare(run(1), run(2, changed=lambda row: lost.get(row["provider"], 1.7)))
    assert not slow.is_slower
    by_turns = compare(
        run(1), run(2, changed=lambda row: lost.get(row["provider"], 1.7) if row["N"] in (1, 64) else 1.0)
    )
    assert not by_turns.is_slower


def test_without_copies_a_case_is_its_own_control(run):
    two = {"ood-engine": 1.0, "scikit-learn": 2.0}
    assert not compare(run(1, providers=two), run(2, providers=two, machine=2.0)).is_slower
    assert compare(run(1, providers=two), run(2, providers=two, changed=slower(2.2, "ood-engine"))).is_slower


def test_waiting_threads_of_a_busy_machine_are_no_change(run):
    """Another program's time slices are milliseconds on top of some calls, thousands of times what these take."""

    def stalled(seed):
        generator = np.random.default_rng(seed)
        return lambda row: 8.0 * generator.integers(0, 3)

    for seed in range(10):
        comparison = compare(run(seed, stalled=stalled(seed)), run(seed + 50, stalled=stalled(seed + 50)))
        assert not comparison.is_slower
        assert comparison.disturbance_ms > 4


def test_what_other_programs_disturbed_is_not_judged(run, capsys):
    slow = run(2, changed=slower(3.0, "ood-engine"))
    rows = [{**row, "disturbed": row["N"] > 8} for row in slow["rows"]]
    comparison = compare(run(1), {**slow, "rows": rows})
    assert verdicts(comparison, "ood-engine") == {"slower", "disturbed"}
    assert comparison.disturbed == pytest.approx(0.6)
    assert comparison.providers == []
    print_comparison(comparison)
    assert "not judged, since other programs wanted the same cores: 60% of the rows" in capsys.readouterr().out
    one_thread = [{**row, "threads": 1} for row in rows]
    assert verdicts(compare(run(1), {**slow, "rows": one_thread}), "ood-engine") == {"slower"}


def test_a_peer_that_is_erratic_where_it_takes_long_hides_nothing_short(run):
    def erratic(row):
        return {"pytorch-ood": 2.0 if row["N"] == 512 else 1.0, "ood-engine": 2.2}.get(row["provider"], 1.0)

    options = {"noise": 0.01, "between": 0.01}
    comparison = compare(run(1, **options), run(2, changed=erratic, **options))
    assert comparison.disturbance_ms > 500
    hit = [row["shape"] for row in comparison.rows if row["verdict"] == "slower"]
    assert hit == [f"N={size}" for size in SIZES[:-1]]


def test_few_rounds_are_trusted_less(run):
    change = slower(1.5, "ood-engine")
    options = {"noise": 0.01, "between": 0.01}
    many = compare(run(1, **options), run(2, changed=change, **options))
    few = compare(run(1, rounds=1, **options), run(2, changed=change, rounds=1, **options))
    assert verdicts(many, "ood-engine") == {"slower"}
    assert few.rows[0]["high"] > 1.15 * few.rows[0]["ratio"]
    assert few.rows[0]["low"] < few.rows[0]["ratio"] / 1.15
    assert many.rows[0]["high"] < 1.1 * many.rows[0]["ratio"]
    assert many.rows[0]["low"] > many.rows[0]["ratio"] / 1.1


def test_the_same_seed_gives_the_same_intervals(run):
    assert compare(run(1), run(2)) == compare(run(1), run(2))
    assert compare(run(1), run(2), seed=1).rows[0]["low"] != compare(run(1), run(2)).rows[0]["low"]


def test_what_is_only_in_one_run_is_named(run):
    fewer = {name: weight for name, weight in PROVIDERS.items() if name != "pytorch-ood"}
    more = PROVIDERS | {"oodeel": 4.0}
    comparison = compare(run(), run(providers=fewer))
    assert len(comparison.only_old) == len(SIZES)
    assert all("pytorch-ood" in name for name in comparison.only_old)
    assert comparison.only_new == []
    assert all("oodeel" in name for name in compare(run(), run(providers=more)).only_new)


def test_refused_rows_are_not_compared(run, row):
    document = run()
    document["rows"].append(row("bad", None, N=1, refused="wrong"))
    assert compare(document, document).rows == compare(run(), run()).rows


def test_nothing_in_common_is_no_verdict(run):
    comparison = compare(run(providers={"ood-engine": 1.0}), run(providers={"reference": 1.0}))
    assert comparison.rows == []
    assert not comparison.is_slower


def test_the_machine_is_told_first(run, capsys):
    comparison = compare(run(cpu="A", torch="2.12", threads=2), run(cpu="B", torch="2.12", threads=2))
    assert comparison.facts == ["cpu: A → B"]
    print_comparison(comparison)
    assert capsys.readouterr().out.startswith("not the same: cpu: A → B\n")


def test_what_is_slower_stands_first_in_the_table(run, capsys):
    print_comparison(compare(run(1), run(2, changed=slower(3.0, "ood-engine"))))
    table = capsys.readouterr().out.partition("row by row\n")[2].splitlines()
    assert [line.split()[0] for line in table[1:11]] == ["slower"] * 10
    assert table[-1] == "10 slower, 0 faster, 20 within noise, 0 disturbed, 10 control"
