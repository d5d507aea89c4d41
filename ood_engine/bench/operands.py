"""What several subjects share: sizes, the operands made from them, and their results in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_kernels as ok
from ood_kernels.workloads import WORKLOADS, BasisKind, Workload

from .cases import Effort

__all__ = [
    "SAMPLES",
    "SYNTHETIC",
    "Operands",
    "as_map",
    "as_vectors",
    "batches",
    "dtypes",
    "pool_truth",
    "precision_of",
    "score_truth",
    "series",
    "sizes_of",
    "tolerance_of",
]

SAMPLES = 64
"""N where nothing else is said."""

SYNTHETIC = "synthetic"
"""Workload of sizes at which the axis of a series takes most of the work; what is not given is ResNet-50's."""

_FIELDS = {"D": "channels", "C": "classes", "H": "height", "W": "width", "n": "anchors", "K": "components"}
_MOST_ON_CPU = {"n": 1000, "K": 256}
_PRECISIONS = {torch.float32: "ieee", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TOLERANCES = {"ieee": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
_TRUTH_ELEMENTS = 2**24


def sizes_of(workload: str, axes: str, samples: int, device: torch.device) -> dict[str, int]:
    """Sizes of a workload along the axes that a subject has, such as "NDC"; on a CPU at most 1000 anchors and 256 components."""
    found = {"N": samples} | {axis: getattr(WORKLOADS[workload], _FIELDS[axis]) for axis in axes if axis != "N"}
    if device.type == "cpu":
        found |= {axis: min(found[axis], most) for axis, most in _MOST_ON_CPU.items() if axis in found}
    return found


def series(base: Mapping[str, int], **values: Sequence[int]) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
    """Every size of the series through `base` once, with the axes of the series that it belongs to."""
    axes_of: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for axis, points in values.items():
        for point in points:
            axes_of.setdefault(tuple({**base, axis: point}.items()), []).append(axis)
    for sizes, axes in axes_of.items():
        yield dict(sizes), tuple(axes)


def batches(effort: Effort) -> tuple[int, ...]:
    """N of a series along the samples; `SAMPLES` is one of them."""
    largest = 256 if effort.device.type == "cpu" else 1024
    return tuple(largest // 4**power for power in range(2 if effort.is_quick else 3, -1, -1))


def dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """In which a device is used most, and the other one that is measured."""
    return (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float32)


def precision_of(dtype: torch.dtype) -> str:
    """Of the kernels' products, for operands stored in this dtype."""
    return _PRECISIONS[dtype]


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest error of results whose products were rounded to this dtype, relative to the largest magnitude."""
    return _TOLERANCES[precision_of(dtype)]


class Operands:
    """Map, head and bases of one size on one device: made when asked for, the same numbers at every run.

    Features are rectified normal numbers, and the positions of a map share a part of each channel; logits have a standard
    deviation of about 3; the coefficients of a dual basis sum to 0, as those of a PCA of centred gradients do.

    Args:
        workload: name in `ood_kernels.workloads`, or another name for the sizes given.
        sizes: N, and those of the workload's sizes that are to be others.
        dtype: in which map, head and basis are stored.
        device: where.
    """

    def __init__(self, workload: str, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
        fields: dict[str, Any] = {_FIELDS[axis]: size for axis, size in sizes.items() if axis != "N"}
        self.size: Workload = WORKLOADS.get(workload, WORKLOADS["R50"])._replace(**fields)
        self.samples, self.dtype, self.device = sizes["N"], dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def _normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype).mul_(scale)

    def _kept(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device) < 0.9

    def feature_map(self, memory_format: str) -> Tensor:
        """[N, D, H, W] in "NCHW" or "channels_last", or "tokens" [N, H·W, D]."""
        size = self.size
        values = self._normal(self.samples, size.height, size.width, size.channels, dtype=self.dtype)
        values.add_(self._normal(self.samples, 1, 1, size.channels, dtype=self.dtype)).relu_()
        if memory_format == "tokens":
            return values.flatten(1, 2)
        channels_last = values.permute(0, 3, 1, 2)
        return channels_last.contiguous() if memory_format == "NCHW" else channels_last

    @cached_property
    def head(self) -> ok.Head:
        """With a tenth of its weights and of its neurons pruned, the masks as bools."""
        classes, channels = self.size.classes, self.size.channels
        weight = self._normal(classes, channels, scale=3 / channels**0.5).to(self.dtype)
        bias = self._normal(classes).to(self.dtype)
        return ok.Head(weight, bias, self._kept(classes, channels), self._kept(channels))

    @property
    def engine_head(self) -> ok.Head:
        """The head as the engine keeps it: masks as bits for a GPU; plain torch would unpack them in every call."""
        mask = self.head.weight_mask
        if self.device.type == "cpu" or mask is None:
            return self.head
        return self.head._replace(weight_mask=ok.pack_mask(mask))

    @cached_property
    def features(self) -> Tensor:
        """Pooled features [N, D] in fp32."""
        return self._features(self.samples)

    @cached_property
    def softmax(self) -> Tensor:
        """Of the head at these features, [N, C] in fp32."""
        return self._softmax(self.features)

    def _features(self, samples: int) -> Tensor:
        return (self._normal(samples, self.size.channels) + 0.5).relu_()

    def _softmax(self, features: Tensor) -> Tensor:
        weight, bias = self.head[:2]
        assert bias is not None
        return F.linear(features, weight.float(), bias.float()).softmax(1)

    def basis(self, kind: BasisKind) -> ok.BasisTensors:
        """A basis of the kind: random vectors or factors, or random anchors and coefficients."""
        if kind == "dual":
            return self.dual()
        size, constants = self.size, self._constants()
        if kind == "explicit":
            scale = (size.classes * size.channels) ** -0.5
            components = self._normal(size.components, size.classes, size.channels + 1, scale=scale)
            return ok.ExplicitTensors(components, constants).to(self.dtype)
        class_factors = self._normal(size.classes, size.class_rank)
        feature_factors = self._normal(size.channels + 1, size.feature_rank, scale=size.channels**-0.5)
        core = self._normal(size.components, size.class_rank, size.feature_rank)
        return ok.FactoredTensors(class_factors, feature_factors, core, constants).to(self.dtype)

    def dual(self) -> ok.DualTensors:
        """A dual basis."""
        size, constants = self.size, self._constants()
        anchors = self._features(size.anchors)
        coefficients = self._normal(size.anchors, size.components, scale=1 / size.anchors)
        coefficients -= coefficients.mean(0)
        return ok.DualTensors(self._softmax(anchors), anchors, coefficients, constants).to(self.dtype)

    def _constants(self) -> Tensor:
        return self._normal(self.size.components, scale=0.01)


def as_vectors(basis: ok.BasisTensors) -> Tensor:
    """The vectors of a basis [K, C·D̃] in fp32."""
    if isinstance(basis, ok.ExplicitTensors):
        return basis.components.float().flatten(1)
    if isinstance(basis, ok.FactoredTensors):
        left, right, core = (part.float() for part in basis[:3])
        return (left @ core @ right.T).flatten(1)
    cotangents, features, coefficients = (part.float() for part in basis[:3])
    extended = F.pad(features, (0, 1), value=1.0)
    vectors = features.new_empty((coefficients.shape[1], cotangents.shape[1], extended.shape[1]))
    for vector, column in zip(vectors, coefficients.T, strict=True):
        torch.mm((cotangents * column[:, None]).T, extended, out=vector)
    return vectors.flatten(1)


def as_map(feature_map: Tensor) -> Tensor:
    """[N, D, H, W] of a map or of tokens."""
    return feature_map.transpose(1, 2).unsqueeze(-1) if feature_map.ndim == 3 else feature_map


def pool_truth(feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """What `pool_nap` returns, in fp64, of a few samples at a time."""
    rows = max(1, _TRUTH_ELEMENTS // feature_map[0].numel())
    parts = [ok.reference.pool_nap(part.double()) for part in as_map(feature_map).split(rows)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def score_truth(feature_map: Tensor, head: ok.Head, basis: ok.BasisTensors) -> ok.ScoreOutputs:
    """What `score` returns, in fp64."""
    h, nap = pool_truth(feature_map)
    lse, pruned_lse, p = ok.reference.masked_energy(h, *head)
    return ok.ScoreOutputs(h, nap, lse, pruned_lse, p, ok.reference.project_gradients(p, h, basis))
