from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ood_engine as oe
from ood_engine.demo import SmallCNN
from ood_engine.detectors.heads import Mahalanobis
from ood_engine.graphs import LARGEST_BUCKET, Inputs, ScoringGraphs
from ood_engine.runtime import Kernels
from ood_engine.scores import Scores

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "unique", "equal.")


class _NoHostRoundTrip(TorchDispatchMode):
    """Refuses what would wait for the device, and so could not be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in WAITS), f"{name} waits for the device"
        is_index = name.startswith("aten.index") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        assert not is_index, "indexing by a mask waits for the device"
        return func(*args, **(kwargs or {}))


class FakeGraph:
    """Stands in for a CUDA graph: replaying runs the function again on the static inputs, into the same output memory."""

    def __init__(self):
        self.captured, self.replayed = 0, 0

    def __call__(self, function):
        self.captured += 1
        outputs = function()

        def replay():
            self.replayed += 1
            outputs.copy_(function())

        return replay, outputs


class FakeStream:
    """A stream that writes down what it is told, into a list that several share."""

    def __init__(self, told=None):
        self.told = [] if told is None else told

    def wait_event(self, event):
        self.told.append((self, "wait", event))

    def record_event(self):
        self.told.append((self, "record", object()))
        return self.told[-1][2]


def graphs_of(function, capture):
    return ScoringGraphs(function, capture, lambda device: FakeStream())


def score(inputs):
    feature_map, features, valid, *_ = inputs
    total = feature_map.sum((1, 2, 3)) if feature_map is not None else features.sum(1)
    scores = Scores({"total": torch.where(valid, total, torch.nan), "twice": 2 * total})
    scores.clamped = {"twice": (total <= 0).sum()}
    return scores


def batch(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Inputs(torch.randn(samples, 3, 2, 2, generator=generator), None, torch.ones(samples) > 0)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 33, LARGEST_BUCKET])
def test_replay_scores_as_the_function_does(samples):
    graph = FakeGraph()
    graphs = graphs_of(score, graph)
    for seed in range(3):
        inputs = batch(samples, seed)
        inputs[2][0] = seed != 1
        ours, right = graphs(inputs, "fitted"), score(inputs)
        for name in right:
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name].nan_to_num(nan=7.5), right[name].nan_to_num(nan=7.5))
        assert int(ours.bad_rows) == (seed == 1)
        assert ours.clamped == {"twice": right.clamped["twice"]}
    assert (graph.captured, graph.replayed) == (1, 3)


def test_a_smaller_batch_of_the_same_bucket_sees_nothing_of_the_one_before():
    graphs = graphs_of(score, FakeGraph())
    graphs(batch(8, seed=1), "fitted")
    ours = graphs(batch(5, seed=2), "fitted")
    assert len(ours["total"]) == 5
    assert int(ours.clamped["twice"]) == int(score(batch(5, seed=2)).clamped["twice"])
    assert int(ours.bad_rows) == 0


def test_one_graph_a_bucket_and_kind_of_input():
    graph = FakeGraph()
    graphs = graphs_of(score, graph)
    features = Inputs(None, torch.randn(4, 3), torch.ones(4) > 0)
    channels_last = Inputs(batch(4)[0].to(memory_format=torch.channels_last), None, torch.ones(4) > 0)
    for inputs in (batch(3), batch(4), batch(5), batch(4), features, channels_last):
        graphs(inputs, "fitted")
    assert graph.captured == 4  # buckets 4 and 8, features, channels_last
    graphs(batch(4), "fitted anew")
    assert graph.captured == 5


def test_outputs_do_not_change_with_the_next_batch():
    graphs = graphs_of(score, FakeGraph())
    first = graphs(batch(4, seed=1), "fitted")
    kept = {name: value.clone() for name, value in first.items()}
    graphs(batch(4, seed=2), "fitted")
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_another_thread_may_replay_once_the_lock_is_free():
    outputs = []

    def capture(function):
        outputs.append(function())
        return lambda: outputs[0].copy_(function()), outputs[0]

    class Lock(nullcontext):
        """At its release another thread writes into the buffers."""

        def __exit__(self, *error):
            outputs[0].fill_(torch.nan)

    graphs = graphs_of(score, capture)
    graphs._lock = Lock()
    assert torch.equal(graphs(batch(4), "fitted")["total"], score(batch(4))["total"])


def test_threads_share_the_buffers_one_at_a_time():
    graphs = graphs_of(score, FakeGraph())
    inputs = [batch(samples, seed) for seed, samples in enumerate((1, 2, 3, 4, 5, 6, 7, 8) * 8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda one: graphs(one, "fitted"), inputs))
    assert all(torch.equal(ours["total"], score(one)["total"]) for ours, one in zip(results, inputs, strict=True))


def test_a_stream_waits_for_the_one_before_to_finish_with_the_buffers():
    told = []
    streams = [FakeStream(told), FakeStream(told)]
    turn = iter(streams)

    def capture(function):
        outputs = function()
        return lambda: told.append("replay"), outputs

    graphs = ScoringGraphs(score, capture, lambda device: next(turn))
    for seed in range(2):
        graphs(batch(4, seed), "fitted")
    (first, did, event), *rest = told[1:]
    assert told[0] == "replay"
    assert (first, did) == (streams[0], "record")
    assert rest[:2] == [(streams[1], "wait", event), "replay"]
    assert rest[2][:2] == (streams[1], "record")


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = SmallCNN(classes=4).eval()
    names = list(oe.available_detectors())
    engine = oe.Engine(model, names)
    images = torch.rand(160, 1, 8, 8)
    labels = torch.arange(160) % 4
    with pytest.warns(oe.OodEngineWarning, match="overruled by force: the model predicts"):  # it is untrained
        return engine.fit([(images, labels)], force=True), torch.rand(6, 1, 8, 8)


def test_scoring_never_waits_for_the_device(fitted):
    engine, images = fitted
    captured = engine.scorer.run(images)
    inputs = Inputs(captured.feature_map, captured.head_input, torch.ones(6) > 0, captured.logits)
    with torch.no_grad(), _NoHostRoundTrip():
        engine.scorer._score_eagerly(inputs)


def test_an_engine_replays_what_it_computes(fitted):
    engine, images = fitted
    graph = FakeGraph()
    graphs = graphs_of(engine.scorer._score_eagerly, graph)
    captured = engine.scorer.run(images)
    inputs = Inputs(captured.feature_map, captured.head_input, torch.ones(6) > 0, captured.logits)
    # What is replayed is a bucket of 8: the batch, and rows of NaN.
    feature_map, head_input, logits = (
        torch.cat([part, torch.full_like(part[:2], torch.nan)])
        for part in (inputs.feature_map, inputs.head_input, inputs.logits)
    )
    with torch.no_grad():
        ours = graphs(inputs, "fitted")
        right = engine.scorer._score_eagerly(Inputs(feature_map, head_input, torch.arange(8) < 6, logits))
        wrong = graphs(inputs._replace(logits=1 - inputs.logits), "fitted")
    assert graph.replayed == 2
    assert [int(one.mismatched_rows) for one in (ours, right, wrong)] == [0, 0, 6]
    assert set(ours) == set(right)
    assert all(torch.equal(ours[name], value[:6]) for name, value in right.items())
    # With 2 threads, BLAS may split 6 rows differently from 8. fp32 rounds these coordinates, at most 0.017, by up to 3.3e-7, and
    # the whitening of this untrained model amplifies that by up to 6486: Mahalanobis scores were measured 2.5e-4 from fp64,
    # relative, where the bound is 9.4e-4.
    for name, value in engine.score(images).items():
        is_whitened = isinstance(getattr(engine.detectors[name], "low", None), Mahalanobis)
        torch.testing.assert_close(ours[name], value, rtol=1e-3 if is_whitened else 1e-5, atol=1e-5)


def test_a_graph_is_captured_anew_for_another_bias_mask_or_agreement(fitted):
    engine, _ = fitted
    scorer, keys = engine.scorer, []
    keys.append(scorer._graph_key())
    assert keys[0] == scorer._graph_key()
    for tensor in (scorer.head.bias, scorer.head.weight, *engine.detectors["opnp"].masks):
        tensor.copy_(tensor.clone())
        keys.append(scorer._graph_key())
    agreement = scorer.agreement
    scorer.agreement = agreement._replace(features=1.0)
    keys.append(scorer._graph_key())
    scorer.agreement = agreement
    assert len(set(keys)) == 6


def test_the_runtime_is_checked_and_can_be_changed(fitted):
    engine, images = fitted
    for wrong, message in (
        ({"precision": "fp8"}, "precision='fp8': expected one of ieee"),
        ({"backend": "cuda"}, "backend='cuda': expected one of reference, triton, or None"),
    ):
        with pytest.raises(oe.OodEngineError, match=message):
            oe.Runtime(**wrong)
    before = engine.score(images)
    engine.runtime = oe.Runtime(precision="bf16", backend="reference", cuda_graph=True)
    try:
        after = engine.score(images)  # on the CPU a graph and a kernel's precision change nothing
    finally:
        engine.runtime = oe.Runtime()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_functions_of_an_engine_can_be_copied():
    kernels = Kernels(oe.Runtime(precision="tf32"))
    for other in (copy.deepcopy(kernels), pickle.loads(pickle.dumps(kernels))):
        assert other.runtime == kernels.runtime
