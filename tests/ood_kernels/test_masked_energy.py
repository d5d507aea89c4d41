from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import ood_kernels as ok

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def log_sum_exp(logits):
    largest = logits.max(1, keepdims=True)
    return (largest + np.log(np.exp(logits - largest).sum(1, keepdims=True)))[:, 0]


def truth(h, weight, bias=None, weight_mask=None, neuron_mask=None):
    """(lse, pruned lse, p) in fp64 numpy, with pruned entries set to zero one by one."""
    h, weight = h.double().numpy(), weight.double().numpy()
    bias = np.zeros(len(weight)) if bias is None else bias.double().numpy()
    logits = np.einsum("nd,cd->nc", h, weight) + bias
    pruned = weight.copy()
    if weight_mask is not None:
        pruned[~weight_mask.numpy()] = 0
    if neuron_mask is not None:
        pruned[:, ~neuron_mask.numpy()] = 0
    lse = log_sum_exp(logits)
    return lse, log_sum_exp(np.einsum("nd,cd->nc", h, pruned) + bias), np.exp(logits - lse[:, None])


def absolute_error_allowed(h, weight, bias=None):
    """lse moves by no more than the worst logit, a logit by a few √D units of Σ|h_j w_cj| (errors of a sum add up at random).

    p = exp(z - lse) moves relatively by twice that.
    """
    wide = torch.float64 in (h.dtype, weight.dtype)
    unit = torch.finfo(torch.float64 if wide else torch.float32).eps
    size = (h.double().abs() @ weight.double().abs().T).amax() if h.numel() else torch.tensor(1.0)
    largest = size.item() + (0 if bias is None else bias.double().abs().max().item()) + 1
    return 4 * unit * math.sqrt(weight.shape[1] + 4) * largest


def make(samples, channels, classes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(samples, channels, generator=generator).relu().to(dtype)
    weight = (torch.randn(classes, channels, generator=generator) * 2 / channels**0.5).to(dtype)
    bias = torch.randn(classes, generator=generator).to(dtype)
    weight_mask = torch.rand(classes, channels, generator=generator) > 0.3
    neuron_mask = torch.rand(channels, generator=generator) > 0.2
    return h, weight, bias, weight_mask, neuron_mask


def assert_right(outputs, arguments):
    allowed = absolute_error_allowed(*arguments[:3])
    for value, right in zip(outputs, truth(*arguments), strict=True):
        assert_allclose(value, right, rtol=0, atol=allowed)


@pytest.mark.pairwise(
    shape=[(1, 1, 1), (3, 5, 7), (1, 33, 2), (17, 64, 1), (6, 257, 101), (0, 4, 3)],
    dtype=DTYPES,
    bias=(True, False),
    weight_mask=(True, False),
    neuron_mask=(True, False),
)
def test_equals_fp64_truth_in_every_dtype_and_shape(shape, dtype, bias, weight_mask, neuron_mask):
    present = (True, True, bias, weight_mask, neuron_mask)
    arguments = [tensor if here else None for tensor, here in zip(make(*shape, dtype), present, strict=True)]
    outputs = ok.masked_energy(*arguments)
    assert_right(outputs, arguments)
    assert [tuple(tensor.shape) for tensor in outputs] == [shape[:1], shape[:1], shape[::2]]


@pytest.mark.parametrize(
    ("wide", "expected"),
    [((), torch.float32), ((0,), torch.float64), ((1,), torch.float64), ((0, 1), torch.float64), ((2,), torch.float32)],
)
def test_output_dtype_follows_features_and_weight(wide, expected):
    arguments = list(make(3, 5, 4, torch.float16))
    for index in wide:
        arguments[index] = arguments[index].double()
    outputs = ok.masked_energy(*arguments)
    assert {tensor.dtype for tensor in outputs} == {expected}
    assert_right(outputs, arguments)


@pytest.mark.parametrize(
    "shape", [(1, 2048, 1000), (8, 2048, 1000), (64, 512, 10), (3, 5, 7), (17, 33, 1), (1, 1, 1), (5, 2047, 3)], ids=str
)
def test_masks_that_keep_everything_change_no_bit(shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        h, weight, bias, weight_mask, neuron_mask = make(*shape, dtype)
        every_weight, every_neuron = torch.ones_like(weight_mask), torch.ones_like(neuron_mask)
        lse, same, _ = ok.masked_energy(h, weight, bias)
        assert torch.equal(lse, same)
        for masks in ((every_weight, None), (None, every_neuron), (every_weight, every_neuron)):
            masked_lse, pruned_lse, _ = ok.masked_energy(h, weight, bias, *masks)
            assert torch.equal(pruned_lse, masked_lse)
            assert torch.equal(pruned_lse, lse)


def test_masks_that_keep_everything_change_no_bit_in_any_layout(relayout):
    for samples, channels, classes in ((4, 2047, 101), (1, 64, 9)):
        h, weight, bias, weight_mask, neuron_mask = make(samples, channels, classes)
        h, weight = relayout(h), relayout(weight)
        masks = (relayout(torch.ones_like(weight_mask)), torch.ones_like(neuron_mask))
        lse, pruned_lse, _ = ok.masked_energy(h, weight, bias, *masks)
        assert torch.equal(pruned_lse, lse)


def test_masks_prune_what_they_name():
    h = torch.tensor([[1.0, 10.0, 100.0]])
    weight = torch.eye(3)
    bias = torch.zeros(3)
    weight_mask = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    lse, pruned_lse, p = ok.masked_energy(h, weight, bias, weight_mask, torch.tensor([True, True, False]))
    assert lse.item() == pytest.approx(100.0)
    assert pruned_lse.item() == pytest.approx(math.log(math.exp(1) + 2), rel=1e-6)
    assert p.argmax().item() == 2


@pytest.mark.pairwise(pruned=("a class", "every weight", "every neuron"), bias=("finite", "rules out", "absent"))
def test_heads_at_the_limits(pruned, bias):
    h, weight, offsets, weight_mask, neuron_mask = make(4, 9, 5, torch.float64)
    (neuron_mask if pruned == "every neuron" else weight_mask[2 if pruned == "a class" else slice(None)])[:] = False
    offsets[1] = -torch.inf if bias == "rules out" else 1.0
    arguments = (h, weight, None if bias == "absent" else offsets, weight_mask, neuron_mask)
    outputs = ok.masked_energy(*arguments)
    for value, right in zip(outputs, truth(*arguments), strict=True):
        assert_allclose(value, right, rtol=1e-12)
    assert bias != "rules out" or not outputs[2][:, 1].any()


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_logits_are_stable(size, dtype):
    h = torch.tensor([[1.0], [0.5]], dtype=dtype)
    weight = torch.tensor([[size], [size], [size / 2]], dtype=dtype)
    every = torch.ones(3, 1, dtype=torch.bool)
    for value, right in zip(ok.masked_energy(h, weight, None, every), truth(h, weight), strict=True):
        assert_allclose(value, right, rtol=1e-6)


@pytest.mark.pairwise(bad=(torch.nan, torch.inf, -torch.inf), pruned=(False, True), dtype=DTYPES, sign=(1, -1, 0))
def test_a_bad_feature_is_nan_in_its_row_alone_even_in_a_pruned_neuron(bad, pruned, dtype, sign):
    h, weight, bias, weight_mask, neuron_mask = make(4, 8, 5, dtype)
    if sign:
        weight[:, 3] = sign * weight[:, 3].abs()
    neuron_mask[3] = not pruned
    weight_mask[:, 3] = not pruned
    clean = ok.masked_energy(h, weight, bias, weight_mask, neuron_mask)
    h[2, 3] = bad
    others = [0, 1, 3]
    for masks in ((weight_mask, neuron_mask), (weight_mask, None), (None, neuron_mask), (None, None)):
        lse, pruned_lse, p = ok.masked_energy(h, weight, bias, *masks)
        assert lse.isnan().tolist() == pruned_lse.isnan().tolist() == [False, False, True, False]
        assert p.isnan().all(1).tolist() == p.isnan().any(1).tolist() == [False, False, True, False]
        assert torch.equal(lse[others], clean[0][others])
        assert torch.equal(p[others], clean[2][others])
    pruned_lse = ok.masked_energy(h, weight, bias, weight_mask, neuron_mask)[1]
    assert torch.equal(pruned_lse[others], clean[1][others])


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_bad_head_gives_no_score_even_where_it_is_pruned(where):
    h, weight, bias, weight_mask, neuron_mask = make(3, 5, 4)
    weight_mask[1, 2] = neuron_mask[2] = False
    if where == "weight":
        weight[1, 2] = torch.nan
    else:
        bias[1] = torch.nan
    for output in ok.masked_energy(h, weight, bias, weight_mask, neuron_mask):
        assert output.isnan().all()
