"""The subjects around a whole engine: everyone in a case computes the same at sizes of a few, and who does not is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ood_engine as oe
from ood_engine.bench.cases import OURS, Case, Effort, Plan, Provider
from ood_engine.bench.growth import growth_rows
from ood_engine.bench.rivals import LIBRARY
from ood_engine.bench.rows import SIZES
from ood_engine.bench.runner import run
from ood_engine.bench.subjects import engine, files, fitting
from ood_engine.demo import SmallCNN
from ood_kernels.workloads import Workload

QUICK, FULL = (Effort(name, 2, 0.0, 5.0, torch.device("cpu")) for name in ("quick", "full"))
ON_GPU = QUICK._replace(device=torch.device("cuda"))
SUBJECTS = (engine, fitting, files)
TINY_CNN = engine._Model(SmallCNN, "body", (1, 8, 8), Workload("SmallCNN", 64, 8, 8, 8, anchors=24, components=4))


def measured(*plans: Plan) -> list[dict[str, Any]]:
    """The rows, after nothing was missing or refused."""
    rows: list[dict[str, Any]] = []

    def keep(plan: Plan, found: list[dict[str, Any]], missing: Any) -> None:
        assert not missing
        rows.extend(found)

    run(plans, QUICK, {"device": "cpu"}, keep)
    assert [row["refused"] for row in rows] == [None] * len(rows)
    assert all(row["p50_ms"] > 0 for row in rows)
    return rows


def by_provider(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in rows}


def refusal(case: Case, name: str, spoil: Callable[[Any], Any]) -> str | None:
    """Why a provider is refused whose result is spoilt before it is held to the truth; the others stay."""

    def changed(provider: Provider) -> Provider:
        return provider._replace(call=lambda: spoil(provider.call())) if provider.name == name else provider

    rows: list[dict[str, Any]] = []
    spoilt = case._replace(providers=[changed(provider) for provider in case.providers])
    run([Plan("s", "w", {"N": 1}, lambda: spoilt)], QUICK, {}, lambda _, found, __: rows.extend(found))
    assert all(row["refused"] is None for row in rows if row["provider"] != name)
    return by_provider(rows)[name]["refused"]


@pytest.mark.parametrize("effort", [QUICK, FULL, ON_GPU, ON_GPU._replace(name="full")])
def test_plans_are_cheap_and_their_series_are_long_enough(effort):
    for subject in SUBJECTS:
        series: dict[tuple[Any, ...], list[int]] = {}
        for plan in subject.plans(effort):
            assert set(plan.sizes) <= set(SIZES)
            for along in plan.sweeps:
                fixed = {name: size for name, size in plan.sizes.items() if name != along}
                series.setdefault((plan.subject, plan.workload, along, *fixed.items()), []).append(plan.sizes[along])
        assert series
        for name, points in series.items():
            assert len(set(points)) >= 3, name
            assert max(points) >= 8 * min(points), name


@pytest.fixture(scope="module")
def engines() -> list[Plan]:
    return list(engine._plans(QUICK, TINY_CNN, (1, 3)))


def test_scores_around_a_forward_agree_with_fp64(engines):
    rows = measured(*engines)
    forward, *scored = rows[:4]
    assert forward["provider"] == engine.FORWARD
    assert forward["max_error"] is None
    assert [row["provider"] for row in scored] == [OURS, engine.ALONE, engine.ALL_DETECTORS]
    assert all(0 < row["max_error"] < 1e-4 for row in scored)
    assert forward["flops"] < scored[0]["flops"] == forward["flops"] + scored[1]["flops"]
    assert [row["samples_run"] for row in rows] == [1] * 5 + [3] * 5


@pytest.mark.parametrize("detector", [*oe.engine.DEFAULT_DETECTORS, "exgrad"])
def test_an_engine_with_one_wrong_score_is_refused(engines, detector):
    case = engines[1].build()

    def spoil(scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: score * (1.001 if name == detector else 1) for name, score in scores.items()}

    has_it = detector in oe.engine.DEFAULT_DETECTORS
    assert (refusal(case, OURS, spoil) is not None) == has_it
    assert "largest error" in (refusal(case, engine.ALL_DETECTORS, spoil) or "")


def test_the_model_is_built_once_for_all_batch_sizes(engines):
    first, second = (plan.build.args[0]() for plan in engines)
    assert first is second


def test_the_cost_of_a_forward_follows_from_its_shapes():
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 4 * 4, 7))

    cost = engine.forward_cost(make, (2, 3, 4, 4), itemsize=2)
    assert cost.flops == 2 * 2 * (5 * 3 * 9 * 16 + 80 * 7)
    assert cost.bytes == 2 * (5 * 27 + 5 + 80 * 7 + 7 + 2 * 48 + 2 * 7)


def test_a_dual_basis_agrees_with_pca_of_gradients():
    plans = fitting._plans(QUICK, "fit dual basis", fitting._build_basis, "tiny", "n", (20, 40, 160), {"K": 6})
    rows = measured(*plans)
    assert [row["provider"] for row in rows[:2]] == [OURS, fitting.SCIKIT_LEARN]
    assert {row["n"] for row in rows} == {20, 40, 160}
    assert {row["along"] for row in growth_rows(rows)} == {"n"}


def test_gradients_are_not_formed_where_they_are_large(monkeypatch):
    monkeypatch.setitem(fitting._MOST_GRADIENTS, "quick", 20 * 3 * 11)
    plans = fitting._plans(QUICK, "fit dual basis", fitting._build_basis, "tiny", "n", (20, 21), {"K": 5})
    assert [len(plan.build().providers) for plan in plans] == [2, 1]


@pytest.mark.parametrize("column", [0, 5])
def test_a_basis_with_one_wrong_component_is_refused(column):
    (plan,) = fitting._plans(QUICK, "fit dual basis", fitting._build_basis, "tiny", "n", (40,), {"K": 6})
    case = plan.build()

    def turn_sign(basis: Any) -> Any:
        for name in ("coefficients", "constants", "linear"):
            basis.fitted(name)[..., column] *= -1
        return basis

    def drop(basis: Any) -> Any:
        for name in ("coefficients", "constants", "linear"):
            basis.fitted(name)[..., column] = 0
        return basis

    assert refusal(case, OURS, turn_sign) is None
    assert "largest error" in (refusal(case, OURS, drop) or "")


def test_gathered_statistics_agree_with_products_of_all_samples():
    plans = fitting._plans(QUICK, "gather statistics", fitting._build_statistics, "tiny", "n", (50, 5000), {})
    rows = measured(*plans)
    assert [row["provider"] for row in rows[:2]] == [OURS, LIBRARY]
    ours, products = (row for row in rows[3:] if row["provider"] in (OURS, LIBRARY))
    assert ours["max_error"] < 1e-6
    assert products["max_error"] == 0
    assert ours["samples_run"] is None


def test_statistics_that_miss_a_sample_are_refused():
    (plan,) = fitting._plans(QUICK, "gather statistics", fitting._build_statistics, "tiny", "n", (50,), {})

    def forget(statistics: Any) -> Any:
        statistics.feature_moment *= 49 / 50
        return statistics

    assert "largest error" in (refusal(plan.build(), OURS, forget) or "")


def test_an_engine_fitted_from_features_agrees_with_one_in_fp64():
    rows = measured(*fitting._plans(FULL, "fit whole engine", fitting._build_engine, "tiny", "n", (80,), {"K": 4}))
    assert [row["provider"] for row in rows] == [OURS, engine.ALL_DETECTORS]
    assert all(row["max_error"] < 1e-4 for row in rows)


def test_an_engine_fitted_to_other_features_is_refused():
    (plan,) = fitting._plans(QUICK, "fit whole engine", fitting._build_engine, "tiny", "n", (80,), {"K": 4})

    def fit_again(fitted: oe.Engine) -> oe.Engine:
        return fitted.refit(n_components=3)

    assert "largest error" in (refusal(plan.build(), OURS, fit_again) or "")


def test_a_folder_of_images_is_scored_into_a_table():
    rows = by_provider(measured(files._plan(QUICK, 5)))
    assert rows[OURS]["max_error"] < 1e-3
    assert rows[files.READING]["max_error"] is None
    assert rows[files.READING]["flops"] == 0
    assert rows[OURS]["bytes"] == rows[files.READING]["bytes"] + rows[engine.FORWARD]["bytes"]


def test_a_table_with_a_wrong_score_is_refused_and_the_folder_goes_with_the_case():
    case = files._plan(QUICK, 3).build()
    folder: Path = case.providers[0].call.args[0].path
    assert sorted(path.name for path in folder.iterdir()) == ["images", "state.safetensors", "weights.safetensors"]

    def spoil(table: Path) -> Path:
        from pyarrow import compute, parquet

        rows = parquet.read_table(table)
        position = rows.column_names.index("opnp_score")
        changed = rows.set_column(position, "opnp_score", compute.multiply(rows["opnp_score"], 1.01))
        parquet.write_table(changed, table)
        return table

    assert "largest error" in (refusal(case, OURS, spoil) or "")
    assert case.providers[0].check(case.providers[0].call())[0].shape == (3,)
    del case
    gc.collect()
    assert not folder.exists()


def test_a_command_that_fails_raises_what_it_said():
    call = files._plan(QUICK, 3).build().providers[0].call
    folder = call.args[0]
    call()
    folder.state.write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"state\.safetensors"):
        call()


def test_an_interruption_of_the_command_interrupts_the_benchmark(monkeypatch):
    case = files._plan(QUICK, 3).build()
    monkeypatch.setattr("ood_engine.cli.application.run", lambda arguments: 130)
    with pytest.raises(KeyboardInterrupt):
        case.providers[0].call()
