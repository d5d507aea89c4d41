from __future__ import annotations

import math
import re

import pytest
import torch

import ood_engine as oe
import ood_kernels as ok
from ood_engine.detectors.low_dim_gradient import HEADS
from ood_engine.evaluation.metrics import auroc, fpr_at_tpr
from ood_engine.evaluation.report.sweep import FAMILIES, combinations, write_sweep_figures
from ood_engine.evaluation.sweep import COLUMNS, sweep
from ood_engine.features.cache import CacheRows, FeatureCache
from ood_engine.runtime import Kernels


@pytest.fixture(scope="module")
def caches(engine, images, loader):
    """(fit, ID test, OOD sets)."""
    noise = torch.rand((30, 3, 8, 8), generator=torch.Generator().manual_seed(8))
    dark = 0.2 * torch.rand((20, 3, 8, 8), generator=torch.Generator().manual_seed(9))
    id_cache = engine.extract(loader(*images(40, 11), 64))
    return engine.cache, id_cache, {"noise": engine.extract([noise]), "dark": engine.extract([dark])}


@pytest.fixture
def run(engine, caches):
    """run(**options) → the rows of a sweep of one small basis, unless the options say otherwise."""
    small = {"bases": ["dual"], "components": [4], "heads": ["knn"], "kernels": Kernels()}

    def sweep_with(fit_cache=caches[0], id_cache=caches[1], ood_caches=caches[2], **options):
        options = {**small, **options}
        return sweep(engine.head, options.pop("kernels"), fit_cache, id_cache, ood_caches, **options)

    return sweep_with


@pytest.mark.parametrize(("basis", "head"), [("dual", "knn"), ("explicit", "vim"), ("factored", "projected_norm")])
def test_rows_are_those_of_a_detector_fitted_alone(run, model, id_batches, caches, basis, head):
    _, id_cache, ood_caches = caches
    rows = run(bases=[basis], components=[6], heads=[head, "residual"])
    assert [(row["head"], row["ood_set"]) for row in rows] == [
        (name, ood_set) for name in (head, "residual") for ood_set in ("noise", "dark")
    ]
    settings = {"low_dim_gradient": {"basis": basis, "head": head, "n_components": 6}}
    alone = oe.Engine(model, ["low_dim_gradient"], settings=settings).fit(id_batches)
    scores = {name: alone.scorer.score_cache(cache)["low_dim_gradient"] for name, cache in ood_caches.items()}
    id_scores = alone.scorer.score_cache(id_cache)["low_dim_gradient"]
    fitted = alone.detectors["low_dim_gradient"].basis
    for row in rows[:2]:
        assert tuple(row) == COLUMNS
        assert row["auroc"] == auroc(id_scores, scores[row["ood_set"]])
        assert row["fpr95"] == fpr_at_tpr(id_scores, scores[row["ood_set"]])
        assert row["n_components"] == fitted.n_components == 6
        assert row["refused"] is None
    assert rows[2]["bytes"] == fitted.bytes
    assert rows[2]["flops_per_sample"] == round(fitted.flops(64) / 64)
    bank = 120 * 6 if head == "knn" else 0
    assert rows[0]["flops_per_sample"] - rows[2]["flops_per_sample"] == 2 * bank
    assert rows[0]["bytes"] - rows[2]["bytes"] == 4 * bank


def test_what_is_measured_is_computed_by_the_kernels_given(run, monkeypatch):
    seen, masked_energy = set(), ok.masked_energy

    def spy(*arguments, precision, **options):
        seen.add(precision)
        return masked_energy(*arguments, precision=precision, **options)

    monkeypatch.setattr(ok, "masked_energy", spy)
    run(kernels=Kernels(oe.Runtime(precision="tf32")))
    assert seen == {"tf32"}


@pytest.mark.filterwarnings("ignore:n_components=500")
def test_what_cannot_be_fitted_is_a_row_and_the_sweep_goes_on(run):
    grid = {"bases": ["dual", "explicit"], "components": [4, 500], "normalisations": ["none", "nfk"]}
    rows = run(**grid, heads=["knn", "residual"], max_bytes=30_000)
    reasons = {(row["basis"], row["normalisation"], row["components_wanted"]): row["refused"] for row in rows}
    assert reasons["dual", "none", 4] is None
    assert reasons["explicit", "nfk", 4] is None
    assert re.search(r"a basis of 0\.0\d+ MiB: expected at most 0\.0286 MiB", reasons["dual", "none", 500])
    assert "normalisation='nfk' with basis='dual'" in reasons["dual", "nfk", 4]
    assert re.search(r"a basis of 0\.\d+ MiB: expected at most 0\.0286 MiB", reasons["explicit", "none", 500])
    refused = [row for row in rows if row["refused"] is not None]
    assert len(refused) == 6 * 2 - 2
    assert all(row["auroc"] is None and row["ood_set"] is None for row in refused)
    assert all("\n" not in row["refused"] for row in refused)
    assert [row["refused"] for row in run(max_bytes=9)]


def test_a_head_that_fails_leaves_the_others(run, caches):
    small = FeatureCache(caches[0].rows.select(slice(0, 16)))
    rows = run(small, components=[3], heads=["residual", "knn"])
    assert [row["refused"] is None for row in rows] == [True, True, False]
    assert "k=10 neighbours with a bank of 8" in rows[-1]["refused"]


@pytest.mark.filterwarnings("ignore:n_components=32")
def test_default_components_are_what_the_anchors_can_span(run, caches):
    def wanted(samples):
        fit_cache = FeatureCache(caches[0].rows.select(slice(0, samples)))
        rows = run(fit_cache, bases=("dual", "class_average"), components=None, heads=["residual"])
        return {row["components_wanted"] for row in rows if row["basis"] == "dual"}, rows

    assert wanted(240)[0] == {8, 32}
    assert wanted(12)[0] == {5}
    assert {row["n_components"] for row in wanted(240)[1] if row["basis"] == "class_average"} == {5}


def test_rows_are_handed_over_as_they_come(run):
    lengths = []
    run(heads=["knn", "vim"], on_rows=lambda rows: lengths.append(len(rows)))
    assert lengths == [2, 4]


def test_fit_samples_and_broken_ones_are_not_measured(run, caches):
    fit_cache, id_cache, ood_caches = caches
    expected = [row["auroc"] for row in run()]
    mixed = FeatureCache(CacheRows(*(torch.cat(pair) for pair in zip(id_cache.rows, fit_cache.rows, strict=True))))
    broken = ood_caches["noise"].rows.select(slice(None))
    features = torch.cat([broken.features, torch.full((1, 12), math.nan)])
    others = [torch.cat([column, column[:1]]) for column in broken[1:]]
    with pytest.warns(oe.errors.OodEngineWarning) as caught:
        rows = run(id_cache=mixed, ood_caches={**ood_caches, "noise": FeatureCache(CacheRows(features, *others))})
    assert {str(warning.message) for warning in caught} == {
        "ID: 240 of 280 samples are also fit samples, and are left out",
        "noise: 1 of 31 samples have NaN or infinite features, and are left out",
    }
    assert [row["auroc"] for row in rows] == expected
    with pytest.raises(oe.errors.InputError, match="all 240 samples of ID are also fit samples"):
        run(id_cache=fit_cache)


@pytest.mark.filterwarnings("default::ood_engine.errors.OodEngineWarning")
def test_a_warning_comes_once(run, caches):
    rows = caches[0].rows
    unlabelled = FeatureCache(rows._replace(labels=torch.full_like(rows.labels, -1)))
    with pytest.warns(oe.errors.OodEngineWarning) as caught:
        run(unlabelled, bases=["dual", "class_average"], components=[3, 4], heads=["mahalanobis"])
    assert [str(warning.message).split(",")[0] for warning in caught] == ["120 samples have no label"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bases": ["dual", "pca"]}, "bases: 'pca' is not known"),
        ({"bases": "dual"}, "bases='dual'"),
        ({"heads": []}, "heads="),
        ({"normalisations": ["l2"]}, "'l2'"),
        ({"components": [0]}, "whole numbers"),
        ({"components": [0.9]}, "whole numbers"),
        ({"components": []}, "whole numbers"),
    ],
)
def test_bad_options(run, options, words):
    with pytest.raises(oe.errors.InputError, match=words):
        run(**options)


def test_combinations_are_ranked_by_their_mean():
    def row(head, ood_set, value, flops, refused=None):
        known = {"basis": "dual", "normalisation": "none", "components_wanted": 4, "head": head, "ood_set": ood_set}
        return {**known, "auroc": value, "fpr95": value, "flops_per_sample": flops, "bytes": 1, "refused": refused}

    rows = [row("knn", "a", 0.5, 1), row("knn", "b", 0.75, 1), row("vim", "a", 1.0, 9), row("vim", "b", 0.5, 9)]
    rows += [row("residual", "a", 0.75, 2), row("residual", "b", 0.75, 2), row("probe_msp", None, None, None, "why")]
    found = [(entry["head"], entry["auroc"]) for entry in combinations(rows)]
    assert found == [("residual", 0.75), ("vim", 0.75), ("knn", 0.625)]
    assert write_sweep_figures(rows[-1:], None) == []


def test_every_head_has_a_place_in_the_pictures():
    assert sorted(head for heads in FAMILIES.values() for head in heads) == sorted(HEADS)
