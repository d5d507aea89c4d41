from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ood_kernels import reference
from ood_kernels.masks import pack_mask
from ood_kernels.triton_kernels import masked_energy as family
from ood_kernels.triton_kernels.launch import PRECISIONS, forced, record
from ood_kernels.triton_kernels.masked_energy import energies, head_partials, masked_energy, row_argmax, row_lse

# numpy, which interprets, warns of Inf - Inf where a NaN is what shall come out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def make(device):
    """Features, weight, bias and both masks as bools, from a seed."""

    def build(samples, channels, classes, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(samples, channels, generator=generator).relu().to(dtype)
        weight = (torch.randn(classes, channels, generator=generator) * 2 / channels**0.5).to(dtype)
        bias = torch.randn(classes, generator=generator).to(dtype)
        weight_mask = torch.rand(classes, channels, generator=generator) > 0.3
        neuron_mask = torch.rand(channels, generator=generator) > 0.2
        return [tensor.to(device) for tensor in (h, weight, bias, weight_mask, neuron_mask)]

    return build


def truth(h, weight, bias, weight_mask=None, neuron_mask=None):
    bias = None if bias is None else bias.double()
    return reference.masked_energy(h.double(), weight.double(), bias, weight_mask, neuron_mask)


def in_dtype(h, weight, bias, weight_mask, neuron_mask, dtype):
    """(lse, pruned lse, p) as torch computes them with its matrix products in a dtype."""
    pruned = weight * weight_mask
    plain = F.linear(h.to(dtype), weight.to(dtype)).float() + bias.float()
    kept = F.linear((h * neuron_mask).to(dtype), pruned.to(dtype)).float() + bias.float()
    return plain.logsumexp(1), kept.logsumexp(1), plain.softmax(1)


def to_tf32(values):
    """Values [...] in fp32 rounded to 10 bits of mantissa."""
    return (values.view(torch.int32) + 0x1000).bitwise_and(-0x2000).view(torch.float32)


SHAPES = [(1, 1, 2), (3, 5, 7), (17, 33, 16), (2, 100, 17), (33, 64, 70), (1, 512, 20)]


@pytest.mark.parametrize(
    ("shape", "precision"),
    [(shape, "ieee") for shape in (*SHAPES, (1, 8, 2100), (1, 4100, 3))]
    + [(shape, other) for index, other in enumerate(PRECISIONS[1:]) for shape in SHAPES[index % 2 :: 2]],
    ids=str,
)
def test_as_close_to_fp64_as_torch(make, poisoned, assert_as_good_as_torch, shape, precision):
    h, weight, bias, weight_mask, neuron_mask = arguments = make(*shape)
    ours = masked_energy(h, weight, bias, pack_mask(weight_mask), neuron_mask, precision)
    assert [tuple(tensor.shape) for tensor in ours] == [shape[:1], shape[:1], (shape[0], shape[2])]
    if precision in ROUNDED:
        dtype = ROUNDED[precision]
        theirs = in_dtype(*arguments, dtype)
        operands = [h.to(dtype).float(), weight.to(dtype).float(), *arguments[2:]]
        assert_as_good_as_torch(ours, truth(*operands), reference.masked_energy(*operands), hair=2e-6)
        hair = 2e-3 if dtype == torch.bfloat16 else 3e-4
    elif precision == "tf32":
        # Rounded to nearest, although tensor cores truncate.
        operands = [to_tf32(h), to_tf32(weight), *arguments[2:]]
        theirs, hair = reference.masked_energy(*operands), 5e-4
        assert_as_good_as_torch(ours, truth(*operands), theirs, hair=2e-6)
    else:
        theirs, hair = reference.masked_energy(*arguments), 2e-6
    assert_as_good_as_torch(ours, truth(*arguments), theirs, hair)


@pytest.mark.pairwise(of_features=DTYPES, of_weight=DTYPES, precision=["ieee", "bf16"])
def test_every_dtype_of_features_and_weight(make, poisoned, assert_as_good_as_torch, of_features, of_weight, precision):
    h, weight, bias, weight_mask, neuron_mask = make(5, 37, 21)
    h, weight, bias = h.to(of_features), weight.to(of_weight), bias.to(of_weight)
    ours = masked_energy(h, weight, bias, weight_mask, neuron_mask, precision)
    dtype = ROUNDED.get(precision, torch.float32)
    operands = (h.to(dtype).float(), weight.to(dtype).float(), bias.float(), weight_mask, neuron_mask)
    assert_as_good_as_torch(ours, truth(*operands), reference.masked_energy(*operands), hair=2e-6)


@pytest.mark.pairwise(weights=("none", "bits", "bytes"), neurons=("none", "bits", "bytes"), with_bias=[True, False])
def test_every_kind_of_mask(make, poisoned, assert_as_good_as_torch, weights, neurons, with_bias):
    kinds = (weights, neurons)
    h, weight, bias, weight_mask, neuron_mask = make(3, 75, 19)
    bias = bias if with_bias else None
    store = {"none": lambda mask: None, "bits": pack_mask, "bytes": lambda mask: mask}
    stored = [store[kind](mask) for kind, mask in zip(kinds, (weight_mask, neuron_mask), strict=True)]
    plain = [None if kind == "none" else mask for kind, mask in zip(kinds, (weight_mask, neuron_mask), strict=True)]
    ours = masked_energy(h, weight, bias, *stored)
    unstored = (h, weight, bias, *plain)
    assert_as_good_as_torch(ours, truth(*unstored), reference.masked_energy(*unstored), hair=2e-6)
    if kinds == ("none", "none"):
        assert torch.equal(ours[0], ours[1])
        assert ours[0].data_ptr() != ours[1].data_ptr()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masks_that_keep_everything_change_no_bit(make, precision):
    h, weight, bias, weight_mask, neuron_mask = make(3, 70, 37)
    every_weight, every_neuron = torch.ones_like(weight_mask), torch.ones_like(neuron_mask)
    plain = masked_energy(h, weight, bias, None, None, precision)
    masked = masked_energy(h, weight, bias, pack_mask(every_weight), every_neuron, precision)
    assert torch.equal(plain[0], plain[1])
    assert all(torch.equal(one, other) for one, other in zip(plain, masked, strict=True))


PRUNED = [("weight_mask", (1, 2), False), ("neuron_mask", 2, False)]


@pytest.mark.parametrize(
    ("changes", "with_bias"),
    [([(mask, ..., False)], with_bias) for mask in ("weight_mask", "neuron_mask") for with_bias in (True, False)]
    + [([("weight_mask", [2, 17], False), ("bias", 2, 9)], True)]
    + [([("bias", where, -torch.inf)], True) for where in (slice(40), ...)]
    + [([*PRUNED, ("weight", (1, 2), value)], False) for value in (torch.nan, torch.inf)]
    + [([*PRUNED, ("bias", 1, value)], True) for value in (torch.nan, torch.inf)],
)
def test_heads_at_the_limits(make, assert_as_good_as_torch, changes, with_bias):
    h, *tensors = make(4, 40, 70)
    h += 1
    head = dict(zip(("weight", "bias", "weight_mask", "neuron_mask"), tensors, strict=True))
    for name, where, value in changes:
        head[name][where] = value
    head["bias"] = head["bias"] if with_bias else None
    ours = masked_energy(h, **head | {"weight_mask": pack_mask(head["weight_mask"])})
    assert_as_good_as_torch(ours, truth(h, **head), hair=2e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_extreme_logits_are_stable(device, precision):
    h = torch.tensor([[1.0], [0.5]], device=device)
    every = torch.ones(40, 1, dtype=torch.bool, device=device)
    for size in (1e4, -1e4):
        weight = torch.full((40, 1), size, device=device)
        weight[::2] /= 2
        ours = masked_energy(h, weight, None, pack_mask(every), None, precision)
        rounded = weight.to(ROUNDED.get(precision, torch.float32)).float()
        for value, exact in zip(ours, truth(h, rounded, None, every), strict=True):
            # tf32 keeps 10 bits, which 1e4 and its half do not need more than.
            torch.testing.assert_close(value, exact.float(), rtol=1e-3 if precision == "tf32" else 1e-6, atol=1e-6)
        torch.testing.assert_close(ours[2].sum(1), torch.ones(2, device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_neither_storage_of_masks_nor_order_nor_parts_change_a_bit(make, poisoned, monkeypatch, precision):
    h, weight, bias, weight_mask, neuron_mask = make(40, 20, 40)
    head = (weight, bias, weight_mask, neuron_mask, precision)
    expected = masked_energy(h, *head)
    others = [
        masked_energy(h, weight, bias, pack_mask(weight_mask), pack_mask(neuron_mask), precision),
        energies(h, *head),
    ]
    for group in (1, 2):
        with forced({"masked_energy": {"GROUP": group}}):
            others.append(masked_energy(h, *head))
    monkeypatch.setattr(family, "_PARTIAL_BYTES", 7 * 20 * 2)
    with record() as launches:
        others.append(masked_energy(h, *head))
    assert len(launches) == 12
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(expected, other, strict=False))


@pytest.mark.parametrize(("channels", "stored"), [(16, "bits"), (16, "bytes"), (32, "bits"), (64, "bytes")])
def test_any_tile_gives_the_right_result(make, assert_as_good_as_torch, channels, stored):
    h, weight, bias, weight_mask, neuron_mask = arguments = make(18, 150, 40)
    masks = (pack_mask(weight_mask), pack_mask(neuron_mask)) if stored == "bits" else (weight_mask, neuron_mask)
    with forced({"masked_energy": {"BLOCK_C": 64, "BLOCK_D": channels}}):
        ours = masked_energy(h, weight, bias, *masks)
    assert_as_good_as_torch(ours, truth(*arguments), reference.masked_energy(*arguments), hair=2e-6)


def test_candidates_differ_and_leave_the_sample_tile_alone():
    for precision, classes in itertools.product(PRECISIONS, (10, 1000)):
        found = list(family.candidates({"precision": precision, "classes": classes}))
        assert len({tuple(config.items()) for config in found}) == len(found) > 3
        assert all(config.keys() == {"BLOCK_C", "BLOCK_D", "num_warps", "num_stages"} for config in found)


def test_is_recorded_on_tensors_without_memory():
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    head = (meta(1000, 2048), meta(1000), meta(1000, 64, dtype=torch.int32), meta(2048, dtype=torch.bool))
    with record() as launches:
        outputs = masked_energy(meta(256, 2048), *head, "tf32")
    kernels = [(launch.kernel.__name__, launch.wide) for launch in launches]
    assert kernels == [("head_kernel", True), ("finalise_kernel", True)]
    assert launches[0].grid == (4 * 32,)
    assert [tuple(tensor.shape) for tensor in outputs] == [(256,), (256,), (256, 1000)]
    with record() as launches:
        masked_energy(meta(256, 2049)[:, :-1], *head, "tf32")
    assert [launch.wide for launch in launches] == [False, True]


@triton.jit
def rows_kernel(
    partials_ptr, argmaxima_ptr, lse_ptr, argmax_ptr, samples, tiles, SLOT: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < samples
    tl.store(lse_ptr + rows, row_lse(partials_ptr, rows, valid, tiles, SLOT), mask=valid)
    tl.store(argmax_ptr + rows, row_argmax(partials_ptr, argmaxima_ptr, rows, valid, tiles), mask=valid)


@pytest.mark.parametrize("classes", [5, 70, 2100])
def test_rows_of_partials_give_energy_and_first_largest_class(make, poisoned, classes):
    h, weight, bias, weight_mask, neuron_mask = make(5, 16, classes)
    h[1] = 0
    bias[:] = 0
    h[2], weight[3], weight[classes - 1] = 1, 9, 9
    h[4, 0] = torch.nan
    logits = h.new_empty((5, classes))
    partials, argmaxima = head_partials(h, weight, bias, weight_mask, neuron_mask, "ieee", logits)
    torch.testing.assert_close(logits[:4], F.linear(h, weight, bias)[:4], rtol=1e-5, atol=1e-4)
    for slot in (0, 2):
        lse, argmax = h.new_empty((5,)), argmaxima.new_empty((5,))
        rows_kernel[(2,)](partials, argmaxima, lse, argmax, 5, partials.shape[1], SLOT=slot, BLOCK=4)
        expected = truth(h, weight, bias, weight_mask, neuron_mask)[slot // 2]
        torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert argmax[:4].tolist() == logits[:4].argmax(1).tolist()
        assert argmax[1:3].tolist() == [0, 3]
        assert 0 <= int(argmax[4]) < classes


def test_many_tiles_without_any_class_are_passed_over(device):
    partials = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0], device=device).repeat(2, 150, 1)
    partials[0, 140, 0], partials[0, 140, 1] = 2.0, 3.0
    argmaxima = torch.arange(150, dtype=torch.int32, device=device).repeat(2, 1)
    lse, argmax = torch.empty(2, device=device), torch.empty(2, dtype=torch.int32, device=device)
    rows_kernel[(1,)](partials, argmaxima, lse, argmax, 2, 150, SLOT=0, BLOCK=2)
    assert lse[0].item() == pytest.approx(2 + math.log(3), rel=1e-6)
    assert lse[1].isnan()
    assert argmax[0] == 140


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offsets beyond 2^31 elements need a GPU's memory")
@pytest.mark.parametrize(("channels", "classes"), [(16384, 10), (16, 21841)], ids=["features", "softmax"])
def test_more_than_two_to_the_31_elements(device, channels, classes):
    samples = 2**31 // max(channels, classes) + 3
    h = torch.zeros(samples, channels, dtype=torch.float16, device=device)
    h[-2:] = torch.rand(2, channels, device=device)
    weight = torch.randn(classes, channels, device=device)
    outputs = masked_energy(h, weight, None, None, None)
    for ours, expected in zip(outputs, masked_energy(h[-2:], weight, None, None, None), strict=True):
        assert torch.equal(ours[-2:], expected)
