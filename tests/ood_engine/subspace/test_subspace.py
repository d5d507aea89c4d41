"""The gradient subspace against autograd and scikit-learn's PCA of the materialised gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ood_engine.errors import InputError, NotFittedError, OodEngineWarning
from ood_engine.subspace import DualBasis, ExplicitBasis
from ood_kernels.reference import COTANGENTS


@pytest.fixture(params=COTANGENTS)
def cotangent(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request) -> bool:
    return request.param


def fit(kind, p, h, **options):
    return kind.fit(p, h, **{"n_components": 5, **options})


@pytest.mark.parametrize("kind", [DualBasis, ExplicitBasis])
def test_coordinates_are_projections_of_autograds_gradients(kind, cotangent, bias, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem()
    basis = fit(kind, p[:30], h[:30], cotangent=cotangent, bias=bias)
    vectors, mean = basis.to_explicit().fitted("components"), basis.mean
    gradients = autograd_gradients(h, weight, head_bias, cotangent, bias)
    assert (mean - gradients[:30].mean(0)).abs().max() < 1e-10
    expected = torch.einsum("ncd,kcd->nk", gradients - mean, vectors)
    assert (basis.project(p, h) - expected).abs().max() < 1e-10


def test_equals_scikit_learns_pca(cotangent, bias, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem()
    gradients = autograd_gradients(h, weight, head_bias, cotangent, bias).flatten(1).numpy()
    pca = PCA(n_components=5, svd_solver="full").fit(gradients)
    basis = fit(DualBasis, p, h, cotangent=cotangent, bias=bias)
    expected = pca.transform(gradients)
    found = basis.project(p, h).numpy()
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(basis.explained.numpy(), pca.explained_variance_ratio_, rtol=0, atol=1e-8)
    vectors = basis.to_explicit().fitted("components").flatten(1).numpy()
    np.testing.assert_allclose(vectors * signs[:, None], pca.components_, rtol=0, atol=1e-8)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_keeps_as_many_components_as_scikit_learn(share, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem()
    gradients = autograd_gradients(h, weight, head_bias, "energy", True).flatten(1).numpy()
    pca = PCA(n_components=share, svd_solver="full").fit(gradients)
    assert DualBasis.fit(p, h, n_components=share).n_components == pca.n_components_


@pytest.mark.parametrize("kind", [DualBasis, ExplicitBasis])
def test_norms_equal_the_materialised_ones(kind, cotangent, bias, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem()
    basis = fit(kind, p[:30], h[:30], cotangent=cotangent, bias=bias)
    vectors = basis.to_explicit().fitted("components").flatten(1)
    centred = (autograd_gradients(h, weight, head_bias, cotangent, bias) - basis.mean).flatten(1)
    assert (basis.centred_norm(p, h) - centred.norm(dim=1)).abs().max() < 1e-10
    outside = centred - centred @ vectors.T @ vectors
    assert (basis.residual_norm(p, h) - outside.norm(dim=1)).abs().max() < 1e-7


def test_only_the_first_anchors_are_used(make_problem):
    p, h, *_ = make_problem()
    limited = fit(DualBasis, p, h, max_anchors=20)
    alone = fit(DualBasis, p[:20], h[:20])
    assert limited.fitted("anchor_features").shape[0] == 20
    assert torch.equal(limited.project(p, h), alone.project(p, h))


def test_explicit_and_dual_agree_in_fp32_at_imagenets_size(make_problem):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((48, 2048), generator=generator).relu()
    p = (0.05 * h @ torch.randn((1000, 2048), generator=generator).T).softmax(1)
    basis = DualBasis.fit(p[:40], h[:40], n_components=3)
    assert basis.fitted("coefficients").dtype == torch.float32
    dual, explicit = basis.project(p, h), basis.to_explicit().project(p, h)
    assert (dual - explicit).abs().max() <= 1e-5 * explicit.abs().max()


def test_flops_and_bytes_are_those_of_the_products(make_problem):
    p, h, *_ = make_problem()
    basis = fit(DualBasis, p, h)
    assert basis.flops(10) == 2 * 10 * (40 * (4 + 7 + 5) + 4 * 5)
    assert basis.bytes == 8 * (40 * 4 + 40 * 7 + 40 * 5 + 5 + 7 + 4 * 5)
    assert basis.to_explicit().flops(10) == 2 * 10 * 5 * 4 * 8
    assert basis.to_explicit().to_explicit().n_components == 5


def test_fit_keeps_no_autograd_history(make_problem):
    p, h, _, _ = make_problem()
    basis = DualBasis.fit(p.requires_grad_(), h.requires_grad_(), n_components=3)
    assert not any(buffer.requires_grad for buffer in basis.buffers())


def test_fit_is_repeatable_and_fixes_signs(make_problem):
    p, h, *_ = make_problem()
    first, again = fit(DualBasis, p, h).fitted("coefficients"), fit(DualBasis, p, h).fitted("coefficients")
    assert torch.equal(first, again)
    assert (first.gather(0, first.abs().argmax(0, keepdim=True)) > 0).all()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), samples=st.integers(6, 30), classes=st.integers(2, 5), width=st.integers(2, 6))
def test_vectors_are_orthonormal_and_coordinates_centred(make_problem, seed, samples, classes, width):
    p, h, *_ = make_problem(samples, classes, width, seed=seed)
    basis = DualBasis.fit(p, h, n_components=2)
    vectors = basis.to_explicit().fitted("components").flatten(1)
    assert (vectors @ vectors.T - torch.eye(2, dtype=torch.float64)).abs().max() < 1e-7
    coordinates = basis.project(p, h)
    assert coordinates.mean(0).abs().max() < 1e-8
    assert (coordinates.square().sum(1) <= basis.centred_norm(p, h).square() + 1e-8).all()


@pytest.mark.parametrize("wanted", [10, 11, 5000])
def test_fewer_anchors_than_components_give_what_they_span(wanted, make_problem):
    p, h, *_ = make_problem(10)
    with pytest.warns(OodEngineWarning, match="the 10 anchor gradients span 9 directions, so 9 are kept"):
        basis = DualBasis.fit(p, h, n_components=wanted)
    assert torch.equal(basis.project(p, h), DualBasis.fit(p, h, n_components=9).project(p, h))


def test_warns_where_gradients_span_fewer_directions(make_problem):
    p, h, *_ = make_problem(40, 2, 2)
    with pytest.warns(
        OodEngineWarning, match=r"n_components=20: the 40 anchor gradients span (\d+) directions, so \1 "
    ):
        basis = DualBasis.fit(p, h, n_components=20)
    assert basis.n_components < 20


@pytest.mark.parametrize("wanted", [0, -1, 0.0, 1.0, 1.5, True, "many", float("nan")])
def test_refuses_other_numbers_of_components(wanted, make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(
        InputError, match=r"n_components=.*: expected a whole number of at least 1, or a share in \(0, 1\)"
    ):
        DualBasis.fit(p, h, n_components=wanted)


def test_refuses_bad_samples(make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(
        InputError, match=r"expected softmax p \[n, C\] and features h \[n, D\], got \[40, 4\] and \[39, 7\]"
    ):
        DualBasis.fit(p, h[:-1])
    bad = h.clone()
    bad[3, 2], bad[5, 0] = torch.nan, torch.inf
    with pytest.raises(InputError, match="2 of 40 samples have NaN or infinite p or h"):
        DualBasis.fit(p, bad)
    with pytest.raises(InputError, match="all 40 anchor gradients are equal"):
        DualBasis.fit(p[:1].expand(40, -1), h[:1].expand(40, -1))
    with pytest.raises(InputError, match="normalisation='nfk': expected 'none'"):
        DualBasis.fit(p, h, normalisation="nfk")
    with pytest.raises(InputError, match="cotangent='entropy': expected one of energy, predicted"):
        DualBasis.fit(p, h, cotangent="entropy")


def test_says_that_it_is_not_fitted(make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(NotFittedError, match="DualBasis is not fitted"):
        DualBasis().project(p, h)


@pytest.mark.parametrize("kind", [DualBasis, ExplicitBasis])
def test_a_bad_row_is_nan_in_its_own_norms_only(kind, make_problem):
    p, h, *_ = make_problem()
    basis = fit(kind, p, h)
    bad = h.clone()
    bad[3, 2] = torch.nan
    for norm in (basis.centred_norm, basis.residual_norm):
        found, sound = norm(p, bad), norm(p, h)
        assert found.isnan().nonzero().flatten().tolist() == [3]
        kept = torch.arange(40) != 3
        assert torch.equal(found[kept], sound[kept])
