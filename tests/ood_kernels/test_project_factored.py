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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", reference.COTANGENTS)
@pytest.mark.parametrize(
    ("classes", "channels", "ranks"), [(6, 5, (3, 4)), (2, 1, (2, 1)), (9, 7, (1, 8)), (3, 8, (5, 9))]
)
def test_it_is_the_explicit_basis_that_it_expands_to(kind, bias, classes, channels, ranks):
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

    def project(a):
        return reference.project_factored(a, h, *basis[:4], bias)

    torch.testing.assert_close(project(first + scale * second), project(first) + scale * project(second), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32_and_fp64_in_fp64(dtype):
    basis = make_basis(dtype=dtype)
    a, h = normal(4, 6).softmax(1).to(dtype), normal(4, 5, seed=1).to(dtype)
    result = reference.project_factored(a, h, *basis[:4])
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wider
    widened = reference.project_factored(a.to(wider), h.to(wider), *(part.to(wider) for part in basis[:4]))
    assert torch.equal(result, widened)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["a", "h"])
def test_a_bad_value_reaches_its_own_sample_alone(bad, which):
    basis = make_basis()
    a, h = normal(4, 6).softmax(1), normal(4, 5, seed=1)
    clean = reference.project_factored(a, h, *basis[:4])
    (a if which == "a" else h)[1, 3] = bad
    result = reference.project_factored(a, h, *basis[:4])
    assert not result[1].isfinite().any()
    torch.testing.assert_close(result[[0, 2, 3]], clean[[0, 2, 3]], **EXACT)


def test_inputs_stay_as_they_were(assert_owned):
    basis = make_basis()
    a, h = normal(4, 6).softmax(1), normal(4, 5, seed=1)
    assert_owned([a, h, *basis[:4]], lambda: [reference.project_factored(a, h, *basis[:4])])


def test_no_tensor_of_samples_by_classes_by_features(largest_tensor):
    basis = make_basis(100, 90, (10, 12), 8)
    a, h = normal(64, 100).softmax(1), normal(64, 90, seed=1)
    assert largest_tensor(lambda: reference.project_factored(a, h, *basis[:4])) <= 100 * 91
