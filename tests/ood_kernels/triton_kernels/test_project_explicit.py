from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.triton_kernels import project_explicit as family
from ood_kernels.triton_kernels.launch import PRECISIONS, record
from ood_kernels.triton_kernels.masked_energy import head_partials
from ood_kernels.triton_kernels.project_explicit import explicit_plan

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What a product may lose in each precision: operands keep 24, 21, 11, 11 and 8 bits.
HAIR = {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(device, samples=5, classes=4, features=33, components=7, *, bias=True, dtype=torch.float32):
    a = normal(samples, classes).softmax(1).to(dtype)
    h = normal(samples, features, seed=1).relu().to(dtype)
    vectors = normal(components, classes, features + bias, seed=2, dtype=dtype)
    return tuple(part.to(device) for part in (a, h, vectors, normal(components, seed=3, dtype=dtype)))


def project_explicit(a, h, vectors, constants, bias=True, *precision, **options):
    """The launcher on a basis given as the reference takes it."""
    return family.project_explicit(a, h, ok.ExplicitTensors(vectors, constants, bias=bias), *precision, **options)


def truth(a, h, vectors, constants, bias=True):
    """The projection in fp64 from the materialised gradients, in one product."""
    a, h, vectors, constants = (part.detach().cpu().double() for part in (a, h, vectors, constants))
    extended = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) if bias else h
    return torch.einsum("nc,nd,kcd->nk", a, extended, vectors) - constants


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("samples", "classes", "features", "components", "dtype"),
    [
        (1, 2, 1, 1, torch.float32),
        (17, 3, 33, 7, torch.float32),
        (2, 1, 16, 33, torch.float32),
        (3, 7, 130, 5, torch.float32),
        (5, 4, 33, 7, torch.bfloat16),
        (5, 4, 33, 7, torch.float16),
        (2, 3, 128, 32, torch.bfloat16),
    ],
)
def test_equals_the_truth(
    device, poisoned, assert_as_good_as_torch, samples, classes, features, components, dtype, bias
):
    inputs = make(device, samples, classes, features, components, bias=bias, dtype=dtype)
    ours = project_explicit(*inputs, bias)
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, truth(*inputs, bias), reference.project_explicit(*inputs, bias))


@pytest.mark.parametrize(
    ("elements", "class_step", "feature_step"), [(16, 1, 32), (60, 4, 32), (120, 7, 32), (200, 7, 64)]
)
def test_splits_over_classes_and_features(
    device, poisoned, assert_as_good_as_torch, monkeypatch, elements, class_step, feature_step
):
    inputs = make(device, 3, 7, 70, 5)
    monkeypatch.setattr(family, "_ELEMENTS", elements)
    plan = explicit_plan(ok.ExplicitTensors(*inputs[2:]), "ieee")
    assert (plan.arguments["class_step"], plan.arguments["feature_step"]) == (class_step, feature_step)
    assert_as_good_as_torch(project_explicit(*inputs), truth(*inputs), reference.project_explicit(*inputs))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_precision(device, poisoned, assert_as_good_as_torch, precision, dtype):
    inputs = make(device, 16, 3, 40, 33, dtype=dtype)
    ours = project_explicit(*inputs, True, precision)
    assert_as_good_as_torch(ours, truth(*inputs), hair=HAIR[precision])


@pytest.mark.parametrize("precision", ROUNDED)
def test_low_precision_rounds_features_and_vectors_and_nothing_else(device, assert_as_good_as_torch, precision):
    a, h, vectors, constants = make(device, 5, 3, 40)
    ours = project_explicit(a, h, vectors, constants, True, precision)
    dtype = ROUNDED[precision]
    weights = torch.cat([vectors[..., :-1].to(dtype).float(), vectors[..., -1:]], 2)
    assert_as_good_as_torch(ours, truth(a, h.to(dtype), weights, constants))
    assert (ours.cpu().double() - truth(a, h, vectors, constants)).abs().max() > 1e-5


@pytest.mark.parametrize("kind", reference.COTANGENTS)
def test_forms_the_cotangent_from_logits(device, poisoned, assert_as_good_as_torch, kind):
    h, weight, bias = (part.to(device) for part in (normal(5, 12), normal(40, 12, seed=1), normal(40, seed=2)))
    weight[7] = weight[3]
    bias[7] = bias[3] = 30.0
    logits = h.new_empty(5, 40)
    partials, argmaxima = head_partials(h, weight, bias, None, None, "ieee", logits)
    assert partials.shape[1] > 1
    _, _, vectors, constants = make(device, 5, 40, 12, 3)
    ours = project_explicit(logits, h, vectors, constants, kind=kind, partials=partials, argmaxima=argmaxima)
    p = torch.nn.functional.linear(h.cpu().double(), weight.cpu().double(), bias.cpu().double()).softmax(1)
    expected = truth(reference.cotangent(p, kind), h, vectors, constants)
    theirs = reference.project_explicit(reference.cotangent(p.float().to(device), kind), h, vectors, constants)
    assert_as_good_as_torch(ours, expected, theirs, hair=3e-6)


def layouts(tensor):
    """The same values in other places: padded rows, other axes first, every second element, one element further."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 4), torch.nan)
    padded, stepped = wide[..., 2 : 2 + tensor.shape[-1]], wide[..., -2 * tensor.shape[-1] :: 2].clone()
    shifted = torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)
    return [padded.copy_(tensor), tensor.movedim(0, -1).contiguous().movedim(-1, 0), stepped.copy_(tensor), shifted]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_layouts_and_offsets_change_nothing(device, which):
    inputs = list(make(device, 5, 3, 48, 6))
    expected = project_explicit(*inputs)
    for other in layouts(inputs[which]):
        moved = [*inputs[:which], other, *inputs[which + 1 :]]
        assert torch.equal(project_explicit(*moved), expected)


def test_expanded_inputs(device, assert_as_good_as_torch):
    a, h, vectors, constants = make(device, 4, 3, 20)
    for inputs in (
        (a[:1].expand(4, -1), h[:1].expand(4, -1), vectors, constants),
        (a[:, :1].expand(-1, 3), h[:, :1].expand(-1, 20), vectors, constants[:1].expand(7)),
        (a, h, vectors[:1].expand(7, -1, -1), constants),
        (a, h, vectors[:, :1].expand(-1, 3, -1), constants),
        (a, h, vectors[..., :1].expand(-1, -1, 21), constants),
    ):
        assert_as_good_as_torch(project_explicit(*inputs), truth(*inputs))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_is_bitwise_the_same_in_any_batch(device, precision):
    samples = 18 if precision == "ieee" else 66
    inputs = make(device, samples, 3, 40, 9)
    a, h, *basis = inputs
    together = project_explicit(*inputs, True, precision)
    for row in (1, samples - 1):
        alone = project_explicit(a[row : row + 1], h[row : row + 1], *basis, True, precision)
        assert torch.equal(alone[0], together[row])
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(project_explicit(a[order], h[order], *basis, True, precision), together[order])
    assert torch.equal(project_explicit(*inputs, True, precision), together)


def test_a_batch_that_outgrows_the_workspace_is_worked_through_in_parts(device, monkeypatch):
    inputs = make(device, 36, 3, 20, 9)
    together = project_explicit(*inputs)
    monkeypatch.setattr(family, "samples_at_once", lambda *_: 16)
    with record() as launches:
        apart = project_explicit(*inputs)
    assert len(launches) == 6
    assert torch.equal(apart, together)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["a", "h"])
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_a_bad_value_reaches_its_own_sample_alone(device, bad, which, precision):
    a, h, *basis = make(device, 20, 3, 40, 9)
    clean = project_explicit(a, h, *basis, True, precision)
    (a if which == "a" else h)[11, 2] = bad
    ours = project_explicit(a, h, *basis, True, precision)
    assert not ours[11].isfinite().any()
    others = torch.arange(20, device=device) != 11
    assert torch.equal(ours[others], clean[others])


@pytest.mark.parametrize(("samples", "components"), [(0, 7), (5, 0), (0, 0)])
def test_nothing_to_do_launches_nothing(device, samples, components):
    with record() as launches:
        assert project_explicit(*make(device, samples, components=components)).shape == (samples, components)
    assert launches == []


def test_inputs_stay_as_they_were(device):
    inputs = make(device)
    before = [part.clone() for part in inputs]
    output = project_explicit(*inputs)
    output.fill_(-123.0)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


@pytest.mark.parametrize("samples", [1, 63, 64, 1024])
@pytest.mark.parametrize(
    ("classes", "features", "components"), [(10, 512, 200), (1000, 2048, 512), (2, 16384, 4096), (21841, 64, 3)]
)
def test_two_launches_and_a_bounded_workspace(samples, classes, features, components):
    def meta(*shape):
        return torch.empty(shape, device="meta")

    with record() as launches:
        project_explicit(
            meta(samples, classes),
            meta(samples, features),
            meta(components, classes, features),
            meta(components),
            False,
        )
    largest = max(launch.arguments["partial_ptr"].numel() for launch in launches)
    assert 4 * largest <= 32 * 2**20
    assert all(launch.wide for launch in launches if launch.kernel is family.explicit_kernel)
    parts = -(-samples // max(1, largest // (launches[1].arguments["splits"] * components)))
    assert len(launches) == 2 * parts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30000), st.integers(1, 20000), st.integers(1, 5000), st.sampled_from(PRECISIONS))
def test_splits_cover_every_class_and_feature_once(classes, features, components, precision):
    vectors = torch.empty(components, classes, features, device="meta")
    plan = explicit_plan(ok.ExplicitTensors(vectors, vectors[:, 0, 0], bias=False), precision)
    class_step, feature_step = plan.arguments["class_step"], plan.arguments["feature_step"]
    assert feature_step % plan.arguments["BLOCK_D"] == 0
    feature_splits, class_splits = -(-features // feature_step), -(-classes // class_step)
    assert plan.splits == feature_splits * class_splits
    assert (feature_splits - 1) * feature_step < features
    assert (class_splits - 1) * class_step < classes
    assert plan.component_tiles * plan.splits <= max(512, plan.component_tiles)


def test_rows_that_16_bytes_divide_are_known_to_be_aligned():
    for vectors, bias, wide in (
        (torch.zeros(2, 3, 24), False, True),
        (torch.zeros(2, 3, 25), True, False),
        (torch.zeros(2, 3, 28)[..., :25], True, True),
        (torch.zeros(2, 3, 24, dtype=torch.bfloat16), False, True),
        (torch.zeros(2, 3, 28, dtype=torch.bfloat16), False, False),
        (torch.zeros(2, 24, 3).mT, False, False),
    ):
        assert explicit_plan(ok.ExplicitTensors(vectors, torch.zeros(2), bias=bias), "ieee").wide == wide


def test_giant_bases_are_addressed_with_64_bits(device, monkeypatch):
    inputs = make(device)
    expected = project_explicit(*inputs)
    monkeypatch.setattr(family, "is_far", lambda *_: True)
    with record() as launches:
        assert torch.equal(project_explicit(*inputs), expected)
    assert launches[0].arguments["FAR"]
    monkeypatch.undo()
    assert family.is_far(torch.empty(40, 21841, 4096, device="meta"), 32)
    assert not family.is_far(torch.empty(512, 1000, 2049, device="meta"), 32)
    assert family.is_far(torch.empty(2049, 1000, 2000, device="meta").movedim(0, -1), 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 elements need a GPU")
def test_offsets_beyond_32_bits(device):
    vectors = torch.zeros((3, 2**12, 2**18), dtype=torch.bfloat16, device=device)
    vectors[2, -1, -300:] = 1
    a, h = torch.ones((2, 2**12), device=device), torch.ones((2, 2**18), device=device)
    ours = project_explicit(a, h, vectors, torch.zeros(3, device=device), False)
    assert ours.tolist() == [[0.0, 0.0, 300.0]] * 2
