"""What an engine prepares for a GPU: masks packed to bits, bases in half precision. A tensor that says it is on one stands in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ood_engine as oe
import ood_kernels as ok
from ood_engine.runtime import Kernels


class OnGpu(Tensor):
    """Stands in for a tensor on a GPU: it lies on the CPU and is computed there."""

    is_cuda = property(lambda self: True)


class FixedBasis:
    """A basis of these tensors."""

    def __init__(self, tensors):
        self._tensors = tensors

    def tensors(self):
        return self._tensors


@pytest.fixture
def given(monkeypatch):
    """A list that grows by the arguments of every call of `ood_kernels.masked_energy` and `project_gradients`."""
    calls = []

    def spy(function):
        def call(*arguments, **options):
            calls.append(arguments)
            return function(*arguments, **options)

        return call

    for name in ("masked_energy", "project_gradients"):
        monkeypatch.setattr(ok, name, spy(getattr(ok, name)))
    return calls


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_on_a_gpu_masks_are_packed_once_for_each_state_of_theirs(given):
    h, head = normal(5, 40), ok.Head(normal(3, 40, seed=1), normal(3, seed=2))
    weight_mask, neuron_mask = (normal(3, 40, seed=3) > 0), normal(40, seed=4) > -1
    on_gpu = weight_mask.as_subclass(OnGpu)
    kernels = Kernels(oe.Runtime())
    for _ in range(2):
        ours = kernels.masked_energy(h, head, (on_gpu, neuron_mask))
        torch.testing.assert_close(tuple(ours), ok.reference.masked_energy(h, *head[:2], weight_mask, neuron_mask))
    first, second = (arguments[3] for arguments in given)
    assert first.dtype == torch.int32
    assert second is first
    on_gpu[1] = False  # as `configure` may do; weight_mask is the same memory
    ours = kernels.masked_energy(h, head, (on_gpu, neuron_mask))
    torch.testing.assert_close(tuple(ours), ok.reference.masked_energy(h, *head[:2], weight_mask, neuron_mask))
    kernels.masked_energy(h, head, (weight_mask, neuron_mask))
    assert given[-1][3] is weight_mask


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", None)])
def test_on_a_gpu_a_basis_is_rounded_once_for_each_state_of_its_tensors(given, precision, dtype):
    p, h = normal(5, 3).softmax(1), normal(5, 4, seed=1)
    vectors, constants = normal(2, 3, 5, seed=2), normal(2, seed=3)
    on_gpu = ok.ExplicitTensors(vectors.as_subclass(OnGpu), constants.as_subclass(OnGpu))
    kernels = Kernels(oe.Runtime(precision=precision))

    def project(tensors):
        ours = kernels.project_gradients(p, h, FixedBasis(tensors))
        rounded = vectors if dtype is None else vectors.to(dtype)
        torch.testing.assert_close(
            ours.as_subclass(Tensor), ok.reference.project_gradients(p, h, ok.ExplicitTensors(rounded, constants))
        )
        return given[-1][2]

    first, second = project(on_gpu), project(on_gpu)
    assert first.components.dtype == (dtype or torch.float32)
    assert second.components is first.components
    assert first.constants is on_gpu.constants
    on_gpu.components.mul_(2)  # as a refit may do; vectors is the same memory
    project(on_gpu)
    dtype = None
    assert project(ok.ExplicitTensors(vectors, constants)).components is vectors
