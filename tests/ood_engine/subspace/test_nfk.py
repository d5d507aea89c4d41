"""Normalised gradients against scikit-learn's PCA of materialised gradients over their standard deviation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.subspace import ClassAverageBasis, DualBasis, ExplicitBasis, FactoredBasis, nfk
from ood_kernels.reference import COTANGENTS

KINDS = {"nfk": ExplicitBasis, "nfk-separable": DualBasis}


def scales_of(basis, gradients):
    """I [C, D̃] of the gradients, or u ⊗ v that the basis took in its place."""
    if basis.normalisation == "nfk-separable":
        return torch.outer(basis.class_scale, basis.feature_scale)
    spread = gradients.std(0, correction=0)
    constant = spread < 1e-12
    return torch.where(constant, (1 / spread[~constant]).max(), 1 / spread)


@pytest.mark.parametrize("normalisation", KINDS)
@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_pca_of_the_scaled_gradients(normalisation, cotangent, bias, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem(60)
    anchors = 30
    basis = KINDS[normalisation].fit(
        p, h, n_components=3, cotangent=cotangent, bias=bias, normalisation=normalisation, max_anchors=anchors
    )
    gradients = autograd_gradients(h, weight, head_bias, cotangent, bias)
    scaled = gradients * scales_of(basis, gradients[:anchors])
    pca = PCA(n_components=3, svd_solver="full").fit(scaled[:anchors].flatten(1).numpy())
    expected = torch.from_numpy(pca.transform(scaled.flatten(1).numpy()))
    for each in (basis, basis.to_explicit()):
        found = each.project(p, h)
        signs = (found * expected).sum(0).sign()
        assert (found * signs - expected).abs().max() < 1e-8
        np.testing.assert_allclose(each.explained.numpy(), pca.explained_variance_ratio_, rtol=0, atol=1e-8)
        centred = scaled.flatten(1) - torch.from_numpy(pca.mean_)
        assert (each.centred_norm(p, h) - centred.norm(dim=1)).abs().max() < 1e-8
        outside = centred - centred @ torch.from_numpy(pca.components_.T @ pca.components_)
        assert (each.residual_norm(p, h) - outside.norm(dim=1)).abs().max() < 1e-6
        assert (each.mean - gradients[:anchors].mean(0)).abs().max() < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_scales_are_separable_where_the_deviations_are(bias):
    class_part, feature_part = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(8, dtype=torch.float64) * 1e3 + 1
    found = nfk.separate(torch.outer(class_part, feature_part), bias)
    product = torch.outer(found.class_scale, found.feature_scale)
    torch.testing.assert_close(product, 1 / torch.outer(class_part, feature_part), rtol=1e-10, atol=0)
    assert found.error < 1e-10
    assert not bias or found.feature_scale[-1] == 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), width=st.integers(2, 6))
def test_separable_error_is_the_relative_error_of_the_gradients_and_smallest(make_problem, seed, classes, width):
    p, h, *_ = make_problem(30, classes, width, seed=seed)
    basis = DualBasis.fit(p, h, n_components=1, normalisation="nfk-separable")
    gradients = p[:, :, None] * torch.cat([h, torch.ones_like(h[:, :1])], 1)[:, None, :]
    centred = gradients - gradients.mean(0)
    exact = centred / gradients.std(0, correction=0)

    def error(scale):
        return ((centred * scale - exact).square().sum() / exact.square().sum()).sqrt()

    scale = torch.outer(basis.class_scale, basis.feature_scale)
    assert basis.separable_error == pytest.approx(float(error(scale)), abs=1e-8)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        changed = torch.outer(
            basis.class_scale * (1 + 0.2 * torch.rand(classes, generator=generator)),
            basis.feature_scale * (1 - 0.2 * torch.rand(width + 1, generator=generator)),
        )
        assert error(changed) >= basis.separable_error - 1e-6
    spread = nfk.inverse(gradients.std(0, correction=0))
    left, values, right = torch.linalg.svd(spread)
    assert error(values[0] * torch.outer(left[:, 0], right[0])) >= basis.separable_error - 1e-6


def test_constant_entries_take_the_largest_scale(make_problem):
    p, h, *_ = make_problem(40)
    h = h.clone()
    h[:, 2] = 0
    basis = ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk")
    scale = basis.fitted("inverse_deviation")
    assert (scale[:, 2] == scale.max()).all()
    assert (basis.fitted("components")[:, :, 2] == 0).all()
    dual = DualBasis.fit(p, h, n_components=3, normalisation="nfk-separable")
    assert dual.feature_scale[2] == dual.feature_scale.max()
    for each in (basis, dual):
        assert each.residual_norm(p, h + 1).isfinite().all()


def test_a_large_constant_does_not_become_variance(make_problem):
    p, h, *_ = make_problem(37)
    h = h * torch.tensor([1e-9, 1, 1, 1, 1, 1, 1])  # whose scale is the largest, which the constant takes
    constant = torch.cat([h, torch.full((37, 1), 1e6 / 3, dtype=torch.float64)], 1)
    options = {"n_components": 3, "normalisation": "nfk", "cotangent": "sum_logits", "bias": False}
    found, expected = ExplicitBasis.fit(p, constant, **options), ExplicitBasis.fit(p, h, **options)
    assert (found.fitted("components")[:, :, -1] == 0).all()
    assert (found.explained - expected.explained).abs().max() < 1e-10


@pytest.mark.parametrize("normalisation", KINDS)
def test_does_not_depend_on_the_scale_of_a_channel(normalisation, make_problem):
    p, h, *_ = make_problem(40)
    channels = torch.tensor([1e-3, 1, 10, 1e4, 1, 1, 1], dtype=torch.float64)
    basis, scaled = (
        KINDS[normalisation].fit(p, x, n_components=3, normalisation=normalisation, bias=False)
        for x in (h, h * channels)
    )
    assert (basis.project(p, h).abs() - scaled.project(p, h * channels).abs()).abs().max() < 1e-6


def test_none_and_both_normalisations_differ(make_problem):
    p, h, *_ = make_problem(40)
    found = [ExplicitBasis.fit(p, h, n_components=3, normalisation=name) for name in ("none", "nfk", "nfk-separable")]
    assert [each.normalisation for each in found] == ["none", "nfk", "nfk-separable"]
    assert [each.separable_error is None for each in found] == [True, True, False]
    assert (found[1].project(p, h) - found[2].project(p, h)).abs().max() > 1e-3
    assert (found[0].project(p, h) - found[2].project(p, h)).abs().max() > 1e-3


@pytest.mark.parametrize("workspace", [1, 200, 10**6])
def test_blocks_change_nothing(workspace, make_problem, monkeypatch):
    p, h, *_ = make_problem(20)
    expected = ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk").project(p, h)
    monkeypatch.setattr(nfk, "_WORKSPACE_ELEMENTS", workspace)
    assert (ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk").project(p, h) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("normalisation", KINDS)
def test_state_is_its_buffers(normalisation, make_problem):
    p, h, *_ = make_problem()
    kind = KINDS[normalisation]
    basis, loaded = kind.fit(p, h, n_components=3, normalisation=normalisation), kind()
    loaded.load_state_dict(basis.state_dict())
    assert loaded.is_fitted
    assert loaded.normalisation == normalisation
    for method in ("project", "residual_norm"):
        assert torch.equal(getattr(loaded, method)(p, h), getattr(basis, method)(p, h))
    plain = kind.fit(p, h, n_components=3)
    loaded.load_state_dict(plain.state_dict())
    assert loaded.normalisation == "none"
    assert torch.equal(loaded.residual_norm(p, h), plain.residual_norm(p, h))


@pytest.mark.parametrize("normalisation", KINDS)
def test_fp32_in_gives_fp32_out(normalisation, make_problem):
    p, h, *_ = make_problem(40)
    options = {"n_components": 3, "normalisation": normalisation}
    found = KINDS[normalisation].fit(p.float(), h.float(), **options).project(p.float(), h.float())
    expected = KINDS[normalisation].fit(p, h, **options).project(p, h)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("normalisation", KINDS)
def test_says_where_gradients_span_fewer_directions(normalisation, make_problem):
    p, h, *_ = make_problem(4)
    p, h = p.repeat(5, 1), h.repeat(5, 1)
    with pytest.warns(OodEngineWarning, match="the 20 anchor gradients span 3 directions, so 3 are kept"):
        basis = KINDS[normalisation].fit(p, h, n_components=8, normalisation=normalisation)
    assert basis.project(p, h).isfinite().all()


@pytest.mark.parametrize("normalisation", KINDS)
def test_refuses_samples_that_are_equal_and_too_few(normalisation, make_problem):
    p, h, *_ = make_problem()
    kind = KINDS[normalisation]
    with pytest.raises(InputError, match="no entry of the gradients varies"):
        kind.fit(p[:1].expand(40, -1), h[:1].expand(40, -1), normalisation=normalisation)
    with pytest.warns(OodEngineWarning, match="the 10 anchor gradients span 9 directions, so 9 are kept"):
        assert kind.fit(p[:10], h[:10], n_components=10, normalisation=normalisation).n_components == 9
    bad = h.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(InputError, match="1 of 40 samples have NaN"):
        kind.fit(p, bad, normalisation=normalisation)
    with pytest.raises(InputError, match="no entry of the gradients varies"):
        kind.fit(p[:1], h[:1], normalisation=normalisation)


def test_refuses_what_does_not_fit(make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(
        InputError, match="3 components of 4 x 8 gradients take 768 bytes: expected at most max_bytes=700"
    ):
        ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk", max_bytes=700)
    with pytest.raises(InputError, match="expected 'none' or 'nfk' or 'nfk-separable'"):
        ExplicitBasis.fit(p, h, normalisation="fisher")
    for kind, name in ((ExplicitBasis, "nfk"), (DualBasis, "nfk-separable")):
        with pytest.raises(InputError, match=r"leave the range of torch.float32: .* give p or h as float64"):
            kind.fit(p.float(), h.float() * 1e-40, n_components=3, normalisation=name, bias=False)


@pytest.mark.parametrize("kind", [DualBasis, ExplicitBasis, FactoredBasis, ClassAverageBasis])
@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
def test_every_basis_refuses_no_samples_and_no_anchors(kind, normalisation, make_problem):
    p, h, *_ = make_problem()
    labels = torch.arange(40) % 4
    with pytest.raises(InputError, match=r"nothing to fit on: expected samples, got p \[0, 4\] and h \[0, 7\]"):
        kind.fit(p[:0], h[:0], labels=labels[:0], normalisation=normalisation)
    with pytest.raises(InputError, match="max_anchors=0: expected a whole number of at least 1"):
        kind.fit(p, h, labels=labels, normalisation=normalisation, max_anchors=0)


@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_explicit_basis_is_the_dual_one_written_out(normalisation, bias, make_problem):
    p, h, *_ = make_problem(60)
    options = {"n_components": 4, "normalisation": normalisation, "max_anchors": 30, "bias": bias}
    found, expected = ExplicitBasis.fit(p, h, **options), DualBasis.fit(p, h, **options).to_explicit()
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=1e-10)
    for method in ("project", "centred_norm", "residual_norm"):
        assert (getattr(found, method)(p, h) - getattr(expected, method)(p, h)).abs().max() < 1e-7
