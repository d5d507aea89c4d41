"""Shared by the tests of the functional layer: layouts, an ownership check and small well-formed problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ood_kernels as ok

Problem = tuple[Tensor, ok.Head, ok.DualTensors]


def _strided(tensor: Tensor) -> Tensor:
    """The same shape over one short buffer, with overlapping, unordered strides."""
    strides = [(3, 1, 2, 4, 5)[axis % 5] for axis in range(tensor.ndim)]
    needed = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True) if size)
    return tensor.flatten().repeat(1 + needed // max(1, tensor.numel())).as_strided(tensor.shape, strides)


def _sliced(tensor: Tensor) -> Tensor:
    """A view into a larger tensor: an offset along every axis, a step of two along the last."""
    larger = tensor.new_zeros([size + 2 for size in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 1])
    view = larger[tuple(slice(1, size + 1) for size in tensor.shape[:-1])][..., 1::2]
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "last axes first": lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": _sliced,
    "offset": lambda tensor: torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(tensor.shape),
    "expanded rows": lambda tensor: tensor[:1].expand(tensor.shape),
    "expanded columns": lambda tensor: tensor[..., :1].expand(tensor.shape),
    "overlapping": _strided,
}


@pytest.fixture(params=LAYOUTS)
def relayout(request) -> Callable[[Tensor], Tensor]:
    """A function that returns a tensor of the same shape in another layout; expanding and overlapping change its values."""
    return LAYOUTS[request.param]


@pytest.fixture
def assert_owned() -> Callable[[Iterable[Tensor | None], Callable[[], Iterable[Tensor]]], None]:
    """Assert that the outputs of a call share memory with no input and with no other output."""

    def check(inputs: Iterable[Tensor | None], call: Callable[[], Iterable[Tensor]]) -> None:
        inputs = [tensor for tensor in inputs if tensor is not None]
        before = [tensor.clone() for tensor in inputs]
        outputs = list(call())
        storages = [tensor.untyped_storage().data_ptr() for tensor in outputs if tensor.numel()]
        assert len(set(storages)) == len(storages)
        assert set(storages).isdisjoint(tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel())
        values = [tensor.clone() for tensor in outputs]
        for index, output in enumerate(outputs):
            output.fill_(-123.0)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(outputs[index + 1 :], values[index + 1 :], strict=True))

    return check


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(leaf.numel() for leaf in leaves)])
        return result


@pytest.fixture
def largest_tensor() -> Callable[[Callable[[], object]], int]:
    """Count the elements of the largest tensor that any operation of a call returns."""

    def count(call: Callable[[], object]) -> int:
        with _LargestTensor() as largest:
            call()
        return largest.elements

    return count


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """A feature map, a pruned head and a dual basis over real anchors, in any size and dtype."""

    def make(
        samples: int = 5,
        channels: int = 12,
        classes: int = 6,
        side: int = 3,
        *,
        anchors: int = 9,
        components: int = 4,
        dtype: torch.dtype = torch.float32,
        cotangent: str = "energy",
        bias: bool = True,
        seed: int = 0,
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        head = ok.Head(
            (2 * normal(classes, channels) / channels**0.5).to(dtype),
            (normal(classes) + 3).to(dtype),
            normal(classes, channels) > -1,
            normal(channels) > -1,
        )
        features = normal(anchors, channels).relu()
        p = torch.nn.functional.linear(features, head.weight.double(), head.bias.double()).softmax(1)
        basis = ok.DualTensors(
            ok.reference.cotangent(p, cotangent).to(dtype),
            features.to(dtype),
            normal(anchors, components).to(dtype),
            normal(components).to(dtype),
            cotangent,
            bias,
        )
        return normal(samples, channels, side, side).relu().to(dtype), head, basis

    return make
