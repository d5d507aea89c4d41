"""What every basis of the gradient subspace promises, against autograd's gradients and scikit-learn's PCA of them."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA

from ood_engine.errors import InputError, NotFittedError, OodEngineWarning
from ood_engine.subspace import ClassAverageBasis, DualBasis, ExplicitBasis, FactoredBasis
from ood_kernels.reference import COTANGENTS

ROUNDING = {"rtol": 0, "atol": 1e-8}
PCA_CASES = {
    "dual": (DualBasis, "none", {}),
    "dual, separable": (DualBasis, "nfk-separable", {}),
    "explicit": (ExplicitBasis, "none", {}),
    "explicit, nfk": (ExplicitBasis, "nfk", {}),
    "explicit, separable": (ExplicitBasis, "nfk-separable", {}),
    "factored": (FactoredBasis, "none", {"tolerance": 0}),
    "factored, separable": (FactoredBasis, "nfk-separable", {"tolerance": 0}),
}
CLASS_CASES = {
    "class means": (ClassAverageBasis, "none", {}),
    "class means, nfk": (ClassAverageBasis, "nfk", {}),
    "class means, separable": (ClassAverageBasis, "nfk-separable", {}),
    "class anchors": (ClassAverageBasis, "none", {"max_bytes": 0}),
    "class anchors, separable": (ClassAverageBasis, "nfk-separable", {"max_bytes": 0}),
}
CASES = {**PCA_CASES, **CLASS_CASES}
every_case = pytest.mark.parametrize("case", CASES)
pca_case = pytest.mark.parametrize("case", PCA_CASES)


def labels_of(p):
    """Of four classes, of which class 2 has no sample."""
    return torch.tensor([0, 1, 1, 3]).repeat(len(p))[: len(p)]


def fit(case, p, h, **options):
    kind, normalisation, more = CASES[case]
    own = {"labels": labels_of(p)} if case in CLASS_CASES else {"n_components": 3}
    return kind.fit(p, h, **{"normalisation": normalisation, **more, **own, **options})


def scales_of(basis, gradients):
    """I [C, D̃] of the gradients, or u ⊗ v that the basis took in its place."""
    if basis.normalisation == "none":
        return torch.ones_like(gradients[0])
    if basis.normalisation == "nfk-separable":
        return torch.outer(basis.class_scale, basis.feature_scale)
    spread = gradients.std(0, correction=0)
    constant = spread < 1e-12
    return torch.where(constant, (1 / spread[~constant]).max(), 1 / spread)


def definition(case, anchors):
    """Vectors [K, C·D̃] of a basis, and the shares they explain, from centred and scaled gradients [n, C·D̃]."""
    if case in PCA_CASES:
        pca = PCA(n_components=3, svd_solver="full").fit(anchors.numpy())
        return torch.from_numpy(pca.components_), torch.from_numpy(pca.explained_variance_ratio_)
    labels = labels_of(anchors)
    means = torch.stack([anchors[labels == c].mean(0) for c in labels.unique()])
    between = labels.unique(return_counts=True)[1] * means.square().sum(1)
    return means / means.norm(dim=1, keepdim=True), between / anchors.square().sum()


@pytest.mark.pairwise(case=CASES, cotangent=COTANGENTS, bias=[True, False], samples=[24, 60])
def test_is_its_definition_on_autograds_gradients(case, cotangent, bias, samples, make_problem, autograd_gradients):
    p, h, weight, head_bias = make_problem(samples + 10)
    basis = fit(case, p[:samples], h[:samples], cotangent=cotangent, bias=bias)
    gradients = autograd_gradients(h, weight, head_bias, cotangent, bias)
    mean = gradients[:samples].mean(0)
    assert (basis.mean - mean).abs().max() < 1e-12
    scales = scales_of(basis, gradients[:samples])
    scaled = ((gradients - mean) * scales).flatten(1)
    expected, shares = definition(case, scaled[:samples])
    vectors = (basis.to_explicit().fitted("components") / scales).flatten(1)
    signs = (vectors * expected).sum(1).sign() if case in PCA_CASES else torch.ones(len(expected))
    torch.testing.assert_close(vectors * signs[:, None], expected, **ROUNDING)
    torch.testing.assert_close(basis.explained.flatten(), shares, **ROUNDING)
    span = torch.linalg.svd(vectors, full_matrices=False)
    inside = span.Vh[span.S > 1e-8]
    outside = scaled - scaled @ inside.T @ inside
    assert basis.normalisation == CASES[case][1]
    if basis.normalisation == "nfk-separable":
        assert 0 < float(basis.separable_error) < 1
    else:
        assert basis.separable_error is None
    for each in (basis, basis.to_explicit()):
        assert (each.project(p, h) - scaled @ vectors.T).abs().max() < 1e-10
        assert (each.residual_norm(p, h) - outside.norm(dim=1)).abs().max() < 1e-7


@pytest.mark.pairwise(normalisation=["none", "nfk-separable"], bias=[True, False], samples=[24, 60])
def test_all_forms_of_pca_agree_signs_included(normalisation, bias, samples, make_problem):
    p, h, *_ = make_problem(samples)
    options = {"n_components": 4, "normalisation": normalisation, "bias": bias}
    dual, explicit = DualBasis.fit(p, h, **options), ExplicitBasis.fit(p, h, **options)
    for name, value in dual.to_explicit().state_dict().items():
        torch.testing.assert_close(explicit.state_dict()[name], value, rtol=1e-9, atol=1e-10)
    assert explicit.state_dict().keys() == dual.to_explicit().state_dict().keys()
    factored = FactoredBasis.fit(p, h, tolerance=0, **options)
    assert float(factored.captured) == pytest.approx(1, abs=1e-12)
    fresh_p, fresh_h, *_ = make_problem(10, seed=3)
    for each in (explicit, factored, factored.to_explicit()):
        assert each.normalisation == normalisation
        assert (each.project(fresh_p, fresh_h) - dual.project(fresh_p, fresh_h)).abs().max() < 1e-9
        found, expected = (basis.residual_norm(fresh_p, fresh_h) for basis in (each, dual))
        assert (found - expected).abs().max() < 1e-7


@every_case
def test_state_is_its_buffers(case, make_problem):
    p, h, *_ = make_problem()
    basis, loaded = fit(case, p, h), CASES[case][0]()
    assert not loaded.is_fitted
    with pytest.raises(NotFittedError, match=f"{type(loaded).__name__} is not fitted"):
        loaded.project(p, h)
    plain = fit(case, p, h, normalisation="none")
    for each in (basis, plain):
        loaded.load_state_dict(each.state_dict())
        assert loaded.is_fitted
        assert loaded.normalisation == each.normalisation
        for method in ("project", "residual_norm"):
            assert torch.equal(getattr(loaded, method)(p, h), getattr(each, method)(p, h))
    assert getattr(loaded, "classes", None) is None or torch.equal(loaded.classes, plain.classes)
    dtypes = [buffer.dtype for buffer in loaded.buffers()]
    assert torch.float64 in dtypes
    assert [buffer.dtype for buffer in loaded.half().buffers()] == dtypes


@every_case
def test_fp32_in_gives_fp32_out(case, make_problem):
    p, h, *_ = make_problem()
    single, basis = fit(case, p.float(), h.float()), fit(case, p, h)
    found, expected = single.project(p.float(), h.float()), basis.project(p, h)
    assert found.dtype == torch.float32
    tolerance = 1e-5 if CASES[case][1] == "none" else 2e-5
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert (single.residual_norm(p, h) - basis.residual_norm(p, h)).abs().max() < 1e-3


@every_case
def test_a_bad_row_is_nan_in_its_own_norm_only(case, make_problem):
    p, h, *_ = make_problem()
    basis, bad, kept = fit(case, p, h), h.clone(), torch.arange(40) != 3
    bad[3, 2] = torch.nan
    found, sound = basis.residual_norm(p, bad), basis.residual_norm(p, h)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    assert torch.equal(found[kept], sound[kept])


@every_case
def test_refuses_samples_that_give_no_basis(case, make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(InputError, match=r"nothing to fit on: expected samples, got p \[0, 4\] and h \[0, 7\]"):
        fit(case, p[:0], h[:0])
    with pytest.raises(InputError, match="max_anchors=0: expected a whole number of at least 1"):
        fit(case, p, h, max_anchors=0)
    with pytest.raises(InputError, match="1 of 40 samples have NaN or infinite p or h"):
        fit(case, p, h.clone().index_fill_(0, torch.tensor([3]), torch.nan))
    equal = "no entry of the gradients varies" if CASES[case][1] != "none" else "all 40 anchor gradients are equal"
    if case in CLASS_CASES:
        equal = "no entry of the gradients varies|the mean gradients of all 3 classes are equal"
    with pytest.raises(InputError, match=equal):
        fit(case, p[:1].expand(40, -1), h[:1].expand(40, -1))


@pca_case
@pytest.mark.parametrize("samples", [12, 60])
def test_says_where_gradients_span_fewer_directions(case, samples, make_problem):
    p, h, *_ = make_problem(10)
    with pytest.warns(OodEngineWarning, match="the 10 anchor gradients span 9 directions, so 9 are kept"):
        basis = fit(case, p, h, n_components=11)
    assert torch.equal(basis.project(p, h), fit(case, p, h, n_components=9).project(p, h))
    p, h = p[:4].repeat(samples // 4, 1), h[:4].repeat(samples // 4, 1)
    with pytest.warns(OodEngineWarning, match=rf"the {samples} anchor gradients span 3 directions, so 3 are kept"):
        basis = fit(case, p, h, n_components=8)
    assert basis.project(p, h).isfinite().all()
    assert fit(case, p, h, n_components=0.999999).n_components <= 3


@pca_case
def test_only_the_first_anchors_are_used(case, make_problem):
    p, h, *_ = make_problem()
    limited, alone = fit(case, p, h, max_anchors=20), fit(case, p[:20], h[:20])
    assert torch.equal(limited.project(p, h), alone.project(p, h))


@pytest.mark.parametrize("case", ["explicit, nfk", "class means, nfk", "class means, separable"])
def test_a_large_constant_does_not_become_variance(case, make_problem):
    p, h, *_ = make_problem(37)
    h = h * torch.tensor([1e-9, 1, 1, 1, 1, 1, 1])  # whose scale is the largest, which the constant takes
    constant = torch.cat([h, torch.full((37, 1), 1e6 / 3, dtype=torch.float64)], 1)
    found, expected = (fit(case, p, x, cotangent="sum_logits", bias=False) for x in (constant, h))
    assert (found.fitted("components")[:, :, -1] == 0).all()
    assert (found.explained - expected.explained).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("case", "options", "multiplications", "stored"),
    [
        ("dual", {}, 40 * (4 + 7 + 3) + 4 * 3, 40 * 4 + 40 * 7 + 40 * 3 + 3 + 7 + 4 * 3),
        ("explicit", {}, 3 * 4 * 8, 3 * 4 * 8 + 3),
        ("factored", {"ranks": (2, 4)}, 4 * 2 + 8 * 4 + 3 * 2 * 4, 4 * 2 + 8 * 4 + 3 * 2 * 4 + 3),
        ("class means", {}, 3 * 4 * 8, 3 * 4 * 8 + 3),
        ("class anchors", {}, 40 * (4 + 7 + 3) + 4 * 3, None),
    ],
)
def test_flops_and_bytes_are_those_of_the_products(case, options, multiplications, stored, make_problem):
    p, h, *_ = make_problem()
    basis = fit(case, p, h, **options)
    assert basis.flops(10) == 2 * 10 * multiplications
    assert stored is None or basis.bytes == 8 * stored
    assert basis.to_explicit().flops(10) == 2 * 10 * 3 * 4 * 8
    assert basis.to_explicit().to_explicit().n_components == 3


def test_other_arguments_are_refused_by_name(make_problem):
    p, h, *_ = make_problem()
    for wanted in (0, -1, 0.0, 1.0, 1.5, True, "many", float("nan")):
        with pytest.raises(InputError, match=r"n_components=.*: expected a whole number of at least 1, or a share"):
            DualBasis.fit(p, h, n_components=wanted)
    with pytest.raises(InputError, match=r"expected softmax p \[n, C\] and features h \[n, D\], got \[40, 4\] and"):
        DualBasis.fit(p, h[:-1])
    for kind, options, message in (
        (DualBasis, {"normalisation": "nfk"}, "normalisation='nfk': expected 'none'"),
        (ExplicitBasis, {"normalisation": "fisher"}, "expected 'none' or 'nfk' or 'nfk-separable'"),
        (FactoredBasis, {"normalisation": "nfk"}, "expected 'none' or 'nfk-separable'; 'nfk' scales"),
        (DualBasis, {"cotangent": "entropy"}, "cotangent='entropy': expected one of energy, predicted"),
        (FactoredBasis, {"ranks": (5, 1)}, r"ranks=\(5, 1\): expected \(R, Q\) from \(1, 1\) to \(4, 8\)"),
        *((FactoredBasis, {"tolerance": t}, "expected the largest share") for t in (-0.1, 1.0, float("nan"), "small")),
    ):
        with pytest.raises(InputError, match=message):
            kind.fit(p, h, **options)
