from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError, StateError
from ood_engine.features.cache import fingerprint
from ood_engine.subspace import DualBasis
from ood_engine.subspace.base import extend
from ood_engine.subspace.statistics import _ANCHORS, _SUMS, FitStatistics
from ood_kernels import reference


def samples(count=40, classes=4, features=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(count, classes, generator=generator, dtype=dtype).softmax(1)
    h = torch.randn(count, features, generator=generator, dtype=dtype).relu()
    labels = torch.randint(-1, classes, (count,), generator=generator)
    return p, h, fingerprint(h), labels


def gather(parts, **options):
    statistics = FitStatistics(4, 6, **options)
    for part in parts:
        statistics.update(*part)
    return statistics


def assert_equal(ours, theirs, tolerance=1e-12):
    assert ours.count == theirs.count
    for name in _SUMS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)
    for name in _ANCHORS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("cotangent", reference.COTANGENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_sums_are_those_of_the_materialised_gradients(cotangent, bias):
    p, h, marks, labels = samples()
    statistics = gather([(p, h, marks, labels)], cotangent=cotangent, bias=bias)
    gradients = torch.einsum("nc,nd->ncd", reference.cotangent(p, cotangent), extend(h, bias))
    centred = gradients - gradients.mean(0)
    torch.testing.assert_close(statistics.mean, gradients.mean(0))
    assert statistics.variance == pytest.approx(float(centred.square().sum() / len(p)), rel=1e-9)
    assert statistics.class_counts.tolist() == [int((labels == c).sum()) for c in range(4)]
    for c in range(4):
        torch.testing.assert_close(statistics.class_feature_sums[c], extend(h, bias)[labels == c].sum(0))


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(1, 50), st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_merged_parts_equal_the_whole(order, max_anchors, cuts):
    whole = samples()
    bounds = [0, *sorted(cuts), 40]
    parts = [tuple(column[i:j] for column in whole) for i, j in itertools.pairwise(bounds)]
    one = gather([whole], max_anchors=max_anchors)
    merged = FitStatistics(4, 6, max_anchors=max_anchors)
    for index in order:
        merged = merged.merge(gather([parts[index]], max_anchors=max_anchors))
    assert_equal(merged, one)


def test_anchors_are_the_smallest_fingerprints_and_equal_images_count_once():
    p, h, marks, labels = samples()
    twice = tuple(torch.cat([column, column]) for column in (p, h, marks, labels))
    statistics = gather([twice], max_anchors=10)
    assert torch.equal(statistics.anchor_fingerprints, marks.sort().values[:10])
    assert torch.equal(statistics.anchor_h, h[marks.argsort()[:10]])
    assert statistics.count == 80


def test_a_basis_of_the_anchors_is_the_one_of_these_samples():
    p, h, marks, labels = samples()
    statistics = gather([(p, h, marks, labels)], max_anchors=20)
    order = marks.argsort()[:20]
    ours = DualBasis.fit(statistics.anchor_p, statistics.anchor_h, n_components=3)
    theirs = DualBasis.fit(p[order], h[order], n_components=3)
    assert torch.equal(ours.project(p, h), theirs.project(p, h))


def test_a_session_can_go_on_where_another_stopped(tmp_path):
    p, h, marks, labels = samples()
    first = gather([(p[:25], h[:25], marks[:25], labels[:25])], max_anchors=7, cotangent="uniform", bias=False)
    first.save(tmp_path / "statistics.safetensors")
    again = FitStatistics.load(tmp_path / "statistics.safetensors")
    assert_equal(again, first, 0)
    again.update(p[25:], h[25:], marks[25:], labels[25:])
    assert_equal(again, gather([(p, h, marks, labels)], max_anchors=7, cotangent="uniform", bias=False))
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_what_does_not_fit_is_refused(tmp_path):
    p, h, marks, labels = samples()
    statistics = FitStatistics(4, 6)
    with pytest.raises(
        InputError, match=r"expected p \[n, C\], h \[n, D\] and n fingerprints, got \[40, 4\], \[40, 5\]"
    ):
        statistics.update(p, h[:, :5], marks)
    h[3, 2] = torch.nan
    with pytest.raises(InputError, match="samples with NaN or infinite p or h"):
        statistics.update(p, h, marks, labels)
    assert statistics.count == 0
    with pytest.raises(InputError, match="statistics cannot be merged: expected equal settings"):
        statistics.merge(FitStatistics(4, 6, bias=False))
    (tmp_path / "x").write_text("no")
    with pytest.raises(StateError, match="expected statistics written by FitStatistics"):
        FitStatistics.load(tmp_path / "x")
