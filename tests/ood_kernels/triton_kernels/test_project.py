"""What holds for the projection on every form of basis alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_kernels import reference
from ood_kernels.bases import BASES
from ood_kernels.triton_kernels.combine import combine_kernel
from ood_kernels.triton_kernels.launch import PRECISIONS, record
from ood_kernels.triton_kernels.masked_energy import head_partials
from ood_kernels.triton_kernels.project_factored import factored_plan

# NumPy, which interprets, warns of Inf - Inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# "shifted" and "stored" are dual with a shift, "stored" with its Gram matrix in memory, the other two without.
FORMS = ("dual", "shifted", "stored", "explicit", "factored")
LAUNCHES = {"dual": 2, "shifted": 2, "stored": 3, "explicit": 2, "factored": 3}
# What products may lose one after the other: operands keep 24, 21, 11, 11 and 8 bits.
HAIR = {
    "dual": {"ieee": 1e-6, "tf32x3": 2e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2},
    "explicit": {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3},
    "factored": {"ieee": 1e-6, "tf32x3": 2e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2},
}
every_form = pytest.mark.parametrize("form", FORMS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.pairwise(
    size=[
        (1, 1, 1, 1, (1, 1), 1),
        (17, 3, 33, 7, (3, 6), 33),
        (3, 70, 16, 33, (18, 40), 40),
        (2, 7, 130, 5, (4, 17), 7),
        (2, 32, 128, 32, (8, 64), 40),
    ],
    form=FORMS,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    bias=[True, False],
)
def test_equals_the_truth(make_projection, project, assert_as_good_as_torch, exact, size, form, dtype, bias):
    *sizes, ranks, anchors = size
    a, h, basis = make_projection(form, *sizes, ranks=ranks, anchors=anchors, dtype=dtype, bias=bias)
    assert_as_good_as_torch(project(form, a, h, basis), exact(a, h, basis), basis.project(a, h))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.pairwise(form=FORMS[1:], precision=PRECISIONS, dtype=[torch.float32, torch.bfloat16])
def test_every_precision(make_projection, project, assert_as_good_as_torch, exact, form, precision, dtype):
    a, h, basis = make_projection(form, 16, 5, 40, 33, anchors=70, ranks=(4, 20), dtype=dtype)
    ours, right = project(form, a, h, basis, precision), exact(a, h, basis)
    assert_as_good_as_torch(ours, right, hair=HAIR[basis.kind][precision])
    if precision in ("tf32", "bf16", "fp16") and dtype == torch.float32:
        assert (ours.cpu().double() - right).abs().max() > 1e-5 * right.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.pairwise(form=FORMS[1:], kind=reference.COTANGENTS)
def test_cotangents_from_logits(make_projection, project, device, assert_as_good_as_torch, exact, form, kind):
    _, h, basis = make_projection(form, 7, 70, 12, 5)
    logits = 3 * normal(7, 70, seed=9).float()
    logits[1] = 2.0  # a tie: the first class is the predicted one
    logits[2] *= 3000  # exp overflows without the largest subtracted
    logits[5] -= 5000  # and so does exp(0 - largest), beyond the last class
    logits[3, 4] = torch.nan
    logits[4, 4] = torch.inf
    logits = logits.to(device)
    a, theirs = (reference.cotangent(z.softmax(1), kind) for z in (logits.double(), logits))
    # A head that passes its features on leaves what it does of several tiles of classes.
    passed, identity = torch.empty_like(logits), torch.eye(70, device=device)
    partials, argmaxima = head_partials(logits, identity, None, None, None, "ieee", passed)
    assert partials.shape[1] > 1
    ours = project(form, passed, h, basis, kind=kind, partials=partials, argmaxima=argmaxima)
    assert ours[3:5].isnan().all()
    assert_as_good_as_torch(ours, exact(a, h, basis), basis.project(theirs, h))


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_batch_that_outgrows_the_workspace_goes_in_parts(make_projection, project, monkeypatch, form):
    a, h, basis = make_projection(form, 36, 3, 20)
    together = project(form, a, h, basis)
    monkeypatch.setattr(f"ood_kernels.triton_kernels.project_{basis.kind}.samples_at_once", lambda *_: 16)
    with record() as launches:
        apart = project(form, a, h, basis)
    assert len(launches) == 3 * LAUNCHES[form]
    assert torch.equal(apart, together)


@every_form
def test_no_components_launch_nothing(make_projection, project, form):
    with record() as launches:
        for samples in (5, 0):
            assert project(form, *make_projection(form, samples, components=0)).shape == (samples, 0)
    assert launches == []


def without_memory(form, samples, classes, features, components, ranks=()):
    """(a, h, basis) on the meta device; factored with a bias, whose row keeps the others aligned."""
    bias = form == "factored"
    large = {"explicit": [(components, classes, features)]}
    if bias:
        large[form] = [(classes, ranks[0]), (features + 1, ranks[1]), (components, *ranks)]
    shapes = (samples, classes), (samples, features), *large[form], (components,)
    a, h, *parts = (torch.empty(shape, device="meta") for shape in shapes)
    return a, h, BASES[form].from_parts(parts, bias=bias)


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("explicit", sizes) for sizes in ((10, 512, 200), (1000, 2048, 512), (2, 16384, 4096), (21841, 64, 3))]
    + [
        ("factored", (1000, 2048, 512, (64, 128))),
        ("factored", (10, 512, 200, (8, 16))),
        ("factored", (1000, 16384, 4096, (1000, 64))),
    ],
)
def test_launches_and_a_bounded_workspace(project, form, sizes):
    for samples in (1, 63, 64, 1024):
        with record() as launches:
            project(form, *without_memory(form, samples, *sizes))
        *_, last = first = launches[: LAUNCHES[form]]
        partials = [one.arguments["partial_ptr"] for one in launches if "partial_ptr" in one.arguments]
        largest = max(partial.numel() for partial in partials)
        assert 4 * largest <= 32 * 2**20
        assert all(one.wide for one in first if form == "factored" or one.kernel is not combine_kernel)
        parts = -(-samples // max(1, largest // (last.arguments["splits"] * sizes[2])))
        assert len(launches) == LAUNCHES[form] * parts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 1000), st.integers(1, 500), st.integers(1, 5000), st.sampled_from(PRECISIONS))
def test_splits_cover_every_class_factor_once(class_rank, feature_rank, components, precision):
    plan = factored_plan(without_memory("factored", 1, 7, 9, components, (class_rank, feature_rank))[2], precision)
    step = plan.projection["BLOCK_R"]
    assert (plan.splits - 1) * step < class_rank <= plan.splits * step
    assert (plan.component_tiles - 1) * 32 < components <= plan.component_tiles * 32
    assert 4 * plan.splits * plan.projection["BLOCK_N"] * components <= 32 * 2**20
