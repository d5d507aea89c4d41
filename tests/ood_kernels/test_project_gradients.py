from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.bases import explicit as explicit_form

KINDS = ("energy", "predicted", "uniform", "max_logit", "sum_logits")
SCALARS = {
    "energy": lambda z: z.logsumexp(0),
    "predicted": lambda z: z.logsumexp(0) - z.max(),
    "uniform": lambda z: z.logsumexp(0) - z.mean(),
    "max_logit": lambda z: z.max(),
    "sum_logits": lambda z: z.sum(),
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def autograd(kind, h, weight, bias):
    """The last-layer gradients of every sample, [N, C, D + 1], by reverse mode in fp64."""

    def scalar(weight, bias, features):
        return SCALARS[kind](weight @ features + bias)

    of_weight, of_bias = vmap(grad(scalar, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, h)
    return torch.cat([of_weight, of_bias[..., None]], 2)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(samples=7, channels=5, classes=4, seed=0):
    """Signed features, weight and bias in fp64."""
    return (
        normal(samples, channels, seed=seed),
        normal(classes, channels, seed=seed + 1),
        normal(classes, seed=seed + 2),
    )


def make_bases(kind, bias, *, classes=4, channels=5, anchors=9, components=3, dtype=torch.float64):
    """The same subspace as a dual basis over autograd's anchor gradients and as an explicit one, with its vectors."""
    h, weight, head_bias = make_head(anchors, channels, classes, seed=10)
    gradients = autograd(kind, h, weight, head_bias)
    gradients = gradients if bias else gradients[..., :-1]
    coefficients, constants = normal(anchors, components, seed=20), normal(components, seed=21)
    vectors = torch.einsum("nk,ncd->kcd", coefficients, gradients)
    p = (h @ weight.T + head_bias).softmax(1)
    a = reference.cotangent(p, kind)
    dual = ok.DualTensors(*(t.to(dtype) for t in (a, h, coefficients, constants)), kind, bias)
    return dual, ok.ExplicitTensors(vectors.to(dtype), constants.to(dtype), kind, bias)


def with_shift(dual, shift):
    linear = reference.linear_part(dual.anchor_cotangents, dual.anchor_features, dual.coefficients, shift, dual.bias)
    return dual._replace(shift=shift, linear=linear)


@pytest.mark.parametrize(("samples", "channels", "classes"), [(7, 5, 4), (1, 1, 1), (3, 8, 1), (2, 1, 6)])
def test_energy_gradient_is_softmax_times_features(samples, channels, classes):
    h, weight, bias = make_head(samples, channels, classes)
    _, _, p = ok.masked_energy(h, weight, bias)
    gradient = autograd("energy", h, weight, bias)
    torch.testing.assert_close(gradient[..., :-1], p[:, :, None] * h[:, None], **EXACT)
    torch.testing.assert_close(gradient[..., -1], p, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 6])
def test_every_cotangent_equals_autograd_of_its_scalar(kind, classes):
    h, weight, bias = make_head(9, 5, classes)
    _, _, p = ok.masked_energy(h, weight, bias)
    a = reference.cotangent(p, kind)
    extended = torch.cat([h, torch.ones(9, 1)], 1)
    torch.testing.assert_close(a[:, :, None] * extended[:, None], autograd(kind, h, weight, bias), **EXACT)


def test_energy_is_the_default_and_the_list_of_cotangents_is_complete():
    p = normal(3, 4).softmax(1)
    assert torch.equal(reference.cotangent(p), p)
    assert reference.COTANGENTS == KINDS
    assert ok.DualTensors(p, p, p, p).cotangent == ok.ExplicitTensors(p, p).cotangent == "energy"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cotangents_of_half_precision_are_computed_in_full(kind, dtype):
    p = normal(6, 50).softmax(1).to(dtype)
    a = reference.cotangent(p, kind)
    assert a.dtype == torch.float32
    assert torch.equal(a, reference.cotangent(p.float(), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_both_forms_equal_the_projection_of_materialised_gradients(kind, bias):
    h, weight, head_bias = make_head()
    _, _, p = ok.masked_energy(h, weight, head_bias)
    gradients = autograd(kind, h, weight, head_bias)
    gradients = gradients if bias else gradients[..., :-1]
    dual, explicit = make_bases(kind, bias)
    expected = torch.einsum("ncd,kcd->nk", gradients, explicit.components) - explicit.constants
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(ok.project_gradients(p, h, dual), expected, **EXACT)
    torch.testing.assert_close(ok.project_gradients(p, h, explicit), expected, **EXACT)


def test_principal_components_of_materialised_gradients_up_to_sign():
    h, weight, bias = make_head(40)
    _, _, p = ok.masked_energy(h, weight, bias)
    gradients = autograd("energy", h, weight, bias).flatten(1)
    mean = gradients.mean(0)
    left, singular, right = torch.linalg.svd(gradients - mean, full_matrices=False)
    expected = left[:, :3] * singular[:3]
    explicit = ok.ExplicitTensors(right[:3].view(3, 4, 6), right[:3] @ mean)
    # V = (G - Ḡ)ᵀ left / singular: centred coefficients, so that Ḡ drops out of V.
    coefficients = (left - left.mean(0))[:, :3] / singular[:3]
    dual = ok.DualTensors(p, h, coefficients, right[:3] @ mean)
    torch.testing.assert_close(ok.project_gradients(p, h, explicit), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ok.project_gradients(p, h, dual), expected, rtol=1e-8, atol=1e-8)


def test_dual_and_explicit_agree_in_fp32_at_imagenet_size():
    samples, anchors, components, channels, classes = 6, 16, 8, 2048, 1000
    weight = normal(classes, channels, dtype=torch.float32) / channels**0.5
    h = normal(samples + anchors, channels, seed=1, dtype=torch.float32).relu()
    _, _, p = ok.masked_energy(h, weight, normal(classes, seed=2, dtype=torch.float32))
    coefficients = normal(anchors, components, seed=3, dtype=torch.float32)
    extended = torch.cat([h, torch.ones(len(h), 1)], 1)
    vectors = torch.stack([(p[samples:] * column[:, None]).T @ extended[samples:] for column in coefficients.T])
    dual = ok.DualTensors(p[samples:], h[samples:], coefficients, torch.zeros(components))
    explicit = ok.ExplicitTensors(vectors, torch.zeros(components))
    one = ok.project_gradients(p[:samples], h[:samples], dual)
    other = ok.project_gradients(p[:samples], h[:samples], explicit)
    wide = ok.project_gradients(
        p[:samples].double(), h[:samples].double(), ok.DualTensors(*(t.double() for t in dual[:4]))
    )
    assert (one - other).abs().max() <= 1e-5 * wide.abs().max()
    assert (one - wide).abs().max() <= 1e-5 * wide.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["dual", "explicit"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype(dtype, form, kind):
    h, weight, head_bias = make_head(6, 33, 7)
    p = ok.masked_energy(h, weight, head_bias)[2].to(dtype)
    h = h.to(dtype)
    basis = make_bases(kind, True, classes=7, channels=33, dtype=dtype)[form == "explicit"]
    g_low = ok.project_gradients(p, h, basis)
    wide = type(basis)(*(t.double() if isinstance(t, torch.Tensor) else t for t in basis))
    expected = ok.project_gradients(p.double(), h.double(), wide)
    # Inputs are rounded alike on both sides, which leaves the rounding of the sums: some tens of terms of the largest's size.
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert g_low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (g_low - expected).abs().max() <= 32 * unit * expected.abs().max()


@pytest.mark.parametrize("wide", ["p", "h", "basis", "none"])
@pytest.mark.parametrize("form", [0, 1])
def test_output_dtype_rule(wide, form):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases("energy", True, dtype=torch.float64 if wide == "basis" else torch.float32)[form]
    g_low = ok.project_gradients(p if wide == "p" else p.float(), h if wide == "h" else h.float(), basis)
    assert g_low.dtype == (torch.float32 if wide == "none" else torch.float64)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides(relayout, form, dtype):
    h, weight, head_bias = make_head()
    p = relayout(ok.masked_energy(h, weight, head_bias)[2].to(dtype))
    h = relayout(h.to(dtype))
    basis = make_bases("predicted", True, dtype=dtype)[form]
    strided = type(basis)(*(relayout(t) if isinstance(t, torch.Tensor) and t.ndim > 1 else t for t in basis))
    dense = type(basis)(*(t.contiguous() if isinstance(t, torch.Tensor) else t for t in strided))
    expected = ok.project_gradients(p.contiguous(), h.contiguous(), dense)
    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ok.project_gradients(p, h, strided), expected, **close)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_share_no_memory(assert_owned, form, bias, kind):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases(kind, bias)[form]
    tensors = [tensor for tensor in basis if isinstance(tensor, torch.Tensor)]
    assert_owned([p, h, *tensors], lambda: [ok.project_gradients(p, h, basis)])
    assert_owned([p, h, *tensors], lambda: [reference.project_gradients(p, h, basis)])


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_empty_batch_and_no_components(form, bias):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases("energy", bias)[form]
    assert ok.project_gradients(p[:0], h[:0], basis).shape == (0, 3)
    assert ok.project_gradients(p, h, make_bases("energy", bias, components=0)[form]).shape == (7, 0)


@pytest.mark.parametrize("workspace", [1, 90])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("components", [3, 5])
def test_working_in_blocks_changes_nothing(monkeypatch, workspace, bias, components):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    # Fewer and more components than classes go two ways.
    assert 3 < p.shape[1] < 5
    basis = make_bases("energy", bias, components=components)[1]
    whole = ok.project_gradients(p, h, basis)
    monkeypatch.setattr(explicit_form, "_WORKSPACE_ELEMENTS", workspace)
    torch.testing.assert_close(ok.project_gradients(p, h, basis), whole, **EXACT)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_with_tensors_is_a_basis(form, kind):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases(kind, True)[form]

    @dataclass
    class Fitted:
        basis: ok.DualTensors | ok.ExplicitTensors

        def tensors(self):
            return self.basis

    expected = ok.project_gradients(p, h, basis)
    assert torch.equal(ok.project_gradients(p, h, Fitted(basis)), expected)
    assert torch.equal(reference.project_gradients(p, h, Fitted(basis)), expected)
    assert torch.equal(reference.project_gradients(p, h, basis), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["p", "h"])
def test_a_bad_value_leaves_no_coordinate_in_its_row_and_touches_no_other(bad, form, kind, where):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases(kind, True)[form]
    clean = ok.project_gradients(p, h, basis)
    (p if where == "p" else h)[4, 2] = bad
    g_low = ok.project_gradients(p, h, basis)
    assert not g_low[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(g_low[others], clean[others])


@settings(deadline=None, max_examples=20)
@given(samples=st.integers(2, 70), seed=st.integers(0, 999), kind=st.sampled_from(KINDS), form=st.integers(0, 1))
def test_a_sample_projects_alone_as_in_a_batch(samples, seed, kind, form):
    h, weight, head_bias = make_head(samples, 64, 20, seed)
    p = ok.masked_energy(h, weight, head_bias)[2].float()
    h = h.float()
    basis = make_bases(kind, True, classes=20, channels=64, dtype=torch.float32)[form]
    batch = ok.project_gradients(p, h, basis)
    index = seed % samples
    alone = ok.project_gradients(p[index : index + 1], h[index : index + 1], basis)
    assert (alone[0] - batch[index]).abs().max() <= 1e-5 * batch.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_leaves_the_coordinates_as_they_are(kind, bias):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    dual, explicit = make_bases(kind, bias)
    shifted = with_shift(dual, normal(5, seed=30))
    torch.testing.assert_close(ok.project_gradients(p, h, shifted), ok.project_gradients(p, h, explicit), **EXACT)
    torch.testing.assert_close(reference.project_gradients(p, h, shifted), ok.project_gradients(p, h, dual), **EXACT)


def test_a_shift_by_the_mean_feature_keeps_the_precision_that_a_common_mean_costs():
    """Features with a large common mean and a diffuse softmax: Gram entries that differ in their last digits."""
    h, weight, head_bias = make_head(64, 128, 50)
    h = 30 + h.abs()
    p = ok.masked_energy(h[:40], weight / 200, head_bias / 10)[2]
    coefficients = normal(40, 6, seed=20)
    dual = ok.DualTensors(p, h[:40], coefficients - coefficients.mean(0), torch.zeros(6, dtype=torch.float64))
    p, h = ok.masked_energy(h[40:], weight / 200, head_bias / 10)[2], h[40:]
    exact = ok.project_gradients(p, h, dual)

    def error(basis):
        basis = basis._replace(**{k: v.float() for k, v in basis._asdict().items() if isinstance(v, torch.Tensor)})
        return (ok.project_gradients(p.float(), h.float(), basis) - exact).norm() / exact.norm()

    assert error(with_shift(dual, dual.anchor_features.mean(0))) < error(dual) / 5


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(-8, 8), seed=st.integers(0, 999), form=st.integers(0, 1))
def test_linear_in_the_basis_and_shifted_by_the_constants(scale, seed, form):
    h, weight, head_bias = make_head(seed=seed)
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases("energy", True)[form]
    name = ("coefficients", "components")[form]
    scaled = basis._replace(**{name: scale * getattr(basis, name), "constants": basis.constants + 1})
    expected = scale * (ok.project_gradients(p, h, basis) + basis.constants) - basis.constants - 1
    torch.testing.assert_close(ok.project_gradients(p, h, scaled), expected, rtol=1e-10, atol=1e-10)


def bad_calls():
    """Message → (p, h, basis), one thing wrong at a time."""
    p, h, integers = torch.ones(2, 4) / 4, torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int64)
    dual = ok.DualTensors(torch.ones(6, 4), torch.ones(6, 5), torch.ones(6, 3), torch.ones(3))
    explicit = ok.ExplicitTensors(torch.ones(3, 4, 6), torch.ones(3))
    forms = "basis: expected DualTensors, ExplicitTensors, FactoredTensors or an object with .tensors(), got"
    known = "energy, predicted, uniform, max_logit, sum_logits"
    yield f"{forms} NoneType", (p, h, None)
    yield f"{forms} Tensor", (p, h, torch.ones(3))
    yield f"{forms} tuple", (p, h, tuple(dual))
    yield f"cotangent 'loss' is not known: expected one of {known}", (p, h, dual._replace(cotangent="loss"))
    yield f"cotangent 'loss' is not known: expected one of {known}", (p, h, explicit._replace(cotangent="loss"))
    for basis in (dual, explicit):
        yield "p: expected softmax [N, 4], got torch.float32 [4]", (p[0], h, basis)
        yield "p: expected softmax [N, 4], got torch.float32 [2, 3]", (p[:, :3], h, basis)
        yield "p: expected softmax [N, 4], got torch.int64 [2, 4]", (p.long(), h, basis)
        yield "h: expected features [2, 5], got torch.float32 [5]", (p, h[0], basis)
        yield "h: expected features [2, 5], got torch.float32 [1, 5]", (p, h[:1], basis)
        yield "h: expected features [2, 5], got torch.float32 [2, 6]", (p, torch.ones(2, 6), basis)
        yield "h: expected features [2, 5], got torch.int64 [2, 5]", (p, integers, basis)
        yield (
            "constants: expected [3], got torch.float32 [1]",
            (p, h, basis._replace(constants=torch.ones(1))),
        )
    for width in (4, 6):
        wrong = torch.ones(2, width)
        yield f"h: expected features [2, 5], got torch.float32 [2, {width}]", (p, wrong, dual)
    yield "h: expected features [2, 6], got torch.float32 [2, 5]", (p, h, explicit._replace(bias=False))
    for shape in ((4,), (6, 0)):
        message = f"anchor_cotangents: expected [n, C], got torch.float32 {list(shape)}"
        yield message, (p, h, dual._replace(anchor_cotangents=torch.ones(shape)))
    for shape in ((5,), (1, 5)):
        message = f"anchor_features: expected [6, D], got torch.float32 {list(shape)}"
        yield message, (p, h, dual._replace(anchor_features=torch.ones(shape)))
    for shape in ((3,), (5, 3)):
        message = f"coefficients: expected [6, K], got torch.float32 {list(shape)}"
        yield message, (p, h, dual._replace(coefficients=torch.ones(shape)))
    together = "shift and linear of a dual basis belong together: expected both or neither, got one"
    yield together, (p, h, dual._replace(shift=torch.ones(5)))
    yield together, (p, h, dual._replace(linear=torch.ones(4, 3)))
    shifted = dual._replace(shift=torch.ones(5), linear=torch.ones(4, 3))
    yield "shift: expected [5], got torch.float32 [1]", (p, h, shifted._replace(shift=torch.ones(1)))
    yield "linear: expected [4, 3], got torch.float32 [3]", (p, h, shifted._replace(linear=torch.ones(3)))
    for shape in ((4, 6), (3, 0, 6), (3, 4, 0)):
        message = f"components: expected [K, C, D], got torch.float32 {list(shape)}"
        yield message, (p, h, explicit._replace(components=torch.ones(shape)))


@pytest.mark.parametrize(
    ("message", "arguments"), list(bad_calls()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_the_basis_is_refused(message, arguments):
    with pytest.raises(ValueError) as caught:
        ok.project_gradients(*arguments)
    assert str(caught.value) == message
