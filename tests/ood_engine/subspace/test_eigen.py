"""Block iteration on the implicit centred Gram matrix against dense decomposition of materialised gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.subspace import DualBasis, eigen
from ood_engine.subspace.eigen import CentredGram, leading_eigenpairs


@pytest.fixture
def iterate(monkeypatch):
    """Every Gram matrix is too large to decompose."""
    monkeypatch.setattr(eigen, "EXACT_ROWS", 1)


@pytest.fixture(params=["kept", "in row blocks"])
def memory(request, monkeypatch, iterate):
    if request.param == "in row blocks":
        monkeypatch.setattr(eigen, "GRAM_BYTES", 0)
        monkeypatch.setattr(eigen, "_BLOCK_ELEMENTS", 7 * 90)


def factors(samples=90, seed=0, offset=3.0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn((samples, 4), generator=generator, dtype=torch.float64).softmax(1)
    decay = 0.5 ** torch.arange(9, dtype=torch.float64)
    h = decay * torch.randn((samples, 9), generator=generator, dtype=torch.float64) + offset
    return a, h


def dense_of(a, h):
    gradients = (a[:, :, None] * h[:, None, :]).flatten(1)
    centred = gradients - gradients.mean(0)
    return gradients, centred, centred @ centred.T


def test_operator_is_the_centred_gram_of_materialised_gradients(memory):
    a, h = factors()
    gram = CentredGram(a, h)
    gradients, centred, dense = dense_of(a, h)
    block = torch.randn((90, 5), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (gram @ block - dense @ block).abs().max() < 1e-10
    assert (gram.dense() - dense).abs().max() < 1e-10
    assert (gram.diagonal() - gradients.square().sum(1)).abs().max() < 1e-10
    assert (gram.row_mean - gradients @ gradients.mean(0)).abs().max() < 1e-10
    assert abs(float(gram.mean - gradients.mean(0).square().sum())) < 1e-10
    assert abs(float(gram.trace() - centred.square().sum())) < 1e-9


def test_large_matrices_are_never_formed(iterate, monkeypatch):
    monkeypatch.setattr(eigen, "GRAM_BYTES", 8 * 90**2 - 1)
    monkeypatch.setattr(eigen, "_BLOCK_ELEMENTS", 7 * 90)
    shapes = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda x, y: shapes.append((x.shape[0], y.shape[-1])) or original(x, y)
    )
    leading_eigenpairs(CentredGram(*factors()), 3)
    assert {rows for rows, columns in shapes if columns == 90} == {7, 90 % 7}


@pytest.mark.parametrize("wanted", [1, 6, 20])
def test_pairs_equal_those_of_dense_decomposition(wanted, memory):
    a, h = factors()
    dense = dense_of(a, h)[2]
    values, vectors, total = leading_eigenpairs(CentredGram(a, h), wanted, tolerance=1e-10)
    expected = torch.linalg.eigvalsh(dense).flip(0)
    assert values.shape == (wanted,)
    assert (values - expected[:wanted]).abs().max() < 1e-10 * expected[0]
    assert (vectors.T @ vectors - torch.eye(wanted)).abs().max() < 1e-12
    assert ((dense @ vectors - vectors * values).norm(dim=0) <= 1e-9 * values).all()
    assert abs(float(total - dense.trace())) < 1e-9


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_share_widens_the_block_until_it_is_reached(share, iterate, monkeypatch):
    monkeypatch.setattr(eigen, "_FIRST_GUESS", 1)
    a, h = factors()
    values, _, total = leading_eigenpairs(CentredGram(a, h), share)
    assert values.sum() >= share * total
    assert len(values) < 90
    expected = torch.linalg.eigvalsh(dense_of(a, h)[2]).flip(0)[: len(values)]
    assert (values - expected).abs().max() < 1e-10 * expected[0]


def test_exact_up_to_the_threshold():
    a, h = factors()
    values, vectors, _ = leading_eigenpairs(CentredGram(a, h), 2)
    assert values.shape == (90,)
    assert vectors.shape == (90, 90)


def test_it_is_deterministic_and_leaves_the_global_generator_alone(iterate):
    a, h = factors()
    state = torch.get_rng_state()
    first, second = (leading_eigenpairs(CentredGram(a, h), 4) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_says_when_it_did_not_converge(iterate, monkeypatch):
    monkeypatch.setattr(eigen, "_EXTRA", 0)
    a, h = factors()
    with pytest.warns(OodEngineWarning, match="eigenvectors of 90 anchors are known to .* after 2 iterations"):
        leading_eigenpairs(CentredGram(a, h), 3, max_iterations=2)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), distinct=st.integers(2, 12), copies=st.integers(2, 6))
def test_duplicates_give_zero_eigenvalues_and_never_a_nan(seed, distinct, copies):
    a, h = (x.repeat(copies, 1) for x in factors(distinct, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eigen, "EXACT_ROWS", 1)
        gram = CentredGram(a, h)
        values, vectors, _ = leading_eigenpairs(gram, distinct + 1)
    assert vectors.isfinite().all()
    assert values[distinct - 1 :].abs().max() <= len(gram) * 1e-15 * float(gram.diagonal().max())


@pytest.mark.parametrize("normalisation", ["none", "nfk-separable"])
@pytest.mark.parametrize("wanted", [6, 0.9])
def test_dual_basis_equals_the_exact_one(normalisation, wanted, memory, monkeypatch, make_problem):
    p, h, *_ = make_problem(80)
    found = DualBasis.fit(p, h, n_components=wanted, normalisation=normalisation)
    monkeypatch.setattr(eigen, "EXACT_ROWS", 8192)
    expected = DualBasis.fit(p, h, n_components=wanted, normalisation=normalisation)
    assert found.n_components == expected.n_components
    assert (found.project(p, h).abs() - expected.project(p, h).abs()).abs().max() < 1e-6
    assert (found.explained - expected.explained).abs().max() < 1e-10
    assert (found.mean - expected.mean).abs().max() < 1e-12


def test_dual_basis_of_few_directions(iterate, make_problem):
    p, h, *_ = make_problem(5)
    p, h = p.repeat(9, 1), h.repeat(9, 1)
    with pytest.warns(OodEngineWarning, match="the 45 anchor gradients span 4 directions, so 4 are kept"):
        assert DualBasis.fit(p, h, n_components=20).n_components == 4
    assert DualBasis.fit(p, h, n_components=0.999999).n_components <= 4
    with pytest.warns(OodEngineWarning, match="the 45 anchor gradients span 4 directions, so 4 are kept"):
        assert DualBasis.fit(p, h, n_components=45).n_components == 4
    with pytest.raises(InputError, match="all 9 anchor gradients are equal"):
        DualBasis.fit(p[:1].repeat(9, 1), h[:1].repeat(9, 1))
