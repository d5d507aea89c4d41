"""Problem sizes for ahead-of-time compilation, tuning and benchmarks, with their minimal flops and memory traffic."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

__all__ = ["BASES", "WORKLOADS", "BasisKind", "Cost", "Workload"]

BasisKind = Literal["dual", "explicit", "factored"]
BASES: tuple[BasisKind, ...] = get_args(BasisKind)

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
