"""The class-average basis, in both of its forms, against class means of autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.subspace import ClassAverageBasis, DualBasis, ExplicitBasis

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


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), samples=st.integers(4, 40), classes=st.integers(2, 6))
def test_both_forms_agree_on_any_samples(make_problem, seed, samples, classes):
    p, h, *_ = make_problem(samples, classes, 5, seed=seed)
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, 1])
    explicit, dual = (ClassAverageBasis.fit(p, h, labels=labels, **form) for form in FORMS.values())
    assert isinstance(explicit.form, ExplicitBasis)
    assert isinstance(dual.form, DualBasis)
    assert explicit.to_explicit().whitening is not None
    assert torch.equal(explicit.classes, dual.classes)
    assert (explicit.project(p, h) - dual.project(p, h)).abs().max() < 1e-8
    assert 0 < float(explicit.explained.sum()) <= 1 + 1e-9
    assert (explicit.residual_norm(p, h) - dual.residual_norm(p, h)).abs().max() < 1e-6


def test_few_anchors_stand_for_their_class(problem):
    p, h, labels, *_ = problem
    basis = ClassAverageBasis.fit(p, h, labels=labels, max_anchors=13, max_bytes=0)
    rows = torch.cat([(labels == c).nonzero()[:3, 0] for c in (0, 1, 2, 4)])
    assert basis.classes.tolist() == [0, 1, 2, 4]
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
    gradients = (p[:, :, None] * torch.cat([h, torch.ones_like(h[:, :1])], 1)[:, None, :]).flatten(1)
    inside = (gradients - gradients.mean(0)).square().sum(1) - basis.residual_norm(p, h).square()
    assert (inside - found[:, 0].square()).abs().max() < 1e-8


@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
def test_refuses_samples_without_difference(form, normalisation, make_problem):
    p, h, *_ = make_problem()
    options = {"normalisation": normalisation, **form}
    with pytest.raises(InputError, match="all 40 samples have class 2: expected at least 2 classes"):
        ClassAverageBasis.fit(p, h, labels=torch.full((40,), 2), **options)
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
    with pytest.raises(InputError, match="normalisation='nfk' needs the class means themselves, 1280 bytes"):
        ClassAverageBasis.fit(p, h, labels=labels, normalisation="nfk", max_bytes=1000)
