"""The factored basis against PCA of materialised gradients, the dual basis, and its own promise about the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ood_engine.errors import InputError, NotFittedError, OodEngineWarning
from ood_engine.subspace import DualBasis, ExplicitBasis, FactoredBasis
from ood_kernels.reference import COTANGENTS

NORMALISATIONS = ["none", "nfk-separable"]


def up_to_sign(found, expected):
    return found * (found * expected).sum(0).sign()


@pytest.mark.parametrize("samples", [24, 60], ids=["through the Gram matrix", "through the covariance"])
@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_full_ranks_are_scikit_learns_pca(samples, cotangent, bias, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem(samples)
    gradients = autograd_gradients(h, weight, head_bias, cotangent, bias).flatten(1).numpy()
    pca = PCA(n_components=4, svd_solver="full").fit(gradients)
    options = {"n_components": 4, "cotangent": cotangent, "bias": bias, "ranks": (4, 7 + bias)}
    basis = FactoredBasis.fit(p, h, **options)
    expected = torch.from_numpy(pca.transform(gradients))
    torch.testing.assert_close(up_to_sign(basis.project(p, h), expected), expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(basis.explained.numpy(), pca.explained_variance_ratio_, rtol=0, atol=1e-8)
    assert float(basis.captured) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(basis.mean.flatten().numpy(), pca.mean_, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [24, 60])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_full_ranks_equal_the_dual_basis_signs_included(samples, normalisation, make_problem):
    p, h, *_ = make_problem(samples)
    options = {"n_components": 5, "normalisation": normalisation}
    dual, factored = DualBasis.fit(p, h, **options), FactoredBasis.fit(p, h, tolerance=0, **options)
    fresh_p, fresh_h, *_ = make_problem(10, seed=3)
    assert (factored.project(fresh_p, fresh_h) - dual.project(fresh_p, fresh_h)).abs().max() < 1e-9
    for norm in ("centred_norm", "residual_norm"):
        found, expected = (getattr(basis, norm)(fresh_p, fresh_h) for basis in (factored, dual))
        assert (found - expected).abs().max() < 1e-7


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


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_norms_are_those_of_its_explicit_form(normalisation, bias, make_problem):
    p, h, *_ = make_problem(40)
    basis = FactoredBasis.fit(p, h, n_components=3, ranks=(2, 4), normalisation=normalisation, bias=bias)
    explicit = basis.to_explicit()
    assert explicit.normalisation == normalisation
    for method in ("project", "centred_norm", "residual_norm"):
        found, expected = (getattr(each, method)(p, h) for each in (basis, explicit))
        assert (found - expected).abs().max() < 1e-8
    assert basis.to_factored() is basis


def test_flops_and_bytes_are_those_of_the_products(make_problem):
    p, h, *_ = make_problem()
    basis = FactoredBasis.fit(p, h, n_components=3, ranks=(2, 4))
    assert basis.flops(10) == 2 * 10 * (4 * 2 + 8 * 4 + 3 * 2 * 4)
    assert basis.bytes == 8 * (4 * 2 + 8 * 4 + 3 * 2 * 4 + 3)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("kind", [DualBasis, ExplicitBasis])
@pytest.mark.parametrize("bias", [True, False])
def test_conversion_without_loss_changes_nothing(kind, normalisation, bias, make_problem):
    p, h, *_ = make_problem(40)
    basis = kind.fit(p, h, n_components=5, normalisation=normalisation, bias=bias)
    factored = basis.to_factored(tolerance=0)
    for method in ("project", "centred_norm", "residual_norm"):
        found, expected = (getattr(each, method)(p, h) for each in (factored, basis))
        assert (found - expected).abs().max() < 1e-7
    assert float(factored.captured) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.4])
def test_conversion_loses_no_more_than_the_tolerance_and_the_forms_agree(tolerance, make_problem):
    p, h, *_ = make_problem(60, 6, 10)
    basis = DualBasis.fit(p, h, n_components=5)
    factored, through = basis.to_factored(tolerance), basis.to_explicit().to_factored(tolerance)
    assert factored.ranks == through.ranks < (6, 11)
    assert (factored.project(p, h) - through.project(p, h)).abs().max() < 1e-9
    vectors, kept = (each.to_explicit().fitted("components").flatten(1) for each in (basis, factored))
    captured = (basis.explained * kept.square().sum(1)).sum() / basis.explained.sum()
    assert float(factored.captured) == pytest.approx(float(captured), abs=1e-10)
    assert captured >= 1 - tolerance
    centred = p[:, :, None] * torch.cat([h, torch.ones(60, 1)], 1)[:, None, :] - basis.mean
    span = torch.linalg.qr(kept.T)[0]
    outside = centred.flatten(1) - centred.flatten(1) @ span @ span.T
    assert (factored.residual_norm(p, h) - outside.norm(dim=1)).abs().max() < 1e-7
    assert (vectors - kept).norm() > 1e-3


def test_a_product_of_two_spaces_cannot_hold_nfk(make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(InputError, match="normalisation='nfk' scales every entry"):
        ExplicitBasis.fit(p, h, normalisation="nfk").to_factored()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_state_is_its_buffers(normalisation, make_problem):
    p, h, *_ = make_problem()
    basis = FactoredBasis.fit(p, h, n_components=3, normalisation=normalisation)
    loaded = FactoredBasis()
    assert not loaded.is_fitted
    loaded.load_state_dict(basis.state_dict())
    assert loaded.is_fitted
    assert loaded.normalisation == normalisation
    for method in ("project", "residual_norm"):
        assert torch.equal(getattr(loaded, method)(p, h), getattr(basis, method)(p, h))
    assert loaded.half().fitted("core").dtype == torch.float64


def test_fp32_in_gives_fp32_out(make_problem):
    p, h, *_ = make_problem(40)
    single = FactoredBasis.fit(p.float(), h.float(), n_components=3, tolerance=0)
    found, expected = (
        single.project(p.float(), h.float()),
        FactoredBasis.fit(p, h, n_components=3, tolerance=0).project(p, h),
    )
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_agrees_with_the_dual_basis_in_fp32_with_many_classes():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((80, 256), generator=generator).relu()
    p = (0.2 * h @ torch.randn((200, 256), generator=generator).T).softmax(1)
    dual = DualBasis.fit(p[:60], h[:60], n_components=10)
    expected = dual.project(p, h)
    for exact in (FactoredBasis.fit(p[:60], h[:60], n_components=10, tolerance=0), dual.to_factored(tolerance=0)):
        assert max(exact.ranks) <= 60
        assert (exact.project(p, h) - expected).abs().max() < 1e-5 * expected.abs().max()
    for near in (FactoredBasis.fit(p[:60], h[:60], n_components=10, tolerance=0.05), dual.to_factored(tolerance=0.05)):
        assert 0.95 <= float(near.captured) < 1
        assert near.flops(1) < FactoredBasis.fit(p[:60], h[:60], n_components=10, tolerance=0).flops(1)


def test_only_the_first_samples_are_read(make_problem):
    p, h, *_ = make_problem(40)
    limited, alone = FactoredBasis.fit(p, h, max_anchors=20), FactoredBasis.fit(p[:20], h[:20])
    assert torch.equal(limited.project(p, h), alone.project(p, h))


@pytest.mark.parametrize("samples", [12, 60])
def test_says_where_gradients_span_fewer_directions(samples, make_problem):
    p, h, *_ = make_problem(4, 3, 3)
    p, h = p.repeat(samples // 4, 1), h.repeat(samples // 4, 1)
    with pytest.warns(OodEngineWarning, match=rf"the {samples} anchor gradients span 3 directions, so 3 are kept"):
        basis = FactoredBasis.fit(p, h, n_components=8, tolerance=0)
    assert basis.project(p, h).isfinite().all()


def test_refuses_what_it_cannot_do(make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(InputError, match="all 40 anchor gradients are equal"):
        FactoredBasis.fit(p[:1].expand(40, -1), h[:1].expand(40, -1))
    with pytest.warns(OodEngineWarning, match="the 10 anchor gradients span 9 directions, so 9 are kept"):
        assert FactoredBasis.fit(p[:10], h[:10], n_components=10, tolerance=0).n_components == 9
    with pytest.raises(InputError, match=r"ranks=\(5, 1\): expected \(R, Q\) from \(1, 1\) to \(4, 8\)"):
        FactoredBasis.fit(p, h, ranks=(5, 1))
    with pytest.raises(InputError, match="normalisation='nfk': expected 'none' or 'nfk-separable'; 'nfk' scales"):
        FactoredBasis.fit(p, h, normalisation="nfk")
    with pytest.raises(InputError, match="1 of 40 samples have NaN"):
        FactoredBasis.fit(p, h.clone().index_fill_(0, torch.tensor([3]), torch.nan))
    with pytest.raises(NotFittedError, match="FactoredBasis is not fitted"):
        FactoredBasis().project(p, h)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), "small"])
def test_refuses_other_tolerances(tolerance, make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(InputError, match=r"tolerance=.*: expected the largest share"):
        FactoredBasis.fit(p, h, tolerance=tolerance)


def test_refuses_an_eigenproblem_that_is_too_large(make_problem, monkeypatch):
    p, h, *_ = make_problem()
    monkeypatch.setattr("ood_engine.subspace.factored.LARGEST_EIGENPROBLEM", 16)
    with pytest.raises(
        InputError, match="40 samples and ranks 4 x 8 need an eigenproblem of size 32: expected at most 16"
    ):
        FactoredBasis.fit(p, h, tolerance=0)
    assert FactoredBasis.fit(p, h, tolerance=0, max_anchors=16).n_components > 0
