from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.func import grad, vmap

import ood_kernels as ok
from ood_kernels import reference

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "channels", "classes"), [(1, 1, 1), (3, 8, 1), (9, 5, 2), (2, 1, 6), (9, 5, 6)])
def test_every_cotangent_equals_autograd_of_its_scalar(kind, samples, channels, classes):
    h, weight, bias = make_head(samples, channels, classes)
    _, _, p = ok.masked_energy(h, weight, bias)
    a = reference.cotangent(p, kind)
    extended = torch.cat([h, torch.ones(samples, 1)], 1)
    torch.testing.assert_close(a[:, :, None] * extended[:, None], autograd(kind, h, weight, bias), **EXACT)


def test_energy_is_the_default_and_the_list_of_cotangents_is_complete():
    p = normal(3, 4).softmax(1)
    assert torch.equal(reference.cotangent(p), p)
    assert reference.COTANGENTS == KINDS
    assert ok.DualTensors(p, p, p, p).cotangent == ok.ExplicitTensors(p, p).cotangent == "energy"


@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_of_half_precision_are_computed_in_full(kind):
    for dtype in (torch.bfloat16, torch.float16):
        p = normal(6, 50).softmax(1).to(dtype)
        a = reference.cotangent(p, kind)
        assert a.dtype == torch.float32
        assert torch.equal(a, reference.cotangent(p.float(), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_equals_the_projection_of_materialised_gradients(kind, bias):
    h, weight, head_bias = make_head()
    _, _, p = ok.masked_energy(h, weight, head_bias)
    gradients = autograd(kind, h, weight, head_bias)
    gradients = gradients if bias else gradients[..., :-1]
    dual, explicit = make_bases(kind, bias)
    expected = torch.einsum("ncd,kcd->nk", gradients, explicit.components) - explicit.constants
    assert expected.abs().min() > 1e-6
    for basis in (dual, explicit, with_shift(dual, normal(5, seed=30))):
        torch.testing.assert_close(ok.project_gradients(p, h, basis), expected, **EXACT)


@pytest.mark.pairwise(bias=(True, False), kind=KINDS, sizes=[(6, 5, 3, 4), (2, 1, 2, 1), (9, 7, 1, 8), (3, 8, 5, 9)])
def test_a_factored_basis_is_the_explicit_one_that_it_expands_to(kind, bias, sizes):
    classes, channels, *ranks = sizes
    factors = normal(classes, ranks[0], seed=1), normal(channels + bias, ranks[1], seed=2)
    core, constants = normal(7, *ranks, seed=3), normal(7, seed=4)
    vectors = torch.stack([factors[0] @ one @ factors[1].T for one in core])
    p, h = normal(8, classes, seed=5).softmax(1), normal(8, channels, seed=6)
    expected = ok.project_gradients(p, h, ok.ExplicitTensors(vectors, constants, kind, bias))
    assert expected.abs().min() > 1e-6
    factored = ok.FactoredTensors(*factors, core, constants, kind, bias)
    torch.testing.assert_close(ok.project_gradients(p, h, factored), expected, **EXACT)


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
    one, other = (ok.project_gradients(p[:samples], h[:samples], basis) for basis in (dual, explicit))
    wide_dual = ok.DualTensors(*(t.double() for t in dual[:4]))
    wide = ok.project_gradients(p[:samples].double(), h[:samples].double(), wide_dual)
    assert (one - other).abs().max() <= 1e-5 * wide.abs().max()
    assert (one - wide).abs().max() <= 1e-5 * wide.abs().max()


def test_no_components_are_no_coordinates():
    p, h = normal(7, 4).softmax(1), normal(7, 5)
    for basis in make_bases("energy", True, components=0):
        assert ok.project_gradients(p, h, basis).shape == (7, 0)


@pytest.mark.parametrize("form", [0, 1])
def test_an_object_with_tensors_is_a_basis(form):
    h, weight, head_bias = make_head()
    p = ok.masked_energy(h, weight, head_bias)[2]
    basis = make_bases("predicted", True)[form]

    @dataclass
    class Fitted:
        basis: ok.DualTensors | ok.ExplicitTensors

        def tensors(self):
            return self.basis

    expected = ok.project_gradients(p, h, basis)
    assert torch.equal(ok.project_gradients(p, h, Fitted(basis)), expected)
    assert torch.equal(reference.project_gradients(p, h, Fitted(basis)), expected)
    assert torch.equal(reference.project_gradients(p, h, basis), expected)


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
