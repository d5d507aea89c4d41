"""CUDA graphs of the way from a feature map to the scores, for batches so small that starting kernels costs more than they do."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from .scores import Scores

__all__ = ["LARGEST_BUCKET", "ScoringGraphs"]

LARGEST_BUCKET = 64
"""Larger batches keep the GPU busy without a graph."""

Inputs = tuple[Tensor | None, Tensor | None, Tensor]
"""(feature map, what the head received, which images are finite)."""

Score = Callable[[Inputs], Scores]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class _Graph(NamedTuple):
    inputs: Inputs
    replay: Callable[[], None]
    outputs: Tensor
    names: tuple[str, ...]
    counted: tuple[str, ...]


class ScoringGraphs:
    """One captured graph for each batch bucket (the next power of two) and kind of input, with inputs of its own.

    A batch is copied in, the rest of the bucket filled with NaN, and the outputs are cloned, so that nothing handed out changes
    later. One lock serves all threads, for the buffers are shared.

    Args:
        score: from inputs to scores, without waiting for the device.
        capture: records a function without arguments; returns how to run it again, and the tensor it then fills.
    """

    def __init__(self, score: Score, capture: Capture | None = None) -> None:
        self._score = score
        self._capture = capture or capture_cuda_graph
        self._lock = Lock()
        self._graphs: dict[Hashable, _Graph] = {}
        self._fitted: Hashable = None

    def __call__(self, inputs: Inputs, fitted: Hashable) -> Scores:
        """Scores of a batch of up to `LARGEST_BUCKET`; `fitted` changes with whatever the graphs have taken in."""
        samples = len(inputs[2])
        bucket = 1 << (samples - 1).bit_length()
        key = (bucket, *(_kind(tensor) for tensor in inputs))
        with self._lock:
            if fitted != self._fitted:
                self._graphs, self._fitted = {}, fitted
            if key not in self._graphs:
                self._graphs[key] = self._record(inputs, bucket)
            graph = self._graphs[key]
            for static, given in zip(graph.inputs, inputs, strict=True):
                if static is not None and given is not None:
                    static[:samples].copy_(given)
                    static[samples:].fill_(False if static.dtype == torch.bool else torch.nan)
            graph.replay()
            outputs = graph.outputs.clone()
        scores = dict(zip(graph.names, outputs[: len(graph.names), :samples].float(), strict=True))
        clamped = dict(zip(graph.counted, outputs[len(graph.names) :, 0].long(), strict=True))
        return Scores(scores, clamped)

    def _record(self, inputs: Inputs, bucket: int) -> _Graph:
        feature_map, head_input, valid = (_static(tensor, bucket) for tensor in inputs)
        assert valid is not None
        static = (feature_map, head_input, valid)
        names: list[tuple[str, ...]] = []

        def run() -> Tensor:
            scores = self._score(static)
            names[:] = [tuple(scores), tuple(scores.clamped)]
            counts = [count.expand(bucket) for count in scores.clamped.values()]
            # fp64 holds scores and counts exactly.
            return torch.stack([row.double() for row in (*scores.values(), *counts)])

        replay, outputs = self._capture(run)
        return _Graph(static, replay, outputs, *names)


def capture_cuda_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a function on the current CUDA device after warming it up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


def _kind(tensor: Tensor | None) -> Hashable:
    """What a graph is recorded for: everything about a tensor but its first size and its address."""
    if tensor is None:
        return None
    return tensor.shape[1:], tensor.dtype, tensor.device, tensor.stride()[1:]


def _static(tensor: Tensor | None, bucket: int) -> Tensor | None:
    """A buffer for `bucket` rows like those of the tensor, in its memory format."""
    if tensor is None:
        return None
    buffer = torch.zeros((bucket, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not tensor.is_contiguous():
        buffer = buffer.to(memory_format=torch.channels_last)
    return buffer
