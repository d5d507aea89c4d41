"""The class-average basis, in both of its forms, against class means of autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError, NotFittedError, OodEngineWarning
from ood_engine.subspace import ClassAverageBasis, DualBasis, ExplicitBasis
from ood_kernels.reference import COTANGENTS

FORMS = {"explicit": {}, "dual": {"max_bytes": 0}}


@pytest.fixture(params=FORMS)
def form(request) -> dict[str, int]:
    return FORMS[request.param]


@pytest.fixture
def problem(make_problem):
    """(p, h, labels, weight, bias): five classes, of which class 3 has no sample."""
    p, h, weight, bias = make_problem(40, 5)
    labels = torch.tensor([0, 1, 2, 4]).repeat(10)
    labels[:7] = 1
    return p, h, labels, weight, bias


def columns_of(gradients, labels, scale=1.0):
    """[K, C·D̃] (Ḡ_c - Ḡ) / ‖Ḡ_c - Ḡ‖ of scaled gradients."""
    scaled = gradients * scale
    differences = torch.stack([scaled[labels == c].mean(0) - scaled.mean(0) for c in labels.unique()]).flatten(1)
    return differences / differences.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_columns_are_those_of_autograds_class_means(form, cotangent, bias, problem, autograd_gradients):
    p, h, labels, weight, head_bias = problem
    basis = ClassAverageBasis.fit(p, h, labels=labels, cotangent=cotangent, bias=bias, **form)
    gradients = autograd_gradients(h, weight, head_bias, cotangent, bias)
    columns = columns_of(gradients, labels)
    assert basis.classes.tolist() == [0, 1, 2, 4]
    assert (basis.to_explicit().fitted("components").flatten(1) - columns).abs().max() < 1e-10
    centred = (gradients - gradients.mean(0)).flatten(1)
    assert (basis.project(p, h) - centred @ columns.T).abs().max() < 1e-10
    assert (basis.mean - gradients.mean(0)).abs().max() < 1e-10
    assert (basis.centred_norm(p, h) - centred.norm(dim=1)).abs().max() < 1e-9
    span = torch.linalg.svd(columns, full_matrices=False)
    inside = span.Vh[span.S > 1e-8]
    outside = centred - centred @ inside.T @ inside
    for each in (basis, basis.to_explicit(), basis.to_factored(tolerance=0)):
        assert (each.residual_norm(p, h) - outside.norm(dim=1)).abs().max() < 1e-6


@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
@pytest.mark.parametrize("cotangent", ["energy", "predicted"])
def test_both_forms_agree(normalisation, cotangent, problem):
    p, h, labels, *_ = problem
    options = {"labels": labels, "cotangent": cotangent, "normalisation": normalisation}
    explicit, dual = (ClassAverageBasis.fit(p, h, **options, **form) for form in FORMS.values())
    assert isinstance(explicit.form, ExplicitBasis)
    assert isinstance(dual.form, DualBasis)
    for name in ("constants", "explained", "mean"):
        assert (getattr(explicit, name) - getattr(dual, name)).abs().max() < 1e-10
    assert (explicit.project(p, h) - dual.project(p, h)).abs().max() < 1e-10
    for method in ("centred_norm", "residual_norm"):
        assert (getattr(explicit, method)(p, h) - getattr(dual, method)(p, h)).abs().max() < 1e-6


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), samples=st.integers(4, 40), classes=st.integers(2, 6))
def test_both_forms_agree_on_any_samples(make_problem, seed, samples, classes):
    p, h, *_ = make_problem(samples, classes, 5, seed=seed)
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, 1])
    explicit, dual = (ClassAverageBasis.fit(p, h, labels=labels, **form) for form in FORMS.values())
    assert torch.equal(explicit.classes, dual.classes)
    assert (explicit.project(p, h) - dual.project(p, h)).abs().max() < 1e-8
    assert 0 < float(explicit.explained.sum()) <= 1 + 1e-9
    assert (explicit.residual_norm(p, h) <= explicit.centred_norm(p, h) + 1e-8).all()


@pytest.mark.parametrize("normalisation", ["nfk", "nfk-separable"])
def test_normalised_columns_are_class_means_of_scaled_gradients(normalisation, problem, autograd_gradients):
    p, h, labels, weight, head_bias = problem
    basis = ClassAverageBasis.fit(p, h, labels=labels, normalisation=normalisation)
    gradients = autograd_gradients(h, weight, head_bias, "energy", True)
    scale = 1 / gradients.std(0, correction=0)
    if normalisation == "nfk-separable":
        scale = torch.outer(basis.class_scale, basis.feature_scale)
        assert 0 < float(basis.separable_error) < 1
    columns, centred = columns_of(gradients, labels, scale), ((gradients - gradients.mean(0)) * scale).flatten(1)
    assert (basis.project(p, h) - centred @ columns.T).abs().max() < 1e-9
    span = torch.linalg.svd(columns, full_matrices=False)
    inside = span.Vh[span.S > 1e-8]
    outside = centred - centred @ inside.T @ inside
    assert (basis.residual_norm(p, h) - outside.norm(dim=1)).abs().max() < 1e-6


@pytest.mark.parametrize("normalisation", ["nfk", "nfk-separable"])
def test_a_large_constant_has_no_part_in_normalised_columns(normalisation, problem):
    p, h, labels, *_ = problem
    h = h * torch.tensor([1e-9, 1, 1, 1, 1, 1, 1])  # whose scale is the largest, which the constant takes
    constant = torch.cat([h, torch.full((40, 1), 1e6 / 3, dtype=torch.float64)], 1)
    options = {"labels": labels, "normalisation": normalisation, "cotangent": "sum_logits", "bias": False}
    found, expected = ClassAverageBasis.fit(p, constant, **options), ClassAverageBasis.fit(p, h, **options)
    assert (found.fitted("components")[:, :, -1] == 0).all()
    assert (found.explained - expected.explained).abs().max() < 1e-10


def test_explained_sums_to_the_share_between_classes(form, problem, autograd_gradients):
    p, h, labels, weight, head_bias = problem
    basis = ClassAverageBasis.fit(p, h, labels=labels, **form)
    gradients = autograd_gradients(h, weight, head_bias, "energy", True).flatten(1)
    means = torch.stack([gradients[labels == c].mean(0) for c in labels])
    between = (means - gradients.mean(0)).square().sum() / (gradients - gradients.mean(0)).square().sum()
    assert float(basis.explained.sum()) == pytest.approx(float(between), abs=1e-10)


def test_few_anchors_stand_for_their_class(problem):
    p, h, labels, *_ = problem
    basis = ClassAverageBasis.fit(p, h, labels=labels, max_anchors=13, max_bytes=0)
    rows = torch.cat([(labels == c).nonzero()[:3, 0] for c in (0, 1, 2, 4)])
    assert torch.equal(basis.form.fitted("anchor_features"), h[rows])
    counts = torch.stack([(labels == c).sum() for c in (0, 1, 2, 4)])
    gradients = p[rows, :, None] * torch.cat([h, torch.ones_like(h[:, :1])], 1)[rows, None, :]
    means = gradients.unflatten(0, (4, 3)).mean(1)
    overall = (means * (counts.double() / 40)[:, None, None]).sum(0)
    assert (basis.mean - overall).abs().max() < 1e-10
    columns = (means - overall).flatten(1)
    columns = columns / columns.norm(dim=1, keepdim=True)
    assert (basis.to_explicit().fitted("components").flatten(1) - columns).abs().max() < 1e-10
    assert len(ClassAverageBasis.fit(p, h, labels=labels, max_anchors=1, max_bytes=0).form.fitted("weights")) == 4


def test_flops_bytes_and_conversions_are_those_of_the_form(problem):
    p, h, labels, *_ = problem
    explicit, dual = (ClassAverageBasis.fit(p, h, labels=labels, **form) for form in FORMS.values())
    assert explicit.flops(10) == 2 * 10 * 4 * 5 * 8
    assert explicit.bytes == 8 * (4 * 5 * 8 + 4)
    assert dual.flops(10) == 2 * 10 * (40 * (5 + 7 + 4) + 5 * 4)
    assert not explicit.to_explicit().is_orthonormal


def test_state_says_which_form_it_is(form, problem):
    p, h, labels, *_ = problem
    basis, loaded = (
        ClassAverageBasis.fit(p, h, labels=labels, normalisation="nfk-separable", **form),
        ClassAverageBasis(),
    )
    assert not loaded.is_fitted
    loaded.load_state_dict(basis.state_dict())
    assert loaded.is_fitted
    for method in ("project", "residual_norm"):
        assert torch.equal(getattr(loaded, method)(p, h), getattr(basis, method)(p, h))
    assert torch.equal(loaded.classes, basis.classes)
    assert loaded.half().mean.dtype == torch.float64


def test_fp32_in_gives_fp32_out(form, problem):
    p, h, labels, *_ = problem
    single = ClassAverageBasis.fit(p.float(), h.float(), labels=labels, **form)
    basis = ClassAverageBasis.fit(p, h, labels=labels, **form)
    found, expected = single.project(p.float(), h.float()), basis.project(p, h)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (single.residual_norm(p, h) - basis.residual_norm(p, h)).abs().max() < 1e-3


def test_predicted_classes_stand_in_for_missing_labels(form, problem):
    p, h, *_ = problem
    with pytest.warns(OodEngineWarning, match="without labels: predicted classes are used"):
        found = ClassAverageBasis.fit(p, h, **form)
    assert torch.equal(found.project(p, h), ClassAverageBasis.fit(p, h, labels=p.argmax(1), **form).project(p, h))


def test_a_class_with_the_overall_mean_has_no_column(form, make_problem):
    p, h, *_ = make_problem(12, 4)
    p, h = p.repeat(2, 1), h.repeat(2, 1)
    labels = torch.tensor([0, 1, 2] * 4 + [3] * 12)
    with pytest.warns(
        OodEngineWarning, match=r"1 of 4 classes have the overall mean gradient \(3\), so 3 columns are kept"
    ):
        basis = ClassAverageBasis.fit(p, h, labels=labels, **form)
    assert basis.classes.tolist() == [0, 1, 2]
    assert basis.residual_norm(p, h).isfinite().all()
    assert basis.project(p, h).isfinite().all()


def test_two_balanced_classes_have_opposite_columns(form, make_problem):
    p, h, *_ = make_problem(20, 3)
    basis = ClassAverageBasis.fit(p, h, labels=torch.arange(20) % 2, **form)
    found = basis.project(p, h)
    assert (found[:, 0] + found[:, 1]).abs().max() < 1e-10
    inside = basis.centred_norm(p, h).square() - basis.residual_norm(p, h).square()
    assert (inside - found[:, 0].square()).abs().max() < 1e-8


@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
def test_refuses_samples_without_difference(form, normalisation, make_problem):
    p, h, *_ = make_problem()
    options = {"normalisation": normalisation, **form}
    with pytest.raises(InputError, match="all 40 samples have class 2: expected at least 2 classes"):
        ClassAverageBasis.fit(p, h, labels=torch.full((40,), 2), **options)
    equal = "no entry of the gradients varies|the mean gradients of all 2 classes are equal"
    with pytest.raises(InputError, match=equal):
        ClassAverageBasis.fit(p[:1].expand(40, -1), h[:1].expand(40, -1), labels=torch.arange(40) % 2, **options)
    with pytest.raises(InputError, match="the mean gradients of all 2 classes are equal"):
        ClassAverageBasis.fit(p.repeat(2, 1), h.repeat(2, 1), labels=torch.arange(80) // 40, **options)


def test_refuses_labels_that_are_no_classes(problem):
    p, h, labels, *_ = problem
    with pytest.raises(InputError, match=r"labels: expected whole numbers \[40\], got torch.int64 \[39\]"):
        ClassAverageBasis.fit(p, h, labels=labels[1:])
    with pytest.raises(InputError, match=r"labels: expected whole numbers \[40\], got torch.float32 \[40\]"):
        ClassAverageBasis.fit(p, h, labels=labels.float())
    with pytest.raises(InputError, match="15 of 40 labels are outside 0 to 4"):
        ClassAverageBasis.fit(p, h, labels=torch.where(labels == 1, -1, labels))
    with pytest.raises(InputError, match="1 of 40 samples have NaN"):
        ClassAverageBasis.fit(p, h.clone().index_fill_(0, torch.tensor([3]), torch.nan), labels=labels)
    with pytest.raises(InputError, match="normalisation='nfk' needs the class means themselves, 1280 bytes"):
        ClassAverageBasis.fit(p, h, labels=labels, normalisation="nfk", max_bytes=1000)
    with pytest.raises(NotFittedError, match="ClassAverageBasis is not fitted"):
        ClassAverageBasis().project(p, h)
