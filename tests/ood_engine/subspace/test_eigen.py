"""PCA through the Gram matrix against the decomposition of materialised gradients, and what is too large for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.detectors import create_detector
from ood_engine.errors import InputError
from ood_engine.subspace import ClassAverageBasis, DualBasis, ExplicitBasis, FactoredBasis
from ood_engine.subspace.eigen import LARGEST_EIGENPROBLEM, gram_pca

TOO_MANY = LARGEST_EIGENPROBLEM + 1


def make_gradients(samples=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay = 0.8 ** torch.arange(36, dtype=torch.float64)
    return decay * torch.randn((samples, 36), generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("wanted", [1, 6, 20, 0.3, 0.999])
def test_components_are_those_of_a_singular_value_decomposition(wanted, is_centred):
    gradients = make_gradients()
    centred = gradients - gradients.mean(0)
    gram = centred @ centred.T if is_centred else gradients @ gradients.T
    coefficients, eigenvalues, explained, constants, mean_square = gram_pca(gram, wanted, is_centred=is_centred)
    _, singular, expected = torch.linalg.svd(centred, full_matrices=False)
    shares = singular.square() / singular.square().sum()
    kept = wanted if isinstance(wanted, int) else int((shares.cumsum(0) < wanted).sum()) + 1
    assert len(eigenvalues) == len(explained) == kept
    assert (eigenvalues - singular[:kept].square()).abs().max() < 1e-10 * eigenvalues[0]
    assert (explained - shares[:kept]).abs().max() < 1e-10
    components = coefficients.T @ centred
    assert ((components * expected[:kept]).sum(1).abs() - 1).abs().max() < 1e-10
    mean = torch.zeros(36, dtype=torch.float64) if is_centred else gradients.mean(0)
    assert (constants - components @ mean).abs().max() < 1e-6
    assert float(mean_square) == pytest.approx(float(mean.square().sum()), rel=1e-12, abs=1e-9)
    assert (coefficients.gather(0, coefficients.abs().argmax(0, keepdim=True)) > 0).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), distinct=st.integers(2, 12), copies=st.integers(2, 6))
def test_duplicates_add_no_component(seed, distinct, copies):
    gradients = make_gradients(distinct, seed).repeat(copies, 1)
    coefficients, eigenvalues, *_ = gram_pca(gradients @ gradients.T, 1 - 1e-9)
    assert coefficients.shape[1] == len(eigenvalues) <= distinct - 1
    assert coefficients.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "normalisation"),
    [(DualBasis, "none"), (DualBasis, "nfk-separable"), (ExplicitBasis, "none"), (ExplicitBasis, "nfk")],
)
def test_more_anchors_than_can_be_decomposed_are_refused_by_name_and_limit(kind, normalisation, make_problem):
    p, h, *_ = make_problem()
    with pytest.raises(InputError, match=r"max_anchors=8193: expected at most 8192, .*; take 8192, .* factored basis"):
        kind.fit(p, h, normalisation=normalisation, max_anchors=TOO_MANY)


def test_what_decomposes_no_gram_matrix_of_anchors_has_no_such_limit(make_problem):
    p, h, *_ = make_problem()
    for kind, options in ((FactoredBasis, {}), (ClassAverageBasis, {"labels": torch.arange(40) % 4, "max_bytes": 0})):
        found, expected = (kind.fit(p, h, max_anchors=most, **options) for most in (TOO_MANY, 40))
        assert torch.equal(found.project(p, h), expected.project(p, h))


def test_a_detector_refuses_too_many_anchors_before_anything_is_run_where_its_basis_has_the_limit():
    for basis in ("auto", "dual", "explicit"):
        with pytest.raises(InputError, match="max_anchors=8193: expected at most 8192"):
            create_detector("low_dim_gradient", basis=basis, max_anchors=TOO_MANY)
    for basis in ("factored", "class_average"):
        create_detector("low_dim_gradient", basis=basis, max_anchors=TOO_MANY)
