"""The words of a benchmark: a case is one computation at one size, a provider is one way to do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ood_kernels.workloads import Cost

__all__ = [
    "AUTOGRAD",
    "COMPILED",
    "COPY",
    "OURS",
    "PLAIN",
    "REFERENCE",
    "Case",
    "MissingProviderError",
    "Planned",
    "Provider",
    "first_line",
    "providers_of",
]

OURS, REFERENCE, COMPILED, COPY = "ood-engine", "reference", "torch.compile", "copy of the same bytes"
PLAIN, AUTOGRAD = "plain products", "autograd, a sample at a time"


class MissingProviderError(RuntimeError):
    """MissingProviderError(name, reason): a provider that is not to be had here, such as a package that is not installed."""


class Provider(NamedTuple):
    """One way to compute what a case asks for.

    Attributes:
        name: `OURS`, `REFERENCE`, "pytorch-ood", ...
        call: computes it once from operands that are there already.
        check: from the result to the tensors that are compared with the truth; None takes the result itself.
        tolerance: largest error, relative to the largest magnitude of each tensor; None where there is nothing to compare.
        samples: of one call, where it takes fewer than the case has: its first ones.
        steps: least work of one call, where it is not that of the case.
        uses_numpy: its memory is NumPy's.
        graph: whether CUDA may capture it.
        flush: whether the second-level cache of a GPU is flushed before each call.
        note: for the reader of the row.
    """

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], Any] | None = None
    tolerance: float | None = 1e-4
    samples: int | None = None
    steps: Sequence[Cost] | None = None
    uses_numpy: bool = False
    graph: bool = True
    flush: bool = True
    note: str | None = None


class Case(NamedTuple):
    """One computation at one size, and everyone who can do it.

    Attributes:
        subject: what is computed.
        workload: name in `ood_kernels.workloads`, or of the model or data.
        sizes: N, D, C, ...
        providers: the first is timed by pytest-benchmark, the others in turns with it.
        reference: provider whose time is the unit of the ratios.
        truth: the right result in fp64, if there is one.
        steps: least arithmetic and traffic of each step; empty where it cannot be said.
        dtype: of map, head and basis.
        layout: of the map; "" where there is none.
        missing: provider → why it is not among them.
    """

    subject: str
    workload: str
    sizes: Mapping[str, int]
    providers: Sequence[Provider]
    reference: str
    truth: Sequence[Tensor] = ()
    steps: Sequence[Cost] = ()
    dtype: torch.dtype = torch.float32
    layout: str = ""
    missing: Mapping[str, str] = MappingProxyType({})


class Planned(NamedTuple):
    """A case before its operands are made; `quick` says whether it is measured with `--quick` too."""

    name: str
    build: Callable[[], Case]
    quick: bool = True

    def __str__(self) -> str:
        return self.name


def providers_of(*makers: Callable[[], Provider]) -> tuple[list[Provider], dict[str, str]]:
    """What the makers return, and for those that raise MissingProviderError the reason by provider."""
    found, missing = [], {}
    for make in makers:
        try:
            found.append(make())
        except MissingProviderError as error:
            name, reason = error.args
            missing[name] = reason
    return found, missing


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
