from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.triton_kernels import project_factored as family
from ood_kernels.triton_kernels.launch import PRECISIONS, record
from ood_kernels.triton_kernels.masked_energy import head_partials
from ood_kernels.triton_kernels.project_factored import factored_plan

# What the three products may lose one after the other: operands keep 24, 21, 11, 11 and 8 bits.
HAIR = {"ieee": 1e-6, "tf32x3": 2e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(device, samples=5, classes=4, features=33, ranks=(3, 6), components=7, *, bias=True, dtype=torch.float32):
    class_rank, feature_rank = ranks
    parts = (
        normal(samples, classes).softmax(1).to(dtype),
        normal(samples, features, seed=1).relu().to(dtype),
        normal(classes, class_rank, seed=2, dtype=dtype),
        normal(features + bias, feature_rank, seed=3, dtype=dtype) / features**0.5,
        normal(components, class_rank, feature_rank, seed=4, dtype=dtype),
        normal(components, seed=5, dtype=dtype),
    )
    return tuple(part.to(device) for part in parts)


def project_factored(a, h, class_factors, feature_factors, core, constants, bias=True, *precision, **options):
    """The launcher on a basis given as the reference takes it."""
    basis = ok.FactoredTensors(class_factors, feature_factors, core, constants, bias=bias)
    return family.project_factored(a, h, basis, *precision, **options)


def truth(a, h, class_factors, feature_factors, core, constants, bias=True):
    """The projection in fp64 on the vectors that the basis stands for."""
    a, h, class_factors, feature_factors, core, constants = (
        part.detach().cpu().double() for part in (a, h, class_factors, feature_factors, core, constants)
    )
    extended = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) if bias else h
    vectors = torch.einsum("cr,krq,dq->kcd", class_factors, core, feature_factors)
    return torch.einsum("nc,nd,kcd->nk", a, extended, vectors) - constants


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("samples", "classes", "features", "ranks", "components", "dtype"),
    [
        (1, 2, 1, (1, 1), 1, torch.float32),
        (17, 5, 33, (3, 6), 7, torch.float32),
        (3, 70, 16, (18, 40), 33, torch.float32),
        (2, 40, 130, (4, 17), 5, torch.float32),
        (5, 4, 33, (3, 6), 7, torch.bfloat16),
        (5, 4, 33, (3, 6), 7, torch.float16),
        (2, 32, 64, (8, 64), 32, torch.bfloat16),
    ],
)
def test_equals_the_truth(
    device, poisoned, assert_as_good_as_torch, samples, classes, features, ranks, components, dtype, bias
):
    inputs = make(device, samples, classes, features, ranks, components, bias=bias, dtype=dtype)
    ours = project_factored(*inputs, bias)
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, truth(*inputs, bias), reference.project_factored(*inputs, bias))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_precision(device, poisoned, assert_as_good_as_torch, precision, dtype):
    inputs = make(device, 16, 9, 70, (4, 20), 33, dtype=dtype)
    ours = project_factored(*inputs, True, precision)
    assert_as_good_as_torch(ours, truth(*inputs), hair=HAIR[precision])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_shows(device, precision):
    inputs = make(device)
    error = project_factored(*inputs, True, precision).cpu().double() - truth(*inputs)
    assert error.abs().max() > 1e-5


@pytest.mark.parametrize("kind", reference.COTANGENTS)
def test_forms_the_cotangent_from_logits(device, poisoned, assert_as_good_as_torch, kind):
    h, weight, bias = (part.to(device) for part in (normal(5, 12), normal(70, 12, seed=1), normal(70, seed=2)))
    weight[7] = weight[3]
    bias[7] = bias[3] = 30.0
    logits = h.new_empty(5, 70)
    partials, argmaxima = head_partials(h, weight, bias, None, None, "ieee", logits)
    assert partials.shape[1] > 1
    _, _, *basis = make(device, 5, 70, 12)
    ours = project_factored(logits, h, *basis, kind=kind, partials=partials, argmaxima=argmaxima)
    p = torch.nn.functional.linear(h.cpu().double(), weight.cpu().double(), bias.cpu().double()).softmax(1)
    expected = truth(reference.cotangent(p, kind), h, *basis)
    theirs = reference.project_factored(reference.cotangent(p.float().to(device), kind), h, *basis)
    assert_as_good_as_torch(ours, expected, theirs, hair=3e-6)


def layouts(tensor):
    """The same values in other places: padded rows, other axes first, every second element, one element further."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 4), torch.nan)
    padded, stepped = wide[..., 2 : 2 + tensor.shape[-1]], wide[..., -2 * tensor.shape[-1] :: 2].clone()
    shifted = torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)
    return [padded.copy_(tensor), tensor.movedim(0, -1).contiguous().movedim(-1, 0), stepped.copy_(tensor), shifted]


@pytest.mark.parametrize("which", range(5))
def test_layouts_and_offsets_change_nothing(device, which):
    inputs = list(make(device, 5, 6, 40, (4, 8), 6))
    expected = project_factored(*inputs)
    for other in layouts(inputs[which]):
        moved = [*inputs[:which], other, *inputs[which + 1 :]]
        assert torch.equal(project_factored(*moved), expected)


def test_expanded_inputs(device, assert_as_good_as_torch):
    a, h, class_factors, feature_factors, core, constants = make(device, 4, 4, 20)
    for inputs in (
        (a[:1].expand(4, -1), h[:, :1].expand(-1, 20), class_factors, feature_factors, core, constants),
        (a, h, class_factors[:1].expand(4, -1), feature_factors[:, :1].expand(-1, 6), core, constants),
        (a, h, class_factors, feature_factors, core[:1].expand(7, -1, -1), constants[:1].expand(7)),
        (a, h, class_factors, feature_factors, core[..., :1].expand(-1, -1, 6), constants),
    ):
        assert_as_good_as_torch(project_factored(*inputs), truth(*inputs))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_is_bitwise_the_same_in_any_batch(device, precision):
    samples = 18 if precision == "ieee" else 66
    inputs = make(device, samples)
    a, h, *basis = inputs
    together = project_factored(*inputs, True, precision)
    for row in (1, samples - 1):
        alone = project_factored(a[row : row + 1], h[row : row + 1], *basis, True, precision)
        assert torch.equal(alone[0], together[row])
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(project_factored(a[order], h[order], *basis, True, precision), together[order])
    assert torch.equal(project_factored(*inputs, True, precision), together)


def test_a_batch_that_outgrows_the_workspace_is_worked_through_in_parts(device, monkeypatch):
    inputs = make(device, 36)
    together = project_factored(*inputs)
    monkeypatch.setattr(family, "samples_at_once", lambda *_: 16)
    with record() as launches:
        apart = project_factored(*inputs)
    assert len(launches) == 9
    assert torch.equal(apart, together)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["a", "h"])
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_a_bad_value_reaches_its_own_sample_alone(device, bad, which, precision):
    a, h, *basis = make(device, 20)
    clean = project_factored(a, h, *basis, True, precision)
    (a if which == "a" else h)[11, 2] = bad
    ours = project_factored(a, h, *basis, True, precision)
    assert not ours[11].isfinite().any()
    others = torch.arange(20, device=device) != 11
    assert torch.equal(ours[others], clean[others])


@pytest.mark.parametrize(("samples", "components"), [(0, 7), (5, 0), (0, 0)])
def test_nothing_to_do_launches_nothing(device, samples, components):
    with record() as launches:
        assert project_factored(*make(device, samples, components=components)).shape == (samples, components)
    assert launches == []


def test_inputs_stay_as_they_were(device):
    inputs = make(device)
    before = [part.clone() for part in inputs]
    output = project_factored(*inputs)
    output.fill_(-123.0)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


def meta_basis(classes, features, ranks, components, bias=False):
    class_rank, feature_rank = ranks
    shapes = (classes, class_rank), (features + bias, feature_rank), (components, class_rank, feature_rank)
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


@pytest.mark.parametrize("samples", [1, 64, 1024])
@pytest.mark.parametrize(
    ("classes", "features", "ranks", "components"),
    [(1000, 2048, (64, 128), 512), (10, 512, (8, 16), 200), (1000, 16384, (1000, 64), 4096)],
)
def test_three_launches_and_a_bounded_workspace(samples, classes, features, ranks, components):
    basis = meta_basis(classes, features, ranks, components, bias=True)
    a, h, constants = (
        torch.empty(shape, device="meta") for shape in ((samples, classes), (samples, features), components)
    )
    with record() as launches:
        project_factored(a, h, *basis, constants)
    largest = max(launch.arguments["partial_ptr"].numel() for launch in launches if "partial_ptr" in launch.arguments)
    assert 4 * largest <= 32 * 2**20
    assert all(launch.wide for launch in launches)
    parts = -(-samples // max(1, largest // (launches[2].arguments["splits"] * components)))
    assert len(launches) == 3 * parts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 1000), st.integers(1, 500), st.integers(1, 5000), st.sampled_from(PRECISIONS))
def test_splits_cover_every_class_factor_once(class_rank, feature_rank, components, precision):
    basis = meta_basis(7, 9, (class_rank, feature_rank), components)
    plan = factored_plan(ok.FactoredTensors(*basis, torch.empty(components, device="meta"), bias=False), precision)
    step = plan.projection["BLOCK_R"]
    assert (plan.splits - 1) * step < class_rank <= plan.splits * step
    assert (plan.component_tiles - 1) * 32 < components <= plan.component_tiles * 32
    assert 4 * plan.splits * plan.projection["BLOCK_N"] * components <= 32 * 2**20
