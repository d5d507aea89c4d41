"""What holds for every operator alike, each by turns with its options, its masks and every form of basis."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ood_kernels as ok
from ood_kernels import ops, reference
from ood_kernels.bases import explicit as explicit_form
from ood_kernels.masks import pack_mask

# torch's own, at the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PER_CHANNEL = ("h", "ratios", "nap_mean", "maximum")


class Operator(NamedTuple):
    """A public function, the options it is called with and what its operands are."""

    function: str
    outputs: tuple[str, ...]
    options: Mapping[str, Any] = {}
    form: str = ""
    cotangent: str = "energy"
    bias: bool = True
    masks: str = "bool"

    def __str__(self):
        words = [self.function, *self.options, self.form, self.cotangent, self.masks]
        return " ".join(word for word in words if word not in ("", "energy", "bool"))

    @property
    def samplewise(self):
        """How many of the first operands have a row a sample."""
        return 2 if self.function == "project_gradients" else 1

    def __call__(self, operands, module=ok):
        outputs = getattr(module, self.function)(*operands, **self.options)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


POOLED, PROJECTED = ("h", "nap", "ratios"), ("g_low",)
STATISTICS, ENERGIES = ok.PoolStatistics._fields, ("lse", "pruned_lse", "p")
OPERATORS = (
    Operator("pool_nap", POOLED[:2], {"eps": 2.0}),
    Operator("pool_nap", POOLED, {"rectify": True, "return_ratios": True}),
    Operator("pool_statistics", STATISTICS),
    Operator("pool_statistics", STATISTICS, {"rectify": True}),
    Operator("masked_energy", ENERGIES),
    Operator("masked_energy", ENERGIES, masks="packed"),
    Operator("masked_energy", ENERGIES, masks="absent"),
    Operator("project_gradients", PROJECTED, form="dual", cotangent="max_logit", bias=False),
    Operator("project_gradients", PROJECTED, form="shifted", cotangent="uniform"),
    Operator("project_gradients", PROJECTED, form="explicit"),
    Operator("project_gradients", PROJECTED, form="factored", cotangent="sum_logits", bias=False),
    Operator("score", ok.ScoreOutputs._fields, {"rectify": True}, masks="absent"),
    Operator("score", ok.ScoreOutputs._fields, {"eps": 0.5}, "dual", "predicted"),
    Operator("score", ok.ScoreOutputs._fields, {}, "shifted", "energy", masks="packed"),
    Operator("score", ok.ScoreOutputs._fields, {"rectify": True}, "explicit", "uniform", bias=False),
    Operator("score", ok.ScoreOutputs._fields, {}, "factored", "max_logit"),
)
FUNCTIONS = dict.fromkeys(operator.function for operator in OPERATORS)
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


@pytest.fixture(scope="session")
def make(make_problem):
    """The operands of an operator, in any size and dtype; p and h in that dtype too."""

    def build(operator, samples=5, *sizes, **options):
        options = {"form": operator.form, "cotangent": operator.cotangent, "bias": operator.bias} | options
        feature_map, head, basis = make_problem(samples, *sizes, **options)
        if operator.masks == "absent":
            head = head._replace(bias=None, weight_mask=None, neuron_mask=None)
        elif operator.masks == "packed":
            head = head._replace(weight_mask=pack_mask(head.weight_mask))
        h = feature_map.mean((2, 3))
        p = ok.masked_energy(h, head.weight, head.bias)[2].to(h.dtype)
        return {
            "masked_energy": (h, *head),
            "project_gradients": (p, h, basis),
            "score": (feature_map, head, basis),
        }.get(operator.function, (feature_map,))

    return build


def changed(operands, change):
    return tree_map_only(Tensor, change, operands)


def to(dtype):
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


class Calls(TorchDispatchMode):
    """The operators of this package that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ood_kernels":
            self.seen.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def opcheck(operator, operands, *checks):
    with Calls() as calls:
        operator(operands)
    for function, arguments, options in calls.seen:
        assert function is getattr(ops, function.__name__.partition(".")[0])
        torch.library.opcheck(function, arguments, options, **({"test_utils": checks} if checks else {}))
    return {function.__name__.partition(".")[0] for function, *_ in calls.seen}


def assert_equal(outputs, expected):
    for value, right in zip(outputs, expected, strict=True):
        assert value.dtype == right.dtype
        assert torch.equal(value, right)


def assert_close_to_fp64(operator, operands):
    """As close to the same numbers in fp64 as the rounding of sums of some tens of terms lets it be."""
    wide = torch.float64 in {leaf.dtype for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)}
    dtype = torch.float64 if wide else torch.float32
    expected = operator(changed(changed(operands, Tensor.contiguous), to(torch.float64)))
    for value, right in zip(operator(operands), expected, strict=True):
        assert value.is_contiguous()
        assert (value.dtype, value.shape) == (dtype, right.shape)
        if value.numel():
            assert (value - right).abs().max() <= 32 * torch.finfo(dtype).eps * right.abs().max()


@every_operator
def test_equals_its_reference_twin_and_keeps_the_contract_of_an_operator(operator, make):
    operands = make(operator)
    for value, right in zip(operator(operands), operator(operands, reference), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
    function = "pool_statistics" if "return_ratios" in operator.options else operator.function
    assert opcheck(operator, operands) == {function}


@every_operator
def test_every_dtype(operator, make):
    for dtype in DTYPES:
        operands = make(operator, 8, 33, 7, dtype=dtype)
        assert_close_to_fp64(operator, operands)
        opcheck(operator, operands, "test_schema", "test_faketensor")


@every_operator
def test_one_operand_in_fp64_is_traced_as_it_is_computed(operator, make):
    operands = make(operator)
    for one in tree_leaves(operands):
        if isinstance(one, Tensor) and one.is_floating_point():
            mixed = changed(operands, lambda tensor, one=one: tensor.double() if tensor is one else tensor)
            opcheck(operator, mixed, "test_faketensor")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_layout(function, relayout, make):
    def moved(tensor):
        return relayout(tensor) if tensor.ndim > 1 else torch.stack([tensor, tensor], 1)[:, 0]

    for operator in (one for one in OPERATORS if one.function == function):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            operands = changed(make(operator, 12, dtype=dtype), moved)
            assert_close_to_fp64(operator, operands)
        opcheck(operator, operands, "test_schema", "test_faketensor")


@every_operator
def test_shape_only_twin_and_empty_batches(operator, make):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for samples in (0, 1, 4):
            operands = make(operator, samples, dtype=dtype)
            outputs = operator(operands)
            shapes = operator(changed(operands, lambda tensor: tensor.to("meta")))
            whole = operator(make(operator, 3))
            for value, shape, other in zip(outputs, shapes, whole, strict=True):
                assert (value.shape, value.dtype, value.stride()) == (shape.shape, shape.dtype, shape.stride())
                assert value.shape == (samples, *other.shape[1:])


@every_operator
def test_outputs_share_no_memory(operator, make, assert_owned):
    for dtype, side in product(DTYPES, (1, 2)):
        operands = make(operator, side=side, dtype=dtype)
        inputs = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)]
        for module in (ok, reference):
            assert_owned(inputs, lambda operands=operands, module=module: operator(operands, module))


@pytest.mark.pairwise(operator=OPERATORS, bad=(torch.nan, torch.inf, -torch.inf), dtype=DTYPES)
def test_a_bad_sample_is_bad_in_its_row_alone(operator, bad, dtype, make):
    operands = make(operator, dtype=dtype)
    channel = 2
    for part in tree_leaves(operands):
        if isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim == 1:
            channel = int(part.logical_not().nonzero()[0])  # a pruned neuron shows it too
    for memory_format in (torch.contiguous_format, torch.channels_last)[: 2 if operands[0].ndim == 4 else 1]:
        clean = (operands[0].contiguous(memory_format=memory_format), *operands[1:])
        for which in range(operator.samplewise):
            dirty = [part.clone() if index == which else part for index, part in enumerate(clean)]
            dirty[which][(3, channel, 1, 2)[: dirty[which].ndim]] = bad
            for name, value, right in zip(operator.outputs, operator(dirty), operator(clean), strict=True):
                assert torch.equal(value[[0, 1, 2, 4]], right[[0, 1, 2, 4]]), name
                if name in ("h", "ratios"):
                    assert value[3].isfinite().logical_not().nonzero().flatten().tolist() == [channel]
                elif name not in PER_CHANNEL:
                    assert not value[3].isfinite().any(), name
                    assert value[3].isnan().all() or operator.function == "project_gradients"


@every_operator
def test_autocast_and_gradient_modes_change_nothing_and_nothing_requires_grad(operator, make):
    for dtype in (torch.float32, torch.bfloat16):
        operands = make(operator, 8, 64, 10, dtype=dtype)
        expected = operator(operands)
        with torch.inference_mode():
            inference = changed(operands, Tensor.clone)
        assert_equal(operator(inference), expected)
        changed(operands, lambda tensor: tensor.requires_grad_(tensor.is_floating_point()))
        modes = (torch.enable_grad, torch.no_grad, torch.inference_mode, nullcontext)
        for mode in (*modes, lambda: torch.autocast("cpu", dtype=torch.bfloat16)):
            with mode():
                outputs = operator(operands)
            assert_equal(outputs, expected)
            assert not any(value.requires_grad for value in outputs)


@every_operator
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.differing_executors])
@given(samples=st.integers(2, 70), seed=st.integers(0, 999))
def test_a_sample_alone_is_as_in_a_batch(operator, make, samples, seed):
    operands = make(operator, samples, 128, 50, 7, anchors=20, components=6, seed=seed)
    index = seed % samples
    count = operator.samplewise
    rows = (*(value[index : index + 1] for value in operands[:count]), *operands[count:])
    for name, alone, batch in zip(operator.outputs, operator(rows), operator(operands), strict=True):
        if name in ("nap", "lse", "pruned_lse"):
            assert torch.allclose(alone[0], batch[index], rtol=1e-6, atol=0), name
        elif name in PER_CHANNEL:
            assert torch.allclose(alone[0], batch[index], rtol=1e-6, atol=1e-7), name
        elif batch.numel():
            assert (alone[0] - batch[index]).abs().max() <= 1e-5 * batch.abs().max(), name


@pytest.mark.parametrize("operator", [one for one in OPERATORS if one.function != "masked_energy"], ids=str)
def test_nothing_of_samples_by_classes_by_features_is_built(operator, make, largest_tensor, monkeypatch):
    monkeypatch.setattr(explicit_form, "_WORKSPACE_ELEMENTS", 1)
    operands = make(operator, 40, 30, 20, 2)
    elements = largest_tensor(lambda: operator(operands, reference))
    inputs = max(leaf.numel() for leaf in tree_leaves(operands) if isinstance(leaf, Tensor))
    assert 0 < elements <= max(inputs, 40 * 31)
    assert elements < 40 * 30 * 20 / 4


@pytest.mark.parametrize("operator", [one for one in OPERATORS if one.form in ("", "explicit")], ids=str)
def test_working_in_blocks_changes_nothing(operator, make, monkeypatch):
    # With more and with fewer classes than components.
    for classes, workspace in product((6, 3), (1, 18, 90, 131)):
        operands = make(operator, 7, 12, classes, dtype=torch.float64)
        whole = operator(operands, reference)
        with monkeypatch.context() as patch:
            patch.setattr(explicit_form, "_WORKSPACE_ELEMENTS", workspace)
            patch.setattr(reference, "_WORKSPACE_ELEMENTS", workspace)
            patch.setattr(reference, "_MASKED_ELEMENTS", workspace)
            blocks = operator(operands, reference)
        for value, right in zip(blocks, whole, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)


@pytest.mark.pairwise(
    form=("dual", "shifted", "explicit", "factored"), kind=reference.COTANGENTS, dtype=DTYPES, rectify=(False, True)
)
def test_a_score_is_the_composition_of_its_parts(make_problem, form, kind, dtype, rectify):
    feature_map, head, basis = make_problem(form=form, dtype=dtype, cotangent=kind)
    out = ok.score(feature_map, head, basis, 0.5, rectify=rectify)
    h, nap = ok.pool_nap(feature_map, 0.5, rectify=rectify)
    lse, pruned_lse, p = ok.masked_energy(h, head.weight, head.bias, head.weight_mask, head.neuron_mask)
    expected = ok.ScoreOutputs(h, nap, lse, pruned_lse, p, ok.project_gradients(p, h, basis))
    assert out._fields == ("h", "nap", "lse", "pruned_lse", "p", "g_low")
    for value, right in zip(out, expected, strict=True):
        assert torch.equal(value, right)


def test_a_score_without_a_basis_has_no_coordinates(make_problem):
    feature_map, head, _ = make_problem()
    assert ok.score(feature_map, head).g_low.shape == (5, 0)
    assert reference.score(feature_map, head).g_low.shape == (5, 0)
