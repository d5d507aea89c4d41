from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from ood_kernels import reference

OPERATORS = ("pool_nap", "pool_statistics", "masked_energy", "project_gradients", "score")
KINDS = reference.COTANGENTS
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
needs_compiler = pytest.mark.skipif(not (COMPILER and HEADERS), reason="inductor needs a C++ compiler and Python.h")
# torch's own, at the first import of inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


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
