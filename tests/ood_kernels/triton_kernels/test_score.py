from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.cases import Case, operands
from ood_kernels.masks import pack_mask
from ood_kernels.triton_kernels import score as family
from ood_kernels.triton_kernels.launch import forced, record
from ood_kernels.triton_kernels.masked_energy import masked_energy
from ood_kernels.triton_kernels.pool_nap import pool_nap
from ood_kernels.triton_kernels.project_gradients import project_gradients
from ood_kernels.workloads import WORKLOADS
from tests.ood_kernels.triton_kernels.conftest import LAYOUTS

# numpy, which interprets, warns of Inf - Inf where a NaN is what shall come out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts loads in the interpreter")

LIMITS = {"small": 2**30, "large": 0}
BASES = ("none", "dual", "shifted", "explicit", "factored")
META = torch.device("meta")


@pytest.fixture(params=LIMITS)
def plan(request) -> str:
    """Both plans, whatever the size of head and basis."""
    return request.param


@pytest.fixture
def make(make_problem, device):
    """A feature map, a pruned head with a packed mask and a basis."""

    def build(samples=4, channels=33, classes=5, side=3, *, form="shifted", components=3, anchors=40, **options):
        form = "" if form == "none" else form
        feature_map, head, basis = make_problem(
            samples, channels, classes, side, form=form, components=components, anchors=anchors, **options
        )
        head = head._replace(weight_mask=pack_mask(head.weight_mask))
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), (feature_map, head, basis))

    return build


def run(plan, feature_map, head, basis, eps=1.0, rectify=False, precision="ieee", **settings):
    """The launcher as the torch operator calls it, with a plan of our choice."""
    with forced({"score": {"LIMIT_KIB": LIMITS[plan], **settings}}):
        outputs = family.score(feature_map, eps, rectify, *head, basis, precision=precision)
    return ok.ScoreOutputs(*outputs)


def doubled(tensors):
    """Head or basis in fp64, on the CPU."""
    parts = (part.cpu() if isinstance(part, Tensor) else part for part in tensors)
    return type(tensors)(
        *(part.double() if isinstance(part, Tensor) and part.is_floating_point() else part for part in parts)
    )


@pytest.fixture
def check(assert_as_good_as_torch):
    """Run the launcher in a plan of our choice and hold it to the reference in fp64 and in the dtypes of its operands."""

    def compare(plan, feature_map, head, basis, eps=1.0, rectify=False, hair=2e-6, **settings):
        ours = run(plan, feature_map, head, basis, eps, rectify, **settings)
        exact = feature_map.cpu().double(), doubled(head), basis and doubled(basis), eps
        theirs = reference.score(feature_map, head, basis, eps, rectify=rectify)
        assert_as_good_as_torch(ours, reference.score(*exact, rectify=rectify), theirs, hair)

    return compare


def masked(head, masks):
    """The head with its masks stored in another way, or with others."""
    keep = torch.rand(head.weight.shape, generator=torch.Generator().manual_seed(3)).to(head.weight.device) > 0.4
    return {
        "bits": head,
        "none": ok.Head(head.weight),
        "weights": head._replace(neuron_mask=None),
        "neurons": head._replace(weight_mask=None),
        "bytes": head._replace(weight_mask=keep),
        "all pruned": head._replace(neuron_mask=head.neuron_mask & False),
    }[masks]


@pytest.mark.pairwise(
    small_or_large=LIMITS,
    form=BASES,
    cotangent=reference.COTANGENTS,
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    masks=("bits", "none", "weights", "neurons", "bytes", "all pruned"),
)
def test_equals_the_truth(make, poisoned, check, small_or_large, form, cotangent, dtype, masks):
    side = 3 if dtype == torch.float32 else 4
    feature_map, head, basis = make(
        form=form, cotangent=cotangent, dtype=dtype, classes=19, side=side, bias=cotangent != "uniform"
    )
    check(small_or_large, feature_map, masked(head, masks), basis)


@pytest.mark.parametrize("form", ["dual", "explicit"])
def test_head_and_basis_in_other_dtypes_than_the_map(make, check, plan, form):
    feature_map, head, basis = make(form=form)
    check(plan, feature_map.bfloat16(), head._replace(weight=head.weight.half()), basis.to(torch.bfloat16))


def test_a_tie_goes_to_the_first_class(make, check, plan):
    feature_map, head, basis = make(form="dual", cotangent="predicted", classes=40)
    head.weight[23], head.bias[23], head.bias[4] = head.weight[4], 30.0, 30.0
    check(plan, feature_map, head, basis)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16", "fp16"])
def test_every_precision(make, poisoned, check, plan, precision):
    inputs = make(form="shifted")
    check(plan, *inputs, hair=1e-5 if precision == "tf32x3" else 2e-2, precision=precision)
    h = run(plan, *inputs, precision=precision).h
    assert (h.cpu() - reference.pool_nap(inputs[0].cpu().double())[0]).abs().max() < 1e-6


MAPS = LAYOUTS | {"one position": lambda tensor: tensor[..., :1, :1], "one row": lambda tensor: tensor[..., :1, :]}


@pytest.mark.parametrize(("layout", "rectify"), [(layout, index % 2 == 1) for index, layout in enumerate(MAPS)])
def test_any_layout_of_the_map(make, poisoned, check, layout, rectify):
    dtype = torch.bfloat16 if rectify else torch.float32
    feature_map, head, basis = make(form="none", side=6, dtype=dtype)
    # Nothing but the map itself may reach a maximum below zero, nor a denominator that only the map makes positive.
    signed, eps = (feature_map - 0.3, 0.0) if rectify else (-0.1 - feature_map, 10.0)
    check("small", MAPS[layout](signed), head, basis, eps, rectify, POOL_D=16)


def test_large_plan_takes_other_layouts(make, poisoned, check):
    feature_map, head, basis = make(form="shifted", channels=64, side=4)
    for layout in ("channels last", "tokens"):
        check("large", LAYOUTS[layout](feature_map), head, basis, 2.0, True)


def test_a_denominator_that_is_not_positive_is_nan(make, plan):
    feature_map, head, basis = make(form="none")
    feature_map[2, 5] = -2.0
    assert run(plan, feature_map, head, basis).nap.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("form", ["shifted", "explicit", "factored"])
def test_is_the_composition_of_its_parts(make, form):
    # Several tiles of samples and of components.
    feature_map, head, basis = make(18, channels=20, classes=2, side=2, form=form, components=40)
    outputs = run("large", feature_map, head, basis, 0.5)
    h, nap = pool_nap(feature_map, 0.5, False)
    lse, pruned_lse, p = masked_energy(h, *head)
    g_low = project_gradients(p, h, basis)
    small = run("small", feature_map[:3], head, basis, 0.5)
    for name, value, other, right in zip(
        outputs._fields, outputs, small, (h, nap, lse, pruned_lse, p, g_low), strict=True
    ):
        # The same tiles, so the same bits, but a compiler may fuse other products and sums.
        torch.testing.assert_close(value, right, rtol=0, atol=0 if h.device.type == "cpu" else 1e-6, msg=name)
        torch.testing.assert_close(other, right[:3], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", ["dual", "explicit", "factored"])
def test_a_basis_without_components_is_none(make, plan, form):
    feature_map, head, basis = make(form=form, components=0)
    outputs = run(plan, feature_map, head, basis)
    assert outputs.g_low.shape == (4, 0)
    for value, right in zip(outputs, run(plan, feature_map, head, None), strict=True):
        assert torch.equal(value, right)


def names(launches):
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize("form", BASES)
def test_launches_and_who_sees_the_map(make, form):
    feature_map, head, basis = make(form=form)
    for plan, count in (("small", 1), ("large", 3)):
        with record() as launches:
            run(plan, feature_map, head, basis)
        assert len(launches) == count
        pointers = [
            [each.data_ptr() for each in tree_leaves(one.arguments) if torch.is_tensor(each)] for one in launches
        ]
        assert [feature_map.data_ptr() in each for each in pointers] == [True, False, False][:count]


def on_meta(workload, samples, form):
    """The operands of a workload in bf16, without memory."""
    case = Case("score", WORKLOADS[workload], torch.bfloat16, precision="bf16", basis=form, samples=samples)
    return operands(case, META)


def default_launches(values):
    with record() as launches:
        family.score(**values)
    return launches


@pytest.mark.parametrize("workload", ["R50", "R18", "ViT", "MobileNetV2"])
def test_at_most_three_launches_for_real_heads(workload):
    for samples, form in itertools.product((1, 256), (None, "dual", "explicit", "factored")):
        expected = 1 if (workload, form) == ("R18", None) else 3
        assert len(default_launches(on_meta(workload, samples, form))) == expected


def test_the_plan_does_not_know_the_batch(monkeypatch):
    for workload, form in (("R18", None), ("R50", "dual"), ("R50", "explicit"), ("R50", "factored")):
        settings = []
        for samples in (1, 7, 200):
            launches = default_launches(on_meta(workload, samples, form))
            constants = [
                {name: value for name, value in launch.arguments.items() if name.isupper() or name.startswith("num_")}
                for launch in launches
            ]
            settings.append((names(launches), constants))
        assert settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize("form", ["dual", "explicit", "factored"])
def test_parts_of_a_batch_are_equal_and_run_the_same_compiled_kernel(form):
    launches = default_launches(on_meta("R50", 6001, form))
    last = [launch.arguments for launch in launches if "tickets_ptr" in launch.arguments]
    samples = [arguments["samples"] for arguments in last]
    assert len(last) > 1
    assert max(samples) - min(samples) <= last[0]["BLOCK_N"] * len(last)
    assert all(arguments["tickets_ptr"].storage_offset() % 4 == 0 for arguments in last)


@settings(deadline=None, max_examples=20)
@given(
    samples=st.integers(1, 6000),
    workload=st.sampled_from(["R50", "W21k", "R18"]),
    form=st.sampled_from([None, "dual", "factored"]),
)
def test_workspace_stays_small_and_the_map_is_read_once(samples, workload, form):
    values = on_meta(workload, samples, form)
    sizes = []
    new_empty = Tensor.new_empty

    def counted(self, *size, **options):
        result = new_empty(self, *size, **options)
        sizes.append(result.nbytes)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", counted)
        launches = default_launches(values)
    size = WORKLOADS[workload]
    components = size.components if form else 0
    outputs = 4 * samples * (size.channels + 3 + size.classes + components)
    pooled = 4 * samples * size.channels
    assert sum("feature_map_ptr" in launch.arguments for launch in launches) == 1
    # Workspace of one part of the batch, allocated anew for some of it, and what the pooling leaves for all.
    parts = max(1, (len(launches) - 1) // 2)
    assert sum(sizes) - outputs <= 64 * 2**20 + pooled + (parts - 1) * 20 * samples * size.classes / 16 / parts


@pytest.mark.parametrize("form", ["none", "shifted", "factored"])
def test_a_large_batch_is_worked_off_in_parts(make, poisoned, monkeypatch, plan, form):
    samples = 3 if form == "none" else 18 if plan == "large" else 6
    feature_map, head, basis = make(samples, channels=8, form=form, side=2)
    expected = run(plan, feature_map, head, basis)
    monkeypatch.setattr(family, "_WORKSPACE_BYTES", 1)
    with record() as launches:
        outputs = run(plan, feature_map, head, basis)
    parts = (3 if plan == "large" else 1) if form == "none" else 2
    assert len(launches) == (parts if plan == "small" else 1 + 2 * parts)
    for value, right in zip(outputs, expected, strict=True):
        assert torch.equal(value, right)


def addresses(tensor):
    """Where every element lies."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        offsets += (torch.arange(size) * stride).view([-1 if axis == other else 1 for other in range(tensor.ndim)])
    return np.sort((tensor.data_ptr() + offsets * tensor.element_size()).flatten().numpy())


@interpreted
@pytest.mark.parametrize(
    ("layout", "form"),
    [(layout, "none") for layout in ("contiguous", "channels last", "tokens", "padded")]
    + [("contiguous", form) for form in ("shifted", "factored")],
)
def test_every_element_of_the_map_is_read_exactly_once(make, monkeypatch, plan, layout, form):
    from triton.runtime import interpreter

    feature_map, head, basis = make(2, 32, side=4, form=form) if plan == "large" else make(5, side=3, form=form)
    feature_map = LAYOUTS[layout](feature_map)
    where = addresses(feature_map)
    read = []
    load = interpreter.InterpreterBuilder.create_masked_load

    def counted(self, ptrs, mask, *rest):
        taken = ptrs.data[mask.data].astype(np.int64)
        read.append(taken[(taken >= where[0]) & (taken <= where[-1])])
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
    run(plan, feature_map, head, basis)
    assert np.array_equal(np.sort(np.concatenate(read)), where)


@interpreted
@pytest.mark.parametrize("form", ["shifted", "explicit", "factored"])
def test_who_adds_waits_for_all_who_write(make, monkeypatch, form):
    from triton.runtime.interpreter import InterpreterBuilder

    programs: list[list[tuple[str, np.ndarray]]] = []

    def watch(name, note):
        original = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, *given: note(original(self, *given), *given))

    def noted(result, key, ptrs, mask):
        programs[-1].append((key, ptrs.data[mask.data].astype(np.int64).ravel()))
        return result

    def atomic(result, _, ptrs, value, mask, sem, scope):
        key = str(sem).rpartition(".")[2].lower()
        # As if the last had not arrived yet: the program must look again.
        if key == "acquire" and not any(event == key for event, _ in programs[-1]):
            result.data -= 1
        return noted(result, key, ptrs, mask)

    watch("set_grid_idx", lambda *_: programs.append([]))
    watch("create_masked_store", lambda result, ptrs, value, mask, *_: noted(result, "write", ptrs, mask))
    watch("create_masked_load", lambda result, ptrs, mask, *_: noted(result, "read", ptrs, mask))
    watch("create_atomic_rmw", atomic)
    # Several tiles of samples and of components.
    with record() as launches:
        run("large", *make(18, channels=20, classes=2, side=2, form=form, components=40))
    partial, programs = launches[-1].arguments["partial_ptr"], programs[-launches[-1].grid[0] :]
    span = partial.data_ptr(), partial.data_ptr() + partial.nbytes

    def places(events, key):
        found = np.concatenate([np.zeros(0, np.int64), *(places for event, places in events if event == key)])
        return set(found if key in ("release", "acquire") else found[(found >= span[0]) & (found < span[1])])

    released = {}
    for events in programs:
        counters, written = places(events, "release"), places(events, "write")
        released |= dict.fromkeys(written, counters)
        if counters:
            assert [event for event, _ in events].index("release") == len(events) - 1
            assert written
    read = [place for events in programs for place in places(events, "read")]
    assert sorted(read) == sorted(released)
    assert len(read) == partial.numel()
    for events in programs:
        assert [event for event, _ in events].count("acquire") == (2 if places(events, "acquire") else 0)
        assert all(released[place] == places(events, "acquire") for place in places(events, "read"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs memory for more than 2^31 elements: a GPU")
def test_maps_beyond_two_to_the_31(device, plan):
    base = torch.rand(1, 64, 4, 4, device=device, dtype=torch.bfloat16)
    feature_map = torch.zeros(2**31 // 1024 + 3, 64, 4, 4, device=device, dtype=torch.bfloat16)
    feature_map[-1] = base
    head = ok.Head(torch.randn(3, 64, device=device))
    for value, right in zip(run(plan, feature_map, head, None), run(plan, base, head, None), strict=True):
        assert torch.equal(value[-1:], right)
