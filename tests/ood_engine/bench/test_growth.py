from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.bench.growth import fit_exponent, growth_rows, print_growth
from ood_engine.bench.limits import COPY

ANCHORS = (256, 512, 1024, 2048, 4096)


def series(row, milliseconds, along="n", sizes=ANCHORS, **fields):
    return [
        row(
            p50_ms=milliseconds(size),
            sweeps=[along],
            **{"N": 64, along: size, **{name: f(size) if callable(f) else f for name, f in fields.items()}},
        )
        for size in sizes
    ]


@settings(deadline=None)
@given(
    exponent=st.floats(-1, 4),
    scale=st.floats(1e-6, 1e6),
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=8, unique=True),
)
def test_a_power_is_found_again(exponent, scale, sizes):
    sizes = sorted(sizes)
    fit = fit_exponent(sizes, [scale * size**exponent for size in sizes])
    assert fit.exponent == pytest.approx(exponent, abs=1e-6)
    assert fit.deviation == pytest.approx(1, abs=1e-6)


def test_a_square_where_the_work_is_linear_shows(row):
    linear = {"flops": lambda n: 10 * n, "bytes": lambda n: 4 * n}
    (square,) = growth_rows(series(row, lambda n: 1e-6 * n**2, peak_extra_mib=lambda n: n / 100, **linear))
    assert square["time_exponent"] == pytest.approx(2)
    assert square["memory_exponent"] == pytest.approx(1)
    assert square["work_exponent"] == pytest.approx(1)
    assert square["grows_too_fast"]
    (honest,) = growth_rows(series(row, lambda n: 1e-3 * n, peak_extra_mib=lambda n: n / 100, **linear))
    assert not honest["grows_too_fast"]
    (hoarder,) = growth_rows(series(row, lambda n: 1e-3 * n, peak_extra_mib=lambda n: n * n / 1e4, **linear))
    assert hoarder["grows_too_fast"]


def test_a_constant_offset_is_left_behind_by_the_last_two_points(row):
    (found,) = growth_rows(series(row, lambda n: 1 + (n / 1024) ** 2))
    assert 0.5 < found["time_exponent"] < 1
    assert found["time_last_exponent"] == pytest.approx(1.77, abs=0.01)
    assert found["time_deviation"] > 1.3


def test_what_stays_has_exponent_zero(row):
    (found,) = growth_rows(series(row, lambda n: 3.0, peak_extra_mib=0.0))
    assert found["time_exponent"] == pytest.approx(0, abs=1e-9)
    assert found["memory_exponent"] is None


def test_series_are_kept_apart(row):
    slow = series(row, lambda n: 1e-6 * n**2, provider="reference")
    other = series(row, lambda n: 1e-6 * n**3, N=1)
    copies = series(row, lambda n: n, provider=COPY)
    found = growth_rows([*slow, *other, *copies, *series(row, lambda n: n / 1000)])
    assert {(one["provider"], one["case"]): round(one["time_exponent"], 6) for one in found} == {
        ("reference", "N=64"): 2,
        ("ood-engine", "N=1"): 3,
        ("ood-engine", "N=64"): 1,
    }


def test_a_row_may_belong_to_two_series(row):
    crossed = [row(p50_ms=n * k**2, n=n, K=k, sweeps=["n", "K"]) for n in (1, 10, 100) for k in (1, 10, 100)]
    found = growth_rows(crossed)
    assert len(found) == 6
    assert {(one["along"], round(one["time_exponent"], 6)) for one in found} == {("n", 1), ("K", 2)}


def test_fewer_than_three_points_and_refused_rows_make_no_series(row):
    assert growth_rows(series(row, float, sizes=(1, 2))) == []
    refused = [row(p50_ms=None, sweeps=["n"], n=4, refused="wrong")]
    assert growth_rows([*series(row, float, sizes=(1, 2)), *refused]) == []
    assert growth_rows([row(n=n) for n in ANCHORS]) == []


def test_a_provider_of_fewer_samples_says_nothing_along_their_number(row):
    along_samples = [row(N=n, samples_run=4, sweeps=["N"]) for n in (4, 16, 64)]
    assert growth_rows(along_samples) == []
    (found,) = growth_rows([row(p50_ms=1.0 * r, N=64, samples_run=r, C=10 * r, sweeps=["C"]) for r in (1, 2, 4)])
    assert found["time_exponent"] == pytest.approx(0, abs=1e-9)


def test_time_is_that_of_the_gpu_where_there_is_one(row):
    (found,) = growth_rows(series(row, lambda n: 5.0, device_p50_ms=lambda n: n / 1000))
    assert found["time_exponent"] == pytest.approx(1)


def test_rows_can_be_stored_and_printed(row, capsys):
    growth = growth_rows(series(row, lambda n: 1e-6 * n**2, flops=lambda n: n, bytes=lambda n: n))
    assert json.loads(json.dumps(growth, allow_nan=False)) == growth
    print_growth(growth)
    shown = capsys.readouterr().out
    assert "256–4,096" in shown
    assert "2.00" in shown
    assert "grows faster than the least work" in shown
