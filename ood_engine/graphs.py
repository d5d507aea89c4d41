"""CUDA graphs of scoring from the feature map on, for small batches dominated by kernel launch overhead."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from .scores import Scores

__all__ = ["LARGEST_BUCKET", "Inputs", "ScoringGraphs"]

LARGEST_BUCKET = 64
"""Larger batches saturate the GPU without a graph."""


class Inputs(NamedTuple):
    """Activations of one batch.

    Attributes:
        feature_map: [N, D, H, W].
        head_input: [N, D].
        valid: bool [N], finite images.
        logits: [N, C] output of the model, to compare with.
        rounding: see `model.tap.Captured`.
    """

    feature_map: Tensor | None
    head_input: Tensor | None
    valid: Tensor
    logits: Tensor | None = None
    rounding: torch.dtype | None = None

    def rows(self, here: slice) -> Inputs:
        """Some rows."""
        feature_map, head_input, logits = (
            None if tensor is None else tensor[here] for tensor in (self.feature_map, self.head_input, self.logits)
        )
        return Inputs(feature_map, head_input, self.valid[here], logits, self.rounding)


Score = Callable[[Inputs], Scores]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class _Graph(NamedTuple):
    inputs: Inputs
    replay: Callable[[], None]
    outputs: Tensor
    names: tuple[str, ...]
    counted: tuple[str, ...]


class ScoringGraphs:
    """One captured graph with static inputs per batch bucket (the next power of two) and kind of input.

    A batch is copied into the static inputs, the rest of the bucket is filled with NaN, and outputs are cloned, so that returned
    scores never change. A lock guards the shared buffers while work is queued, and an event until the device has done it, since
    threads may use several streams.

    Args:
        score: inputs → scores, without device synchronisation.
        capture: records a nullary function; returns its replay and the tensor that the replay fills.
        stream: device → its current stream.
    """

    def __init__(
        self,
        score: Score,
        capture: Capture | None = None,
        stream: Callable[[torch.device], torch.cuda.Stream] | None = None,
    ) -> None:
        self._score = score
        self._capture = capture or capture_cuda_graph
        self._stream = stream or torch.cuda.current_stream
        self._done: torch.cuda.Event | None = None
        self._lock = Lock()
        self._graphs: dict[Hashable, _Graph] = {}
        self._fitted: Hashable = None

    def __call__(self, inputs: Inputs, fitted: Hashable) -> Scores:
        """Scores of a batch of up to `LARGEST_BUCKET`; a new `fitted` key invalidates all graphs."""
        samples = len(inputs.valid)
        bucket = 1 << (samples - 1).bit_length()
        key = (bucket, *(_kind(tensor) for tensor in inputs))
        with self._lock:
            stream = self._stream(inputs.valid.device)
            if self._done is not None:
                stream.wait_event(self._done)
            if fitted != self._fitted:
                self._graphs, self._fitted = {}, fitted
            if key not in self._graphs:
                self._graphs[key] = self._record(inputs, bucket)
            graph = self._graphs[key]
            for static, given in zip(graph.inputs, inputs, strict=True):
                if isinstance(static, Tensor) and isinstance(given, Tensor):
                    static[:samples].copy_(given)
                    static[samples:].fill_(False if static.dtype == torch.bool else torch.nan)
            graph.replay()
            outputs = graph.outputs.clone()
            self._done = stream.record_event()
        scores = dict(zip(graph.names, outputs[: len(graph.names), :samples].float(), strict=True))
        *clamped, mismatched = outputs[len(graph.names) :, 0].long()
        return Scores(scores, dict(zip(graph.counted, clamped, strict=True)), mismatched)

    def _record(self, inputs: Inputs, bucket: int) -> _Graph:
        feature_map, head_input, valid, logits = (_static(tensor, bucket) for tensor in inputs[:4])
        assert valid is not None
        static = Inputs(feature_map, head_input, valid, logits, inputs.rounding)
        names: list[tuple[str, ...]] = []

        def run() -> Tensor:
            scores = self._score(static)
            names[:] = [tuple(scores), tuple(scores.clamped)]
            counts = [count.expand(bucket) for count in (*scores.clamped.values(), scores.mismatched_rows)]
            # fp64 represents scores and counts exactly.
            return torch.stack([row.double() for row in (*scores.values(), *counts)])

        replay, outputs = self._capture(run)
        return _Graph(static, replay, outputs, *names)


def capture_cuda_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a function on the current CUDA device after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device during capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


def _kind(tensor: Tensor | torch.dtype | None) -> Hashable:
    """Graph key of an input: of a tensor, everything except its batch size and address."""
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.shape[1:], tensor.dtype, tensor.device, tensor.stride()[1:]


def _static(tensor: Tensor | None, bucket: int) -> Tensor | None:
    """A buffer of `bucket` rows in the tensor's shape, dtype and memory format."""
    if tensor is None:
        return None
    buffer = torch.zeros((bucket, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not tensor.is_contiguous():
        buffer = buffer.to(memory_format=torch.channels_last)
    return buffer
