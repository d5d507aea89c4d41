"""The factored basis against PCA of materialised gradients, the dual basis, and its own promise about the error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ood_engine.errors import InputError
from ood_engine.subspace import DualBasis, FactoredBasis


def up_to_sign(found, expected):
    return found * (found * expected).sum(0).sign()


@pytest.mark.parametrize("ranks", [(2, 3), (1, 1), (4, 2), (3, 8)])
@pytest.mark.parametrize("cotangent", ["energy", "predicted"])
def test_is_pca_of_the_gradients_reduced_to_both_factors(ranks, cotangent, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem(40)
    basis = FactoredBasis.fit(p, h, n_components=1, cotangent=cotangent, ranks=ranks)
    assert basis.ranks == ranks
    gradients = autograd_gradients(h, weight, head_bias, cotangent, True)
    centred = gradients - gradients.mean(0)
    left = torch.einsum("ncd,ned->ce", centred, centred)
    right = torch.einsum("ncd,nce->de", centred, centred)
    class_factors = torch.linalg.eigh(left)[1][:, -ranks[0] :]
    feature_factors = torch.linalg.eigh(right)[1][:, -ranks[1] :]
    reduced = (class_factors.T @ centred @ feature_factors).flatten(1)
    captured = reduced.square().sum() / centred.square().sum()
    assert float(basis.captured) == pytest.approx(float(captured), abs=1e-10)
    pca = PCA(n_components=1, svd_solver="full").fit(reduced.numpy())
    expected = torch.from_numpy(pca.transform(reduced.numpy()))
    assert (up_to_sign(basis.project(p, h), expected) - expected).abs().max() < 1e-8


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6), tolerance=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 0.9]), samples=st.integers(8, 50)
)
def test_loses_no_more_than_the_tolerance(make_problem, seed, tolerance, samples):
    p, h, *_ = make_problem(samples, 5, 6, seed=seed)
    basis = FactoredBasis.fit(p, h, n_components=0.9, tolerance=tolerance)
    assert 1 - tolerance - 1e-12 <= float(basis.captured) <= 1
    vectors = basis.to_explicit().fitted("components").flatten(1)
    assert (vectors @ vectors.T - torch.eye(len(vectors), dtype=torch.float64)).abs().max() < 1e-8
    assert basis.project(p, h).mean(0).abs().max() < 1e-9


def test_a_larger_tolerance_takes_smaller_ranks(make_problem):
    p, h, *_ = make_problem(60, 6, 10)
    h = h * 0.5 ** torch.arange(10)
    sizes = [FactoredBasis.fit(p, h, n_components=1, tolerance=t).ranks for t in (0.0, 0.05, 0.5)]
    assert sizes[0] == (6, 11)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_are_those_of_its_explicit_form(normalisation, bias, make_problem):
    p, h, *_ = make_problem(40)
    basis = FactoredBasis.fit(p, h, n_components=3, ranks=(2, 4), normalisation=normalisation, bias=bias)
    explicit = basis.to_explicit()
    assert explicit.normalisation == normalisation
    for method in ("project", "residual_norm"):
        found, expected = (getattr(each, method)(p, h) for each in (basis, explicit))
        assert (found - expected).abs().max() < 1e-8


def test_agrees_with_the_dual_basis_in_fp32_with_many_classes():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((80, 256), generator=generator).relu()
    p = (0.2 * h @ torch.randn((200, 256), generator=generator).T).softmax(1)
    dual = DualBasis.fit(p[:60], h[:60], n_components=10)
    expected = dual.project(p, h)
    exact, near = (FactoredBasis.fit(p[:60], h[:60], n_components=10, tolerance=tolerance) for tolerance in (0, 0.05))
    assert max(exact.ranks) <= 60
    assert (exact.project(p, h) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert 0.95 <= float(near.captured) < 1
    assert near.flops(1) < exact.flops(1)


def test_refuses_an_eigenproblem_that_is_too_large(make_problem, monkeypatch):
    p, h, *_ = make_problem()
    monkeypatch.setattr("ood_engine.subspace.factored.LARGEST_EIGENPROBLEM", 16)
    with pytest.raises(
        InputError, match="40 samples and ranks 4 x 8 need an eigenproblem of size 32: expected at most 16"
    ):
        FactoredBasis.fit(p, h, tolerance=0)
    assert FactoredBasis.fit(p, h, tolerance=0, max_anchors=16).n_components > 0
