from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.bases import explicit as explicit_form

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = reference.COTANGENTS


def as_explicit(basis):
    features = basis.anchor_features
    if basis.bias:
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    vectors = torch.einsum("nk,nc,nd->kcd", basis.coefficients, basis.anchor_cotangents, features)
    return ok.ExplicitTensors(vectors, basis.constants, basis.cotangent, basis.bias)


def all_of(feature_map, head, basis):
    return [feature_map, *head, *(tensor for tensor in basis if isinstance(tensor, torch.Tensor))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_composition_of_its_parts(make_problem, dtype, rectify, kind):
    feature_map, head, basis = make_problem(dtype=dtype, cotangent=kind)
    out = ok.score(feature_map, head, basis, 0.5, rectify=rectify)
    h, nap = ok.pool_nap(feature_map, 0.5, rectify=rectify)
    lse, pruned_lse, p = ok.masked_energy(h, head.weight, head.bias, head.weight_mask, head.neuron_mask)
    expected = ok.ScoreOutputs(h, nap, lse, pruned_lse, p, ok.project_gradients(p, h, basis))
    assert out._fields == ("h", "nap", "lse", "pruned_lse", "p", "g_low")
    for value, right in zip(out, expected, strict=True):
        assert torch.equal(value, right)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_functional_layer_equals_its_reference_twin(make_problem, rectify, explicit, bias):
    feature_map, head, basis = make_problem(bias=bias)
    feature_map -= 0.1
    basis = as_explicit(basis) if explicit else basis
    for value, right in zip(
        ok.score(feature_map, head, basis, 2.0, rectify=rectify),
        reference.score(feature_map, head, basis, 2.0, rectify=rectify),
        strict=True,
    ):
        # The maxima are equal, the means of the faster pooling differ by rounding.
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_close_to_fp64(make_problem, dtype):
    feature_map, head, basis = make_problem(8, 64, 10, 7, dtype=dtype)
    wide_head = ok.Head(head.weight.double(), head.bias.double(), *head[2:])
    wide_basis = basis._replace(**{name: getattr(basis, name).double() for name in basis._fields[:4]})
    wide = ok.score(feature_map.double(), wide_head, wide_basis)
    # Every input is the same number on both sides, so only fp32 sums of some tens of terms differ.
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for value, right in zip(ok.score(feature_map, head, basis), wide, strict=True):
        assert (value - right).abs().max() <= 64 * unit * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_of_the_map(make_problem, relayout, dtype):
    feature_map, head, basis = make_problem(5, 12, dtype=dtype)
    feature_map = relayout(feature_map)
    expected = ok.score(feature_map.contiguous(), head, basis)
    for value, right in zip(ok.score(feature_map, head, basis), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("form", ["none", "dual", "explicit"])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_share_no_memory(make_problem, assert_owned, dtype, side, form, masked):
    feature_map, head, basis = make_problem(side=side, dtype=dtype)
    inputs = all_of(feature_map, head, basis)
    chosen = {"none": None, "dual": basis, "explicit": as_explicit(basis)}[form]
    head = head if masked else ok.Head(head.weight, head.bias)
    assert_owned(inputs, lambda: ok.score(feature_map, head, chosen))
    assert_owned(inputs, lambda: reference.score(feature_map, head, chosen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["none", "dual", "explicit"])
def test_empty_batch(make_problem, dtype, form):
    feature_map, head, basis = make_problem(samples=0, dtype=dtype)
    chosen = {"none": None, "dual": basis, "explicit": as_explicit(basis)}[form]
    out = ok.score(feature_map, head, chosen)
    width = 0 if form == "none" else 4
    assert [tuple(tensor.shape) for tensor in out] == [(0, 12), (0,), (0,), (0,), (0, 6), (0, width)]
    assert {tensor.dtype for tensor in out} == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_without_a_basis_there_are_no_coordinates(make_problem):
    feature_map, head, _ = make_problem()
    assert ok.score(feature_map, head).g_low.shape == (5, 0)
    assert reference.score(feature_map, head).g_low.shape == (5, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_is_nan_everywhere_in_its_row_alone(make_problem, bad, dtype, rectify, explicit, kind):
    feature_map, head, basis = make_problem(dtype=dtype, cotangent=kind)
    basis = as_explicit(basis) if explicit else basis
    clean = ok.score(feature_map, head, basis, rectify=rectify)
    pruned_neuron = int(head.neuron_mask.logical_not().nonzero()[0])
    feature_map[3, pruned_neuron, 1, 2] = bad
    out = ok.score(feature_map, head, basis, rectify=rectify)
    others = [0, 1, 2, 4]
    assert out.h[3].isfinite().sum() == 11
    for name, value, right in zip(out._fields, out, clean, strict=True):
        assert torch.equal(value[others], right[others])
        assert name == "h" or value[3].isnan().all()


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_the_call_changes_nothing(make_problem, explicit, kind, dtype):
    feature_map, head, basis = make_problem(8, 64, 10, dtype=dtype, cotangent=kind)
    basis = as_explicit(basis) if explicit else basis
    expected = ok.score(feature_map, head, basis)
    ratios = ok.pool_nap(feature_map, return_ratios=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ok.score(feature_map, head, basis)
        cast_ratios = ok.pool_nap(feature_map, return_ratios=True)
    for value, right in zip([*out, *cast_ratios], [*expected, *ratios], strict=True):
        assert value.dtype == right.dtype
        assert torch.equal(value, right)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_mode_changes_nothing_and_nothing_requires_grad(make_problem, explicit, kind):
    feature_map, head, basis = make_problem(cotangent=kind)
    basis = as_explicit(basis) if explicit else basis
    expected = ok.score(feature_map, head, basis)
    for tensor in all_of(feature_map, head, basis):
        tensor.requires_grad_(tensor.is_floating_point())
    for mode in (nullcontext, torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            out = ok.score(feature_map, head, basis)
            parts = [*ok.pool_nap(feature_map, return_ratios=True), *ok.pool_statistics(feature_map)]
        for value, right in zip(out, expected, strict=True):
            assert torch.equal(value, right)
        assert not any(tensor.requires_grad for tensor in (*out, *parts))


def test_inference_tensors_are_accepted(make_problem):
    with torch.inference_mode():
        feature_map, head, basis = make_problem()
        expected = ok.score(feature_map, head, basis)
    for value, right in zip(ok.score(feature_map, head, basis), expected, strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_samples_by_classes_by_features_is_built(make_problem, largest_tensor, monkeypatch, explicit, kind):
    monkeypatch.setattr(explicit_form, "_WORKSPACE_ELEMENTS", 1)
    feature_map, head, basis = make_problem(40, 30, 20, 2, cotangent=kind)
    basis = as_explicit(basis) if explicit else basis
    elements = largest_tensor(lambda: reference.score(feature_map, head, basis))
    inputs = max(tensor.numel() for tensor in all_of(feature_map, head, basis))
    assert 0 < elements <= max(inputs, 40 * 31)
    assert elements < 40 * 30 * 20 / 4


@settings(deadline=None, max_examples=10)
@given(samples=st.integers(2, 40), seed=st.integers(0, 999))
def test_a_sample_scores_alone_as_in_a_batch(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    feature_map = torch.randn(samples, 128, 7, 7, generator=generator).relu()
    head = ok.Head(torch.randn(50, 128, generator=generator) / 4, torch.randn(50, generator=generator) + 5)
    anchors = torch.randn(20, 128, generator=generator).relu()
    p = ok.masked_energy(anchors, head.weight, head.bias)[2]
    basis = ok.DualTensors(p, anchors, torch.randn(20, 6, generator=generator), torch.zeros(6))
    index = seed % samples
    alone = ok.score(feature_map[index : index + 1], head, basis)
    batch = ok.score(feature_map, head, basis)
    for name in ("nap", "lse", "pruned_lse"):
        assert torch.allclose(getattr(alone, name)[0], getattr(batch, name)[index], rtol=1e-6, atol=0)
    for name in ("h", "p", "g_low"):
        one, many = getattr(alone, name)[0], getattr(batch, name)
        assert (one - many[index]).abs().max() <= 1e-5 * many.abs().max()


def bad_calls():
    """Message → (feature map, head, basis): each check is reached through `score` as well."""
    feature_map, head = torch.ones(2, 5, 3, 3), ok.Head(torch.ones(4, 5), torch.ones(4))
    dual = ok.DualTensors(torch.ones(6, 4), torch.ones(6, 5), torch.ones(6, 3), torch.ones(3))
    yield (
        "feature_map: expected a floating point [N, D, H, W], or tokens [N, T, D], got torch.uint8 [2, 5, 3, 3]",
        (feature_map.byte(), head, dual),
    )
    yield (
        "feature_map: expected a floating point [N, D, H, W], or tokens [N, T, D], got torch.float32 [2, 5, 0, 3]",
        (feature_map[:, :, :0], head, dual),
    )
    yield (
        "weight: expected a floating point [C, 5], C and D > 0, got torch.float32 [4, 6]",
        (feature_map, ok.Head(torch.ones(4, 6)), dual),
    )
    yield (
        "bias: expected a floating point [4], got torch.float32 [3]",
        (feature_map, head._replace(bias=torch.ones(3)), dual),
    )
    yield (
        "weight_mask: expected bool [4, 5], or int32 [4, 1] of pack_mask, got torch.bool [5, 4]",
        (feature_map, head._replace(weight_mask=torch.ones(5, 4, dtype=torch.bool)), dual),
    )
    yield (
        "neuron_mask: expected bool [5], got torch.bool [4]",
        (feature_map, head._replace(neuron_mask=torch.ones(4, dtype=torch.bool)), dual),
    )
    yield (
        "head.weight: expected the basis's [C, D] = [7, 5], got torch.float32 [4, 5]",
        (feature_map, head, dual._replace(anchor_cotangents=torch.ones(6, 7))),
    )
    yield (
        "head.weight: expected the basis's [C, D] = [4, 8], got torch.float32 [4, 5]",
        (feature_map, head, dual._replace(anchor_features=torch.ones(6, 8))),
    )
    yield (
        "basis: expected DualTensors, ExplicitTensors, FactoredTensors or an object with .tensors(), got str",
        (feature_map, head, "pca"),
    )


@pytest.mark.parametrize(
    ("message", "arguments"), list(bad_calls()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_together_is_refused(message, arguments):
    with pytest.raises(ValueError) as caught:
        ok.score(*arguments)
    assert str(caught.value) == message
