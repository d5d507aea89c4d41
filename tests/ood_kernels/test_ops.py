from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import ood_kernels as ok
from ood_kernels import ops, reference
from ood_kernels.bases import BASES

OPERATORS = (
    "pool_nap",
    "pool_statistics",
    "masked_energy",
    "project_gradients",
    "score",
)
KINDS = reference.COTANGENTS
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
needs_compiler = pytest.mark.skipif(not (COMPILER and HEADERS), reason="inductor needs a C++ compiler and Python.h")
# torch's own, at the first import of inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(name, samples=4):
    """Arguments of every operator for a map of [N, 6, 3, 2], C = 5, n = 7 and K = 3, options by turns."""
    feature_map, h, p = normal(samples, 6, 3, 2), normal(samples, 6), normal(samples, 5).softmax(1)
    weight, bias, masks = normal(5, 6, seed=1), normal(5), (normal(5, 6) > 0, normal(6) > 0)
    anchors = (normal(7, 5, seed=2), normal(7, 6, seed=3), normal(7, 3, seed=4), normal(3))
    factors = (normal(5, 2, seed=7), normal(7, 4, seed=8), normal(3, 2, 4, seed=9), normal(3))
    shifted = [*anchors, normal(6, seed=5), normal(5, 3, seed=6)]
    return {
        "pool_nap": [(feature_map, 2.0, False), (feature_map, 1.0, True)],
        "pool_statistics": [(feature_map, False), (feature_map, True)],
        "masked_energy": [
            (h, weight, bias, *masks),
            (h, weight, None, None, None),
            (h, weight, bias, masks[0], None),
            (h, weight, None, None, masks[1]),
        ],
        "project_gradients": [
            (p, h, [*anchors, None, None], "dual", "energy", True),
            (p, h, [*anchors, None, None], "dual", "predicted", False),
            (p, h, shifted, "dual", "uniform", True),
            (p, h, [normal(3, 5, 7), normal(3)], "explicit", "energy", True),
            (p, h, [normal(3, 5, 6), normal(3)], "explicit", "max_logit", False),
            (p, h, list(factors), "factored", "energy", True),
            (p, h, [factors[0], normal(6, 4), *factors[2:]], "factored", "sum_logits", False),
        ],
        "score": [
            (feature_map, 2.0, False, weight, bias, *masks, shifted, "dual", "predicted", True),
            (feature_map, 1.0, True, weight, None, None, None, [*anchors, None, None], "dual", "energy", False),
            (
                feature_map,
                1.0,
                False,
                weight,
                bias,
                None,
                masks[1],
                [normal(3, 5, 7), normal(3)],
                "explicit",
                "uniform",
                True,
            ),
            (feature_map, 1.0, False, weight, bias, masks[0], None, list(factors), "factored", "max_logit", True),
            (feature_map, 1.0, False, weight, bias, *masks, [], "", "energy", True),
        ],
    }[name]


def convert(arguments, change):
    """The arguments with every tensor changed, those in lists as well."""
    nested = (convert(value, change) if isinstance(value, list) else value for value in arguments)
    return type(arguments)(change(value) if isinstance(value, torch.Tensor) else value for value in nested)


def to_dtype(dtype):
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    for arguments in arguments_of(name):
        torch.library.opcheck(getattr(ops, name), arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_in_any_layout(name, relayout):
    arguments = convert(arguments_of(name)[0], lambda tensor: relayout(tensor) if tensor.ndim > 1 else tensor)
    torch.library.opcheck(getattr(ops, name), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_opcheck_in_every_dtype(name, dtype):
    arguments = convert(arguments_of(name)[0], to_dtype(dtype))
    torch.library.opcheck(getattr(ops, name), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("samples", [0, 1, 4])
def test_shape_only_twin_agrees_with_the_implementation(name, samples):
    for arguments in arguments_of(name, samples):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            real = convert(arguments, to_dtype(dtype))
            outputs = getattr(ops, name)(*real)
            shapes = getattr(ops, name)(*convert(real, lambda tensor: tensor.to("meta")))
            pairs = [(outputs, shapes)] if isinstance(outputs, torch.Tensor) else zip(outputs, shapes, strict=True)
            for value, shape in pairs:
                assert (value.shape, value.dtype, value.stride()) == (shape.shape, shape.dtype, shape.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_mixed_dtypes_agree_with_the_shape_only_twin(name):
    for arguments in arguments_of(name):
        for one in tree_leaves(arguments):
            if isinstance(one, torch.Tensor) and one.is_floating_point():
                mixed = convert(arguments, lambda tensor, one=one: tensor.double() if tensor is one else tensor)
                torch.library.opcheck(getattr(ops, name), mixed, test_utils=("test_faketensor",))


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_bound_to_its_public_name(name):
    assert getattr(ops, name) is getattr(torch.ops.ood_kernels, name).default
    for arguments in arguments_of(name):
        outputs = getattr(ops, name)(*arguments)
        expected = by_reference(name, arguments)
        pairs = [(outputs, expected)] if isinstance(outputs, torch.Tensor) else zip(outputs, expected, strict=True)
        for value, right in pairs:
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6, equal_nan=True)


def by_reference(name, arguments):
    """What the reference says to the arguments of an operator."""
    if name.startswith("pool"):
        return getattr(reference, name)(*arguments[:-1], rectify=arguments[-1])
    if name == "masked_energy":
        return reference.masked_energy(*arguments)
    *others, parts, kind, cotangent, bias = arguments
    basis = BASES[kind].from_parts(parts, cotangent, bias) if kind else None
    if name == "project_gradients":
        return reference.project_gradients(*others, basis)
    feature_map, eps, rectify, *head = others
    return reference.score(feature_map, ok.Head(*head), basis, eps, rectify=rectify)


class Scorer(torch.nn.Module):
    """Every public function in one forward, the parameters held as a module holds them."""

    def __init__(self, head: ok.Head, basis: ok.BasisTensors):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(head.weight), torch.nn.Parameter(head.bias)
        self.register_buffer("weight_mask", head.weight_mask)
        self.register_buffer("neuron_mask", head.neuron_mask)
        self.form, self.options = type(basis), [value for value in basis if not isinstance(value, torch.Tensor)]
        self.names = [name for name in basis._fields if isinstance(getattr(basis, name), torch.Tensor)]
        for name in self.names:
            self.register_buffer(name, getattr(basis, name))

    def tensors(self):
        return self.form(*[getattr(self, name) for name in self.names], *self.options)

    def forward(self, feature_map):
        head = ok.Head(self.weight, self.bias, self.weight_mask, self.neuron_mask)
        ratios = ok.pool_nap(feature_map, rectify=True, return_ratios=True)
        energies = ok.masked_energy(ratios[0], *head)
        g_low = ok.project_gradients(energies[2], ratios[0], self)
        statistics = ok.pool_statistics(feature_map)
        return (*ok.score(feature_map, head, self), *ok.pool_nap(feature_map), *ratios, *energies, g_low, *statistics)


def make_scorer(make_problem, kind, explicit):
    feature_map, head, basis = make_problem(4, 6, 5, cotangent=kind)
    if explicit:
        basis = ok.ExplicitTensors(normal(3, 5, 7), normal(3), kind)
    return Scorer(head, basis), feature_map


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same(outputs, expected):
    for value, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0)
        assert not value.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(make_problem, kind):
    scorer, feature_map = make_scorer(make_problem, kind, explicit=kind == "uniform")
    compiled = torch.compile(scorer, fullgraph=True, backend="aot_eager")
    assert_same(compiled(feature_map), scorer(feature_map))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_a_dynamic_batch(make_problem):
    scorer, feature_map = make_scorer(make_problem, "predicted", explicit=False)
    compiled = torch.compile(scorer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (feature_map, feature_map[:3]):
        assert_same(compiled(batch), scorer(batch))


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_compiles_without_a_graph_break(make_problem):
    scorer, feature_map = make_scorer(make_problem, "uniform", explicit=True)
    # That cache forgets which instruction set its code was written for: compiled for another, it computes wrong numbers.
    options = {"fx_graph_cache": False}
    compiled = torch.compile(scorer, fullgraph=True, dynamic=True, options=options)
    for value, right in zip(compiled(feature_map), scorer(feature_map), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("explicit", [False, True])
def test_exports_with_a_dynamic_batch(make_problem, kind, explicit):
    scorer, feature_map = make_scorer(make_problem, kind, explicit)
    exported = torch.export.export(scorer, (feature_map,), dynamic_shapes=({0: torch.export.Dim("N")},))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    for name in OPERATORS:
        assert f"ood_kernels.{name}.default" in called
    exported_scorer = exported.module()
    for samples in (0, 1, 11):
        batch = normal(samples, *feature_map.shape[1:]).abs()
        assert_same(exported_scorer(batch), scorer(batch))
