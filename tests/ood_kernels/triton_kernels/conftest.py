"""Shared by the tests of the Triton kernels: interpreted on the CPU, compiled where there is a GPU; the same tests."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

import ood_kernels as ok

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


def padded(tensor: Tensor) -> Tensor:
    """A view between NaN along every axis but the first."""
    return F.pad(tensor, (1, 2, 2, 1, 1, 0), value=torch.nan)[:, 1:, 2:-1, 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    # [N, 1 + T, D] without the first, as the functional layer hands them over: [N, D, T, 1].
    "tokens": lambda tensor: F.pad(tensor.flatten(2).mT, (0, 0, 1, 0), value=torch.nan)[:, 1:].mT.unsqueeze(-1),
    "padded": padded,
    "padded channels last": lambda tensor: padded(tensor.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "channels first": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "samples last": lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "offset": lambda tensor: F.pad(tensor.flatten(), (1, 0))[1:].view(tensor.shape),
    "expanded batch": lambda tensor: tensor[:1].expand(tensor.shape),
    "expanded space": lambda tensor: tensor[..., :1].expand(tensor.shape),
}
"""Ways to store a map [N, D, H, W]; expanding changes its values."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def rows_multiplied_alike(monkeypatch, device) -> None:
    """Let the interpreter multiply in fp64 and round once: on some CPUs, BLAS rounds a row by its place in the tile."""
    if device.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def create_dot(_: Any, left: Any, right: Any, added: Any, *__: Any) -> TensorHandle:
            with np.errstate(over="ignore"):
                product = (left.data.astype(np.float64) @ right.data.astype(np.float64)).astype(added.data.dtype)
            return TensorHandle(product + added.data, added.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Let `new_empty` and `empty_like` hand out memory full of NaN, so that an element nobody wrote shows."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-7)

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **options: poison(new_empty(self, *size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: poison(empty_like(tensor, **options)))


@pytest.fixture
def assert_as_good_as_torch() -> Callable[..., None]:
    """Assert that a result is as close to the truth in fp64 as torch's own in the same dtype, plus a hair.

    `ours` against `truth`, both with the same NaN; `theirs` is what torch computes in the dtype of the inputs (None where it
    has no such computation: then only the hair counts). The hair is relative to the largest magnitude of the truth. Of several
    results each is held to its own.
    """

    def check(ours: Any, truth: Any, theirs: Any = None, hair: float = 1e-6) -> None:
        if not isinstance(ours, Tensor):
            for result in zip(ours, truth, theirs or [None] * len(ours), strict=True):
                check(*result, hair)
            return
        assert (ours.dtype, ours.shape) == (torch.float32, truth.shape)
        ours, truth = ours.detach().cpu().double(), truth.detach().cpu().double()
        assert torch.equal(ours.isnan(), truth.isnan()), "NaN in other places"
        valid = ~truth.isnan()
        if not valid.any():
            return
        scale = float(truth[valid].abs().max()) or 1.0
        error = (ours - truth)[valid] / scale
        reference = torch.zeros(1) if theirs is None else (theirs.detach().cpu().double() - truth)[valid] / scale
        largest, root = float(error.abs().max()), float(error.square().mean().sqrt())
        assert largest <= 1.5 * float(reference.abs().max()) + hair, f"largest error {largest:.2e}"
        assert root <= 1.5 * float(reference.square().mean().sqrt()) + hair, f"root mean square error {root:.2e}"

    return check


@pytest.fixture
def make_projection(make_problem, device) -> Callable[..., tuple[Tensor, Tensor, ok.BasisTensors]]:
    """(a, h, basis) of a form; "shifted" and "stored" are dual with a shift.

    A dual basis in another dtype leaves its samples in fp32, every basis its constants, shift and linear part.
    """

    def make(
        form: str,
        samples: int = 5,
        classes: int = 4,
        features: int = 33,
        components: int = 7,
        *,
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> tuple[Tensor, Tensor, ok.BasisTensors]:
        options |= {"form": "shifted" if form == "stored" else form, "components": components}
        feature_map, head, basis = make_problem(samples, features, classes, 1, **options)
        h = feature_map.flatten(1)
        a = F.linear(h, head.weight, head.bias).softmax(1)
        of_samples = torch.float32 if basis.kind == "dual" else dtype
        basis = tree_map_only(Tensor, lambda part: part.to(device), basis.to(dtype))
        return a.to(device, of_samples), h.to(device, of_samples), basis

    return make


@pytest.fixture
def project() -> Callable[..., Tensor]:
    """The launcher of a form; "stored" keeps the Gram matrix of a dual basis in memory, the other two do not."""

    def call(form: str, a: Tensor, h: Tensor, basis: ok.BasisTensors, *precision: str, **options: object) -> Tensor:
        from ood_kernels.triton_kernels.launch import forced

        name = f"project_{basis.kind}"
        launcher = getattr(import_module(f"ood_kernels.triton_kernels.{name}"), name)
        with forced({"project_dual": {"VARIANT": "stored" if form == "stored" else "fused"}}):
            return launcher(a, h, basis, *precision, **options)

    return call


@pytest.fixture
def exact() -> Callable[[Tensor, Tensor, ok.BasisTensors], Tensor]:
    """The reference of a projection in fp64, on the CPU."""

    def project(a: Tensor, h: Tensor, basis: ok.BasisTensors) -> Tensor:
        parts = [part if part is None else part.cpu().double() for part in basis.parts()]
        wide = basis.from_parts(parts, basis.cotangent, basis.bias)
        return wide.project(a.detach().cpu().double(), h.detach().cpu().double())

    return project
