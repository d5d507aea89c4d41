"""Shared by the tests of the Triton kernels: interpreted on the CPU, compiled where there is a GPU; the same tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    has no such computation: then only the hair counts). The hair is relative to the largest magnitude of the truth.
    """

    def check(ours: Tensor, truth: Tensor, theirs: Tensor | None = None, hair: float = 1e-6) -> None:
        assert ours.shape == truth.shape
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
