"""Normalised gradients against scikit-learn's PCA of materialised gradients over their standard deviation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError
from ood_engine.subspace import DualBasis, ExplicitBasis, nfk


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


@pytest.mark.parametrize(("kind", "normalisation"), [(ExplicitBasis, "nfk"), (DualBasis, "nfk-separable")])
def test_does_not_depend_on_the_scale_of_a_channel(kind, normalisation, make_problem):
    p, h, *_ = make_problem(40)
    channels = torch.tensor([1e-3, 1, 10, 1e4, 1, 1, 1], dtype=torch.float64)
    basis, scaled = (kind.fit(p, x, n_components=3, normalisation=normalisation, bias=False) for x in (h, h * channels))
    assert (basis.project(p, h).abs() - scaled.project(p, h * channels).abs()).abs().max() < 1e-6


@pytest.mark.parametrize("workspace", [1, 200, 10**6])
def test_blocks_change_nothing(workspace, make_problem, monkeypatch):
    p, h, *_ = make_problem(20)
    expected = ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk").project(p, h)
    monkeypatch.setattr(nfk, "_WORKSPACE_ELEMENTS", workspace)
    assert (ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk").project(p, h) - expected).abs().max() < 1e-10


def test_refuses_what_does_not_fit(make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(
        InputError, match="3 components of 4 x 8 gradients take 768 bytes: expected at most max_bytes=700"
    ):
        ExplicitBasis.fit(p, h, n_components=3, normalisation="nfk", max_bytes=700)
    for kind, name in ((ExplicitBasis, "nfk"), (DualBasis, "nfk-separable")):
        with pytest.raises(InputError, match=r"leave the range of torch.float32: .* give p or h as float64"):
            kind.fit(p.float(), h.float() * 1e-40, n_components=3, normalisation=name, bias=False)
