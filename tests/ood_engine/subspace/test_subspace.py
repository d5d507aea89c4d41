"""The gradient subspace against autograd and scikit-learn's PCA of the materialised gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ood_engine.subspace import DualBasis


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_keeps_as_many_components_as_scikit_learn(share, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem()
    gradients = autograd_gradients(h, weight, head_bias, "energy", True).flatten(1).numpy()
    pca = PCA(n_components=share, svd_solver="full").fit(gradients)
    assert DualBasis.fit(p, h, n_components=share).n_components == pca.n_components_


def test_explicit_and_dual_agree_in_fp32_at_imagenets_size(make_problem):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((48, 2048), generator=generator).relu()
    p = (0.05 * h @ torch.randn((1000, 2048), generator=generator).T).softmax(1)
    basis = DualBasis.fit(p[:40], h[:40], n_components=3)
    assert basis.fitted("coefficients").dtype == torch.float32
    dual, explicit = basis.project(p, h), basis.to_explicit().project(p, h)
    assert (dual - explicit).abs().max() <= 1e-5 * explicit.abs().max()


def test_fit_keeps_no_autograd_history(make_problem):
    p, h, _, _ = make_problem()
    basis = DualBasis.fit(p.requires_grad_(), h.requires_grad_(), n_components=3)
    assert not any(buffer.requires_grad for buffer in basis.buffers())


def test_fit_is_repeatable_and_fixes_signs(make_problem):
    p, h, *_ = make_problem()
    first, again = (DualBasis.fit(p, h, n_components=5).fitted("coefficients") for _ in range(2))
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
