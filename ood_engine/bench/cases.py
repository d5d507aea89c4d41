"""The words of a benchmark: a case is one computation at one size, a provider is one way to do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ood_kernels.workloads import Cost

__all__ = ["OURS", "Case", "Effort", "MissingProviderError", "Plan", "Provider", "providers_of"]

OURS = "ood-engine"
"""Provider: what a user of this package calls."""


class MissingProviderError(RuntimeError):
    """MissingProviderError(name, reason): a provider that cannot be had here, such as a package that is not installed."""


class Provider(NamedTuple):
    """One way to compute what a case asks for.

    Attributes:
        name: "ood-engine", "reference", "torch.compile", "pytorch-ood", ...
        call: computes it once, from operands that are there already, and returns the result.
        check: from what `call` returned to the tensors that are held to the truth; None takes the result itself.
        tolerance: largest difference to the truth, relative to the largest magnitude of each tensor; None for what computes
            another thing, such as a forward of the model, and has no truth in this case.
        samples: of one call, where it takes fewer than the case has (its first ones, and so the first rows of the truth).
        captures: whether a GPU can run it as a CUDA graph, which is then a provider of its own.
        uses_numpy: its memory is NumPy's, not that of torch's allocator.
        note: for the reader of the row.
        cost: least arithmetic and traffic of one call, where it is not that of the case.
    """

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], Any] | None = None
    tolerance: float | None = 1e-4
    samples: int | None = None
    captures: bool = False
    uses_numpy: bool = False
    note: str | None = None
    cost: Cost | None = None


class Case(NamedTuple):
    """One computation at one size, and everyone who can do it.

    Attributes:
        providers: are measured in turns.
        truth: the right result in fp64; empty where there is nothing to check, such as a forward of the model.
        cost: least arithmetic and traffic, from the shapes alone; None where it cannot be said.
        missing: provider → why it is not among them, in one line.
    """

    providers: Sequence[Provider]
    truth: Sequence[Tensor] = ()
    cost: Cost | None = None
    missing: Mapping[str, str] = MappingProxyType({})


def providers_of(*makers: Callable[[], Provider]) -> tuple[list[Provider], dict[str, str]]:
    """What the makers return, and for those that raise MissingProviderError (its arguments: provider, reason) the reason."""
    found, missing = [], {}
    for maker in makers:
        try:
            found.append(maker())
        except MissingProviderError as error:
            name, reason = error.args
            missing[name] = reason
    return found, missing


class Plan(NamedTuple):
    """A case before its operands are made.

    Attributes:
        subject: what is computed, such as "pool_nap".
        workload: name in `ood_kernels.workloads`, or of the data.
        sizes: N, D, C, H, W, n (anchors), K, ... of this case.
        build: makes the operands.
        dtype: of map, head and basis.
        memory_format: "NCHW", "channels_last", "tokens"; "" where there is no map.
        sweeps: the sizes along which this case belongs to a series for a growth exponent and a curve, such as ("N",).
        cold: push the operands out of the caches before every call.
        seconds: most time for one provider, a multiple of the effort's.
    """

    subject: str
    workload: str
    sizes: Mapping[str, int]
    build: Callable[[], Case]
    dtype: torch.dtype = torch.float32
    memory_format: str = ""
    sweeps: tuple[str, ...] = ()
    cold: bool = False
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.subject}, {self.workload} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> str:
        """Such as "N=64 D=2048"."""
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
        name: "quick" or "full".
        rounds: turns of every provider, as long as its seconds last.
        least_seconds: a provider's turn goes on until they have passed.
        most_seconds: of one provider in one case; at least three calls are made, one where a call alone takes longer.
        device: where tensors are.
    """

    name: Literal["quick", "full"]
    rounds: int
    least_seconds: float
    most_seconds: float
    device: torch.device

    @property
    def is_quick(self) -> bool:
        """Whether fewer sizes are to be planned."""
        return self.name == "quick"
