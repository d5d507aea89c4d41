"""Problem sizes for ahead-of-time compilation, tuning, tests and benchmarks: minimal flops and memory traffic, and operands."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import DualTensors, ExplicitTensors, FactoredTensors
from .bases.dual import linear_part
from .types import Head

__all__ = ["BASES", "LAYOUTS", "WORKLOADS", "Basis", "BasisKind", "Cost", "Layout", "Operands", "Workload"]

BasisKind = Literal["dual", "explicit", "factored"]
BASES: tuple[BasisKind, ...] = get_args(BasisKind)
Layout = Literal["rows", "channels_last", "tokens"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Basis = DualTensors | ExplicitTensors | FactoredTensors

_FP32_BYTES = 4


class Cost(NamedTuple):
    """Flops and minimal memory traffic of one step: inputs read once, outputs written once.

    Attributes:
        flops: multiplications, additions, and comparisons of a maximum.
        bytes: read and written.
    """

    flops: int
    bytes: int

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Roofline time: the maximum of compute time and memory time."""
        return max(self.flops / flops_a_second, self.bytes / bytes_a_second)


class Workload(NamedTuple):
    """Sizes of a model's last feature map, head and gradient subspace.

    Attributes:
        name: label in tables.
        channels: D.
        height: H of the feature map A [N, D, H, W].
        width: W.
        classes: C.
        anchors: n of the dual basis.
        components: K.
        class_rank: R of the factored basis.
        feature_rank: Q of the factored basis.
        tokens: whether the map consists of tokens [N, H·W, D], as in a vision transformer.
    """

    name: str
    channels: int
    height: int
    width: int
    classes: int
    anchors: int
    components: int
    class_rank: int = 64
    feature_rank: int = 128
    tokens: bool = False

    def pool(self, samples: int, itemsize: int) -> Cost:
        """Mean and maximum over H·W and NAP, from a map of `itemsize` bytes per element: h [N, D] and NAP [N] in fp32."""
        elements = samples * self.channels * self.height * self.width
        return Cost(2 * elements, elements * itemsize + _FP32_BYTES * samples * (self.channels + 1))

    def head(self, samples: int, itemsize: int, pruned: bool = True) -> Cost:
        """Energy and softmax of the head and, if `pruned`, energy of the pruned head; W read once, its mask bit-packed."""
        weights = self.classes * self.channels
        mask_bytes = -(-weights // 8) + -(-self.channels // 8) if pruned else 0
        samples_bytes = _FP32_BYTES * samples * (self.channels + self.classes + 2)
        flops = 2 * samples * weights * (2 if pruned else 1)
        return Cost(flops, weights * itemsize + _FP32_BYTES * self.classes + mask_bytes + samples_bytes)

    def basis_elements(self, basis: BasisKind = "dual") -> int:
        """Elements of a basis read by a projection, without the constants."""
        if basis == "dual":
            return self.anchors * (self.classes + self.channels + self.components)
        if basis == "explicit":
            return self.components * self.classes * (self.channels + 1)
        factors = self.classes * self.class_rank + (self.channels + 1) * self.feature_rank
        return factors + self.components * self.class_rank * self.feature_rank

    def projection(self, samples: int, itemsize: int, basis: BasisKind = "dual") -> Cost:
        """Coordinates [N, K] from a and h: one multiplication and one addition per basis element and sample."""
        elements = self.basis_elements(basis)
        samples_bytes = _FP32_BYTES * samples * (self.classes + self.channels + self.components)
        return Cost(2 * samples * elements, elements * itemsize + _FP32_BYTES * self.components + samples_bytes)

    def score(
        self, samples: int, map_itemsize: int, itemsize: int, basis: BasisKind | None = "dual", pruned: bool = True
    ) -> dict[str, Cost]:
        """The steps of `ood_kernels.score`, whose rooflines add up to the total; `itemsize` is that of head and basis."""
        steps = {"pool": self.pool(samples, map_itemsize), "head": self.head(samples, itemsize, pruned)}
        return steps if basis is None else steps | {"projection": self.projection(samples, itemsize, basis)}


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("R50", 2048, 7, 7, classes=1000, anchors=4096, components=512),
        Workload("R18", 512, 4, 4, classes=10, anchors=2048, components=200, class_rank=10),
        Workload("W21k", 2048, 7, 7, classes=21841, anchors=4096, components=512),
        Workload("ViT", 768, 14, 14, classes=1000, anchors=4096, components=512, tokens=True),
        Workload("MobileNetV2", 1280, 7, 7, classes=1000, anchors=4096, components=512),
        Workload("tiny", 10, 3, 3, classes=3, anchors=21, components=5, class_rank=3, feature_rank=7),
    )
}
"""ResNet-50 and MobileNetV2 on ImageNet, a small-image ResNet-18 on CIFAR-10, ResNet-50 with the 21 841 classes of
ImageNet-21k, ViT-B/16, and sizes divisible by no tile."""


class Operands:
    """Random operands of one workload, made when asked for and the same at every run; on the "meta" device without memory.

    The positions of a map share a part of each channel, and features are rectified normal numbers; logits have a standard deviation
    of about 3; the coefficients of a dual basis sum to 0, as those of a PCA of centred gradients do, and its shift is the mean of
    its anchors, as in every fitted one.

    Args:
        size: the workload.
        samples: N.
        dtype: of map, head and basis; features and softmax are fp32.
        device: where they are.
    """

    def __init__(
        self, size: Workload, samples: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.size, self.samples, self.dtype, self.device = size, samples, dtype, torch.device(device)
        # There is no generator of the meta device.
        is_meta = self.device.type == "meta"
        self._generator = None if is_meta else torch.Generator(self.device).manual_seed(0)

    def feature_map(self, layout: Layout) -> Tensor:
        """A [N, D, H, W] stored as rows (NCHW), channels_last, or, for "tokens", as [N, H, W, D] of a vision transformer."""
        size = self.size
        values = self._normal(self.samples, size.height, size.width, size.channels).to(self.dtype)
        values = values.add_(self._normal(self.samples, 1, 1, size.channels).to(self.dtype)).relu_().permute(0, 3, 1, 2)
        return values.contiguous() if layout == "rows" else values

    @cached_property
    def head(self) -> Head:
        """With a tenth of its weights and neurons pruned; the masks are bool."""
        classes, channels = self.size.classes, self.size.channels
        weight, bias = self._normal(classes, channels, scale=3 / channels**0.5), self._normal(classes)
        return Head(weight.to(self.dtype), bias.to(self.dtype), self._kept(classes, channels), self._kept(channels))

    @cached_property
    def features(self) -> Tensor:
        """[N, D] in fp32."""
        return self._features(self.samples)

    @cached_property
    def softmax(self) -> Tensor:
        """[N, C] in fp32, of the head at `features`."""
        return self._softmax(self.features)

    def basis(self, kind: BasisKind, shifted: bool = True, cotangent: str = "energy") -> Basis:
        """A basis of that kind; a dual one without its shift where not `shifted`."""
        if kind == "dual":
            return (self._dual if shifted else self._unshifted)._replace(cotangent=cotangent)
        if kind == "explicit":
            return self._explicit._replace(cotangent=cotangent)
        return self._factored._replace(cotangent=cotangent)

    @cached_property
    def _dual(self) -> DualTensors:
        plain = self._unshifted
        p, h, coefficients = (part.float() for part in plain[:3])
        shift = h.mean(0)
        return plain._replace(shift=shift, linear=linear_part(p, h, coefficients, shift))

    @cached_property
    def _unshifted(self) -> DualTensors:
        size, h = self.size, self._features(self.size.anchors)
        coefficients = self._normal(size.anchors, size.components, scale=1 / size.anchors)
        return DualTensors(self._softmax(h), h, coefficients - coefficients.mean(0), self._constants()).to(self.dtype)

    @cached_property
    def _explicit(self) -> ExplicitTensors:
        size, scale = self.size, (self.size.classes * self.size.channels) ** -0.5
        components = self._normal(size.components, size.classes, size.channels + 1, scale=scale)
        return ExplicitTensors(components, self._constants()).to(self.dtype)

    @cached_property
    def _factored(self) -> FactoredTensors:
        size = self.size
        return FactoredTensors(
            self._normal(size.classes, size.class_rank),
            self._normal(size.channels + 1, size.feature_rank, scale=size.channels**-0.5),
            self._normal(size.components, size.class_rank, size.feature_rank),
            self._constants(),
        ).to(self.dtype)

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).mul_(scale)

    def _kept(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device) < 0.9

    def _features(self, rows: int) -> Tensor:
        return (self._normal(rows, self.size.channels) + 0.5).relu_()

    def _softmax(self, h: Tensor) -> Tensor:
        weight, bias = self.head[:2]
        assert bias is not None
        return F.linear(h, weight.float(), bias.float()).softmax(1)

    def _constants(self) -> Tensor:
        return self._normal(self.size.components, scale=0.01)
