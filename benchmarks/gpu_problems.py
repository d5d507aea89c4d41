"""What is measured on a GPU, most important first, and the operands of each case with their results in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels.workloads import WORKLOADS, Workload

__all__ = ["Case", "Problem", "all_cases"]

T = TypeVar("T")
_MOST_COPIES = 512
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "ieee"}


class Case(NamedTuple):
    """Sizes, types and layout that are measured in one go, their subjects in turns.

    Attributes:
        workload: a model's last layers.
        samples: N.
        dtype: in which feature map, head and basis are stored.
        layout: of the map: "NCHW", "channels_last" or "tokens".
        precisions: of the kernels' products; every one is a subject.
        extras: further subjects: "compile", "autograd", "forward" (ResNet-50), "bases" (explicit and factored), "precisions" (every
            precision of the dual projection).
    """

    workload: Workload
    samples: int
    dtype: torch.dtype
    layout: str
    precisions: tuple[str, ...]
    extras: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.workload.name} N={self.samples} {str(self.dtype).removeprefix('torch.')} {self.layout}"


def all_cases() -> Iterator[Case]:
    """Every workload, batch size, dtype and layout once; first what the targets ask for, then the rest by weight."""
    r50, bf16, fp16, fp32 = WORKLOADS["R50"], torch.bfloat16, torch.float16, torch.float32
    first = [
        Case(r50, 256, bf16, "channels_last", ("bf16",), frozenset({"compile", "autograd", "forward", "bases"})),
        Case(r50, 256, bf16, "NCHW", ("bf16",)),
        Case(r50, 1, bf16, "channels_last", ("bf16",), frozenset({"forward"})),
        Case(r50, 256, fp32, "NCHW", ("ieee", "tf32x3"), frozenset({"precisions"})),
        Case(r50, 256, fp16, "channels_last", ("fp16",)),
        Case(r50, 1024, bf16, "channels_last", ("bf16",)),
        Case(r50, 1024, bf16, "NCHW", ("bf16",)),
        Case(WORKLOADS["ViT"], 256, bf16, "tokens", ("bf16",)),
        Case(WORKLOADS["R18"], 256, bf16, "NCHW", ("bf16",), frozenset({"bases"})),
        Case(WORKLOADS["W21k"], 256, bf16, "channels_last", ("bf16",)),
        Case(r50, 8, bf16, "channels_last", ("bf16",)),
        Case(r50, 64, bf16, "channels_last", ("bf16",)),
    ]
    yield from first
    seen = {str(case) for case in first}
    sizes = [WORKLOADS[name] for name in ("R50", "ViT", "R18", "W21k")]
    for samples, dtype, workload in itertools.product((256, 1, 1024, 64, 8), _DTYPES, sizes):
        for layout in ("tokens",) if workload.tokens else ("channels_last", "NCHW"):
            case = Case(workload, samples, dtype, layout, _precisions(dtype))
            if str(case) not in seen:
                yield case


def _precisions(dtype: torch.dtype) -> tuple[str, ...]:
    return ("ieee", "tf32x3") if dtype == torch.float32 else (_DTYPES[dtype],)


class Problem:
    """Operands of a case on a device, each as often as it takes to flush a cache of `cache_bytes`, and the truth.

    Features are means of rectified normal numbers that share a part of each channel; logits have a standard deviation of
    about 3; the coefficients of every component sum to 0, as those of a PCA of centred gradients do.
    """

    def __init__(self, case: Case, device: torch.device, cache_bytes: int) -> None:
        self.case, self.device, self.cache_bytes = case, device, cache_bytes
        size, dtype = case.workload, case.dtype
        classes, channels = size.classes, size.channels
        feature_map = self._feature_map()
        self.maps = self.copies(feature_map)
        weight = self._normal(classes, channels, scale=3 / channels**0.5).to(dtype)
        mask = torch.rand((classes, channels), device=device) < 0.9
        neurons = torch.rand(channels, device=device) < 0.9
        bias = self._normal(classes).to(dtype)
        self.head = ok.Head(weight, bias, mask, neurons)
        # Plain torch would unpack the bits anew in every call.
        self.bool_heads = self.copies(self.head)
        self.heads = self.copies(self.head._replace(weight_mask=ok.pack_mask(mask)))
        anchor_features = (self._normal(size.anchors, channels) + 0.5).relu_()
        logits = anchor_features.to(dtype) @ weight.T + bias
        coefficients = self._normal(size.anchors, size.components, scale=1 / size.anchors)
        coefficients -= coefficients.mean(0)
        self.dual = ok.DualTensors(
            logits.float().softmax(1), anchor_features, coefficients, self._normal(size.components, scale=0.01)
        ).to(dtype)
        self.duals = self.copies(self.dual)
        self.h = self.truth.h.float()
        self.p = self.truth.p.float()

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device) * scale

    def _feature_map(self) -> Tensor:
        case, size = self.case, self.case.workload
        shared = torch.randn((case.samples, 1, 1, size.channels), device=self.device, dtype=case.dtype)
        shape = (case.samples, size.height, size.width, size.channels)
        values = torch.randn(shape, device=self.device, dtype=case.dtype).add_(shared).relu_()
        if case.layout == "tokens":
            return values.flatten(1, 2)
        channels_last = values.permute(0, 3, 1, 2)
        return channels_last.contiguous() if case.layout == "NCHW" else channels_last

    def copies(self, value: T) -> list[T]:
        """The value, which may be a tuple of tensors, and clones of it: together more than the cache holds twice."""
        parts = [part for part in _parts(value) if isinstance(part, Tensor)]
        size = sum(part.numel() * part.element_size() for part in parts)
        count = min(_MOST_COPIES, 1 + max(1, math.ceil(2 * self.cache_bytes / max(1, size))))
        return [value, *(_clone(value) for _ in range(count - 1))]

    @cached_property
    def truth(self) -> ok.ScoreOutputs:
        """All scores in fp64, from the operands as they are stored."""
        return ok.reference.score(
            self.maps[0].double() if self.maps[0].ndim == 4 else self._tokens(), self.head, self.dual
        )

    def _tokens(self) -> Tensor:
        return self.maps[0].double().transpose(1, 2).unsqueeze(-1)

    def energy_truth(self) -> tuple[Tensor, ...]:
        """What `masked_energy` returns for the features `h`, in fp64."""
        return ok.reference.masked_energy(self.h.double(), *self.head)

    def projection_truth(self, basis: ok.BasisTensors) -> tuple[Tensor]:
        """What `project_gradients` returns for `p` and `h`, in fp64."""
        return (ok.reference.project_gradients(self.p.double(), self.h.double(), basis),)

    def explicit(self) -> ok.ExplicitTensors:
        """The dual basis as its vectors."""
        a, features, coefficients, constants = (part.float() for part in self.dual[:4])
        extended = torch.cat([features, features.new_ones((len(features), 1))], 1)
        shape = (coefficients.shape[1], a.shape[1], extended.shape[1])
        components = torch.empty(shape, dtype=self.case.dtype, device=self.device)
        for k, column in enumerate(coefficients.T):
            components[k] = (a * column[:, None]).T @ extended
        return ok.ExplicitTensors(components, constants)

    def factored(self) -> ok.FactoredTensors:
        """A basis of random factors."""
        size = self.case.workload
        return ok.FactoredTensors(
            self._normal(size.classes, size.class_rank),
            self._normal(size.channels + 1, size.feature_rank, scale=1 / size.channels**0.5),
            self._normal(size.components, size.class_rank, size.feature_rank),
            self._normal(size.components),
        ).to(self.case.dtype)


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _clone(value: Any) -> Any:
    copies = [part.clone() if isinstance(part, Tensor) else part for part in _parts(value)]
    if not isinstance(value, tuple):
        return copies[0]
    return type(value)(*copies) if hasattr(value, "_fields") else tuple(copies)
