"""Launcher calls for ahead-of-time compilation and tuning, with the sizes of real workloads.

One list for both: `aot` runs it on "meta" tensors, `tune` on GPU tensors. Operands are matched to launcher parameters by name.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .masks import pack_mask, unpack_mask
from .types import BasisTensors, Head
from .workloads import BASES, WORKLOADS, BasisKind, Layout, Operands, Workload

__all__ = ["Case", "all_cases", "forced_by", "launcher", "operands", "run", "run_reference"]

_LAUNCHERS = {
    "pool_nap": "pool_nap",
    "pool_statistics": "pool_nap",
    "masked_energy": "masked_energy",
    "project_dual": "project_dual",
    "project_explicit": "project_explicit",
    "project_factored": "project_factored",
    "score": "score",
}


class Case(NamedTuple):
    """One call of a launcher.

    Attributes:
        function: name of the launcher and of its counterpart in `reference`.
        workload: its sizes.
        dtype: of the feature map, or of head and basis without one.
        layout: of the feature map: "rows" (NCHW) or "channels_last".
        precision: of matrix products, one of `PRECISIONS`.
        mask: storage of the weight and neuron masks: "bits", "bytes" or "none".
        basis: basis kind for `score`, or None.
        cotangent: for `score`.
        shifted: whether a dual basis has a feature shift.
        samples: N.
        forced: (family, constant, value) overrides for variants reachable only by tuned configurations; skipped by tuning.
    """

    function: str
    workload: Workload
    dtype: torch.dtype = torch.float32
    layout: Layout = "rows"
    precision: str = "ieee"
    mask: str = "bits"
    basis: BasisKind | None = "dual"
    cotangent: str = "energy"
    shifted: bool = True
    samples: int = 256
    forced: tuple[tuple[str, str, int | str], ...] = ()

    def __str__(self) -> str:
        words = [self.workload.name, str(self.dtype).removeprefix("torch.")]
        if self.function.startswith(("pool", "score")):
            words.append("tokens" if self.workload.tokens else self.layout)
        if not self.function.startswith("pool"):
            words.append(self.precision)
        if self.function in ("masked_energy", "score"):
            words.append(f"mask={self.mask}")
        if self.function == "score":
            words += [self.basis or "no basis"] + [self.cotangent] * (self.cotangent != "energy")
        if not self.shifted:
            words.append("no shift")
        words += [f"{name}={value}" for _, name, value in self.forced]
        return f"{self.function} {' '.join(words)} N={self.samples}"


def launcher(function: str) -> Callable[..., Any]:
    """The host function of a Triton kernel."""
    return getattr(import_module(f"{__package__}.triton_kernels.{_LAUNCHERS[function]}"), function)


def forced_by(case: Case) -> dict[str, dict[str, int | str]]:
    """A case's forced configurations by family, for `launch.forced`."""
    return {
        family: {name: value for owner, name, value in case.forced if owner == family} for family, _, _ in case.forced
    }


def run(case: Case, values: Mapping[str, Any]) -> Any:
    """Call the case's launcher with the operands of `operands`."""
    return launcher(case.function)(**values)


def run_reference(case: Case, values: Mapping[str, Any]) -> Any:
    """The launcher's expected result, computed in plain torch."""
    channels = case.workload.channels
    plain: dict[str, Any] = {
        name: unpack_mask(value, channels) if isinstance(value, Tensor) and value.dtype == torch.int32 else value
        for name, value in values.items()
    }
    if case.function == "score":
        head = Head(*(plain[name] for name in Head._fields))
        return reference.score(plain["feature_map"], head, plain["basis"], plain["eps"], rectify=plain["rectify"])
    if "basis" in plain:
        return plain["basis"].project(plain["a"], plain["h"])
    function = getattr(reference, case.function)
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in plain.items() if name in known})


def operands(case: Case, device: torch.device) -> dict[str, Any]:
    """Random arguments for the case's launcher; without memory on the "meta" device.

    Raises:
        TypeError: the launcher has a required parameter without a known operand.
    """
    makers = _makers(case, device)
    values = {}
    for name, parameter in inspect.signature(launcher(case.function)).parameters.items():
        if name in makers:
            values[name] = makers[name]()
        elif parameter.default is parameter.empty:
            raise TypeError(f"{case.function}: no operand is known for its parameter {name}")
    return values


def _makers(case: Case, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Factories for all launcher parameters."""
    made = Operands(case.workload, case.samples, case.dtype, device)
    layout: Layout = "tokens" if case.workload.tokens else case.layout

    def keep(mask: Tensor | None) -> Tensor | None:
        if mask is None or case.mask == "none":
            return None
        return mask if case.mask == "bytes" else pack_mask(mask)

    def basis() -> BasisTensors | None:
        # The projections are named after their basis.
        wanted = case.basis if case.function == "score" else case.function.removeprefix("project_")
        kind = next((kind for kind in BASES if kind == wanted), None)
        return None if kind is None else made.basis(kind, case.shifted, case.cotangent)

    return {
        "feature_map": lambda: made.feature_map(layout),
        "eps": lambda: 1.0,
        "rectify": lambda: False,
        "h": lambda: made.features,
        "a": lambda: made.softmax,
        "weight": lambda: made.head.weight,
        "bias": lambda: made.head.bias,
        "weight_mask": lambda: keep(made.head.weight_mask),
        "neuron_mask": lambda: keep(made.head.neuron_mask),
        "basis": basis,
        "precision": lambda: case.precision,
    }


_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
_MAIN = ((_FP32, "ieee"), (_BF16, "bf16"))
_EVERY = (*_MAIN, (_FP32, "tf32x3"), (_FP32, "tf32"), (_FP16, "fp16"))


def all_cases() -> Iterator[Case]:
    """All cases: every dtype and precision for the first workload, distinct specialisations only for the others."""
    first = next(iter(WORKLOADS.values()))
    for workload in WORKLOADS.values():
        layouts: tuple[Layout, ...] = ("channels_last",) if workload.tokens else ("rows", "channels_last")
        for dtype, layout in itertools.product((_FP32, _BF16, _FP16) if workload is first else (_FP32, _BF16), layouts):
            yield Case("pool_nap", workload, dtype, layout)
            if workload is first:
                yield Case("pool_nap", workload, dtype, layout, samples=1)
            if workload is first and dtype != _FP16:
                yield Case("pool_statistics", workload, dtype, layout)
        # The heads of the other workloads differ from the first only in size.
        if workload.name in ("R50", "R18", "W21k", "tiny"):
            for dtype, precision in _EVERY if workload is first else _MAIN:
                yield from _product_cases(workload, dtype, precision)
    for dtype, precision in _MAIN:
        head = Case("masked_energy", first, dtype, precision=precision)
        yield head._replace(mask="none" if dtype == _FP32 else "bytes")
        yield head._replace(function="project_dual", shifted=False)
        yield head._replace(function="project_dual", forced=(("project_dual", "VARIANT", "stored"),))
        yield head._replace(function="score", layout="channels_last", cotangent="predicted")
        # A tuned limit can turn the default three launches into one.
        one_launch = (("score", "LIMIT_KIB", 1 << 20),)
        yield head._replace(function="score", layout="channels_last", workload=WORKLOADS["R18"], forced=one_launch)


def _product_cases(workload: Workload, dtype: torch.dtype, precision: str) -> Iterator[Case]:
    yield Case("masked_energy", workload, dtype, precision=precision)
    yield Case("project_dual", workload, dtype, precision=precision)
    if workload.name == "W21k":
        return
    if precision in ("ieee", "tf32x3", "bf16"):
        yield Case("project_explicit", workload, dtype, precision=precision)
        yield Case("project_factored", workload, dtype, precision=precision)
    whole = (dtype, precision) in _MAIN and workload.name != "R18"
    for basis in (*BASES, None) if whole else ("dual",):
        yield Case("score", workload, dtype, "channels_last", precision, basis=basis)
