"""The kernels as the public functions reach them: compiled models, graphs, streams, devices."""

from __future__ import annotations

import pytest
import torch

import ood_kernels as ok
from ood_kernels.triton_kernels.launch import record

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: there are no CUDA graphs or streams")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
pytestmark = [
    # torch's own, at the first import of its compiler.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # NumPy's, which interprets: rows beyond the batch hold -Inf - -Inf and are never stored.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def triton_wished_for(monkeypatch):
    monkeypatch.setenv("OOD_ENGINE_BACKEND", "triton")


@pytest.fixture
def scorer(make_scorer, device):
    return make_scorer("predicted", "dual")[0].to(device)


@pytest.fixture
def feature_map(make_scorer, device):
    return make_scorer("predicted", "dual")[1].to(device)


def assert_same(outputs, expected):
    for value, right in zip(outputs, expected, strict=True):
        assert torch.equal(value, right)


def test_the_public_functions_reach_the_kernels(scorer, feature_map, monkeypatch):
    with record() as launches:
        outputs = scorer(feature_map)
    assert launches
    monkeypatch.setenv("OOD_ENGINE_BACKEND", "reference")
    with record() as launches:
        expected = scorer(feature_map)
    assert not launches
    for value, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)


def test_an_argument_overrides_the_environment(scorer, feature_map):
    with record() as launches:
        ok.score(feature_map, scorer.head, scorer, backend="reference")
        ok.pool_nap(feature_map, backend="reference")
    assert not launches


def test_fp64_in_any_argument_is_for_the_reference(scorer, feature_map):
    h, (weight, bias, *_) = feature_map.mean((2, 3)), scorer.head
    for arguments in ((h.double(), weight, bias), (h, weight.double(), bias)):
        with record() as launches:
            lse, _, _ = ok.masked_energy(*arguments)
        assert not launches
        assert lse.dtype == torch.float64


def test_tokens_need_no_copy(device):
    tokens = torch.rand(2, 9, 16, generator=torch.Generator().manual_seed(2)).to(device)
    with record() as launches:
        h, _ = ok.pool_nap(tokens)
    pointers = {value.data_ptr() for one in launches for value in one.arguments.values() if torch.is_tensor(value)}
    assert tokens.data_ptr() in pointers
    torch.testing.assert_close(h, tokens.mean(1))


def test_opcheck(scorer, feature_map):
    head, basis = scorer.head, scorer.tensors()
    checks = ("test_schema", "test_faketensor")
    h, p = feature_map.mean((2, 3)), torch.rand(len(feature_map), 5, device=feature_map.device)
    taken = (basis.parts(), basis.kind, "energy", True)
    ops = torch.ops.ood_kernels
    torch.library.opcheck(ops.pool_nap.default, (feature_map, 1.0, False), test_utils=checks)
    torch.library.opcheck(ops.pool_nap.default, (feature_map.permute(0, 1, 3, 2), 1.0, True), test_utils=checks)
    torch.library.opcheck(ops.masked_energy.default, (h, *head), test_utils=checks)
    torch.library.opcheck(ops.project_gradients.default, (p, h, *taken), test_utils=checks)
    torch.library.opcheck(ops.score.default, (feature_map, 1.0, False, *head, *taken), test_utils=checks)


def test_compiles_without_a_graph_break_and_exports_with_a_dynamic_batch(scorer, feature_map):
    torch.compiler.reset()
    compiled = torch.compile(scorer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(scorer, (feature_map,), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    for batch in (feature_map, feature_map[:2]):
        assert_same(compiled(batch), scorer(batch))
        assert_same(exported(batch), scorer(batch))
    torch.compiler.reset()


def test_inference_mode_and_gradient_mode_change_nothing(scorer, feature_map):
    expected = scorer(feature_map)
    with torch.inference_mode():
        assert_same(scorer(feature_map.clone()), expected)
    outputs = scorer(feature_map.clone().requires_grad_())
    assert_same(outputs, expected)
    assert not any(value.requires_grad for value in outputs)


@needs_gpu
def test_is_captured_in_a_cuda_graph(scorer, feature_map):
    expected = scorer(feature_map)
    static = torch.zeros_like(feature_map)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        scorer(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = scorer(static)
    for _ in range(3):
        static.copy_(feature_map)
        graph.replay()
        assert_same(outputs, expected)


@needs_gpu
def test_runs_on_the_current_stream(scorer, feature_map):
    expected = scorer(feature_map)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(feature_map)
        torch.cuda._sleep(50_000_000)
        late.copy_(feature_map)
        outputs = scorer(late)
    stream.synchronize()
    assert_same(outputs, expected)


@needs_two_gpus
def test_runs_on_a_device_that_is_not_the_current_one(make_scorer):
    scorer, feature_map = make_scorer("predicted", "dual")
    reference = scorer(feature_map)
    with torch.cuda.device(0):
        outputs = scorer.to("cuda:1")(feature_map.to("cuda:1"))
    for value, right in zip(outputs, reference, strict=True):
        assert value.device == torch.device("cuda:1")
        torch.testing.assert_close(value.cpu(), right, rtol=1e-4, atol=1e-4)
