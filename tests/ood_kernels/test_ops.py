from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

import ood_kernels as ok
from ood_kernels import reference

OPERATORS = ("pool_nap", "pool_statistics", "masked_energy", "project_gradients", "score")
KINDS = reference.COTANGENTS
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
needs_compiler = pytest.mark.skipif(not (COMPILER and HEADERS), reason="inductor needs a C++ compiler and Python.h")
# torch's own, at the first import of inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


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


@pytest.fixture
def make_scorer(make_problem):
    def make(kind, form):
        feature_map, head, basis = make_problem(4, 6, 5, form=form, cotangent=kind)
        return Scorer(head, basis), feature_map

    return make


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
def test_compiles_without_a_graph_break(make_scorer, kind):
    scorer, feature_map = make_scorer(kind, "explicit" if kind == "uniform" else "dual")
    compiled = torch.compile(scorer, fullgraph=True, backend="aot_eager")
    assert_same(compiled(feature_map), scorer(feature_map))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_a_dynamic_batch(make_scorer):
    scorer, feature_map = make_scorer("predicted", "factored")
    compiled = torch.compile(scorer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (feature_map, feature_map[:3]):
        assert_same(compiled(batch), scorer(batch))


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_compiles_without_a_graph_break(make_scorer):
    scorer, feature_map = make_scorer("uniform", "explicit")
    # That cache forgets which instruction set its code was written for: compiled for another, it computes wrong numbers.
    options = {"fx_graph_cache": False}
    compiled = torch.compile(scorer, fullgraph=True, dynamic=True, options=options)
    for value, right in zip(compiled(feature_map), scorer(feature_map), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_a_dynamic_batch(make_scorer, kind):
    scorer, feature_map = make_scorer(kind, {"uniform": "explicit", "sum_logits": "factored"}.get(kind, "dual"))
    exported = torch.export.export(scorer, (feature_map,), dynamic_shapes=({0: torch.export.Dim("N")},))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    for name in OPERATORS:
        assert f"ood_kernels.{name}.default" in called
    exported_scorer = exported.module()
    for samples in (0, 1, 11):
        batch = torch.rand(samples, *feature_map.shape[1:], generator=torch.Generator().manual_seed(0))
        assert_same(exported_scorer(batch), scorer(batch))
