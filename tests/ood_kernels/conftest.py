"""Shared by the tests of the kernels: layouts, an ownership check and small well-formed problems."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ood_kernels as ok
from ood_kernels.bases import BASES

Problem = tuple[Tensor, ok.Head, ok.BasisTensors | None]


def _strided(tensor: Tensor) -> Tensor:
    """The same shape over one short buffer, with overlapping, unordered strides."""
    strides = [(3, 1, 2, 4, 5)[axis % 5] for axis in range(tensor.ndim)]
    needed = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True) if size)
    return tensor.flatten().repeat(1 + needed // max(1, tensor.numel())).as_strided(tensor.shape, strides)


def _unread(tensor: Tensor) -> float:
    """What lies beside a view; where it is read, it shows."""
    return torch.nan if tensor.is_floating_point() else 1


def _sliced(tensor: Tensor) -> Tensor:
    """A view into a larger tensor: an offset along every axis, a step of two along the last."""
    larger = tensor.new_full([size + 2 for size in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 1], _unread(tensor))
    view = larger[tuple(slice(1, size + 1) for size in tensor.shape[:-1])][..., 1::2]
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "last axes first": lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": _sliced,
    "offset": lambda tensor: torch.cat([tensor.new_full((3,), _unread(tensor)), tensor.flatten()])[3:].view(
        tensor.shape
    ),
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


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same normal numbers in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    """A feature map, a pruned head and a basis over real anchors, in any form ("shifted": dual, "": none), size and dtype."""

    def make(
        samples: int = 5,
        channels: int = 12,
        classes: int = 6,
        side: int = 3,
        *,
        form: str = "dual",
        anchors: int = 9,
        components: int = 4,
        ranks: tuple[int, int] = (2, 3),
        dtype: torch.dtype = torch.float32,
        cotangent: str = "energy",
        bias: bool = True,
        seed: int = 0,
    ) -> Problem:
        seeds = itertools.count(10 * seed)

        def draw(*shape: int) -> Tensor:
            return normal(*shape, seed=next(seeds))

        head = ok.Head(
            (2 * draw(classes, channels) / channels**0.5).to(dtype),
            (draw(classes) + 3).to(dtype),
            draw(classes, channels) > -1,
            draw(channels) > -1,
        )
        features, coefficients, constants = draw(anchors, channels).relu(), draw(anchors, components), draw(components)
        p = torch.nn.functional.linear(features, head.weight.double(), head.bias.double()).softmax(1)
        dual = ok.reference.cotangent(p, cotangent), features, coefficients
        parts: list[Tensor | None] = [*dual, constants, None, None]
        if form == "shifted":
            shift = features.mean(0)
            parts = [*parts[:4], shift, ok.reference.linear_part(*dual, shift, bias)]
        elif form == "explicit":
            extended = torch.cat([features, torch.ones(anchors, int(bias), dtype=torch.float64)], 1)
            parts = [torch.einsum("nk,nc,nd->kcd", coefficients, dual[0], extended), constants]
        elif form == "factored":
            parts = [draw(classes, ranks[0]), draw(channels + bias, ranks[1]), draw(components, *ranks), constants]
        kind = BASES["dual" if form == "shifted" else form] if form else None
        basis = kind and kind.from_parts([part if part is None else part.to(dtype) for part in parts], cotangent, bias)
        return draw(samples, channels, side, side).relu().to(dtype), head, basis

    return make


class Scorer(torch.nn.Module):
    """Every public function in one forward, the parameters held as a module holds them."""

    def __init__(self, head: ok.Head, basis: ok.BasisTensors):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(head.weight), torch.nn.Parameter(head.bias)
        self.register_buffer("weight_mask", head.weight_mask)
        self.register_buffer("neuron_mask", head.neuron_mask)
        self.form, self.options = type(basis), [value for value in basis if not isinstance(value, Tensor)]
        self.names = [name for name in basis._fields if isinstance(getattr(basis, name), Tensor)]
        for name in self.names:
            self.register_buffer(name, getattr(basis, name))

    def tensors(self) -> ok.BasisTensors:
        return self.form(*[getattr(self, name) for name in self.names], *self.options)

    @property
    def head(self) -> ok.Head:
        return ok.Head(self.weight, self.bias, self.weight_mask, self.neuron_mask)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, ...]:
        ratios = ok.pool_nap(feature_map, rectify=True, return_ratios=True)
        energies = ok.masked_energy(ratios[0], *self.head)
        g_low = ok.project_gradients(energies[2], ratios[0], self)
        statistics = ok.pool_statistics(feature_map)
        return (
            *ok.score(feature_map, self.head, self),
            *ok.pool_nap(feature_map),
            *ratios,
            *energies,
            g_low,
            *statistics,
        )


@pytest.fixture(scope="session")
def make_scorer(make_problem) -> Callable[[str, str], tuple[Scorer, Tensor]]:
    """A scorer over every public function, and a batch for it."""

    def make(kind: str, form: str) -> tuple[Scorer, Tensor]:
        feature_map, head, basis = make_problem(4, 6, 5, form=form, cotangent=kind)
        return Scorer(head, basis), feature_map

    return make
