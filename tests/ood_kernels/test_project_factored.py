from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.bases import FactoredTensors

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_basis(classes=6, channels=5, ranks=(3, 4), components=7, *, bias=True, kind="energy", dtype=torch.float64):
    class_rank, feature_rank = ranks
    return FactoredTensors(
        normal(classes, class_rank, seed=1).to(dtype),
        normal(channels + bias, feature_rank, seed=2).to(dtype),
        normal(components, class_rank, feature_rank, seed=3).to(dtype),
        normal(components, seed=4).to(dtype),
        kind,
        bias,
    )


def expanded(basis):
    """The explicit basis of V_k = class_factors · core_k · feature_factorsᵀ, with a loop over k and no clever product."""
    factors, features = basis.class_factors, basis.feature_factors
    vectors = torch.stack([factors @ core @ features.T for core in basis.core])
    return ok.ExplicitTensors(vectors, basis.constants, basis.cotangent, basis.bias)


@pytest.mark.pairwise(
    bias=(True, False),
    kind=reference.COTANGENTS,
    sizes=[(6, 5, (3, 4)), (2, 1, (2, 1)), (9, 7, (1, 8)), (3, 8, (5, 9))],
)
def test_it_is_the_explicit_basis_that_it_expands_to(kind, bias, sizes):
    classes, channels, ranks = sizes
    basis = make_basis(classes, channels, ranks, bias=bias, kind=kind)
    p, h = normal(8, classes, seed=5).softmax(1), normal(8, channels, seed=6)
    expected = reference.project_gradients(p, h, expanded(basis))
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(reference.project_gradients(p, h, basis), expected, **EXACT)


def test_square_orthogonal_factors_lose_nothing():
    p, h, vectors = normal(8, 6).softmax(1), normal(8, 4, seed=1), normal(3, 6, 5, seed=2)
    left, right = (torch.linalg.qr(normal(size, size, seed=size))[0] for size in (6, 5))
    constants = normal(3, seed=3)
    factored = FactoredTensors(left, right, left.T @ vectors @ right, constants)
    explicit = ok.ExplicitTensors(vectors, constants)
    expected = reference.project_gradients(p, h, explicit)
    torch.testing.assert_close(reference.project_gradients(p, h, factored), expected, **EXACT)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), samples=st.integers(0, 4), bias=st.booleans(), scale=st.floats(-3, 3))
def test_linear_in_the_cotangent(seed, samples, bias, scale):
    basis = make_basis(bias=bias)._replace(constants=torch.zeros(7, dtype=torch.float64))
    first, second, h = (
        normal(samples, 6, seed=seed),
        normal(samples, 6, seed=seed + 1),
        normal(samples, 5, seed=seed + 2),
    )
    expected = basis.project(first, h) + scale * basis.project(second, h)
    torch.testing.assert_close(basis.project(first + scale * second, h), expected, **EXACT)
