"""What `make emulate` executes: each kernel, layout, dtype and precision at sizes that no tile divides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case, operands
from ..checks import PRECISIONS
from ..workloads import BASES, Workload

__all__ = ["BOUNDS", "Row", "all_rows", "operands_of", "sample"]

BOUNDS = {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}
"""Largest error of a precision, relative to the largest magnitude of the same output in fp64: 1e-6 where products are as good as
fp32, else the roundings of two operands."""

_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
_DTYPES = (_FP32, _BF16, _FP16)
_OWN = {"bf16": _BF16, "fp16": _FP16}
_EDGES = Workload("7×7", 70, 7, 7, classes=37, anchors=70, components=21, class_rank=5, feature_rank=9)
_EVEN = _EDGES._replace(name="4×4", channels=72, height=4, width=4, classes=48, components=24)
_TOKENS = _EDGES._replace(name="tokens", tokens=True)
_FEW = _EDGES._replace(name="few classes", channels=33, height=3, width=3, classes=5, components=3)
# With unaligned class factors, what Triton 3.6 once miscompiled: see `aot.compiled.miscompiled`.
_PACKED = _EDGES._replace(name="packed", channels=40, classes=6, components=6, class_rank=20, feature_rank=8)
# Its sum over 49 positions, times a rounded 1/49, is not the mean.
_EPS = 3.0


class Row(NamedTuple):
    """One call, executed for a batch in random order of CTAs and for samples alone.

    Attributes:
        case: sizes, dtype, precision and so on.
        variant: what is special about the operands: a key of `VALUES` or `STORAGES`, or "".
    """

    case: Case
    variant: str = ""

    @property
    def layout(self) -> str:
        """The variant, or how the map is stored."""
        if self.variant:
            return self.variant
        if not self.case.function.startswith(("pool", "score")):
            return "contiguous"
        return "tokens" if self.case.workload.tokens else self.case.layout


def _padded(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (1, 2, 2, 1, 1, 0), value=torch.nan)[:, 1:, 2:-1, 1:-2]


def _offset(tensor: Tensor) -> Tensor:
    return F.pad(tensor.flatten(), (1, 0))[1:].view(tensor.shape)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def _zero_denominator(tensor: Tensor) -> Tensor:
    tensor[-1, 3] = -_EPS
    return tensor


VALUES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "rectified": ("rectify", lambda flag: True),
    "mean + eps = 0": ("feature_map", _zero_denominator),
}
"""Name → (operand, change of its values)."""

STORAGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "padded": ("feature_map", _padded),
    "offset": ("feature_map", _offset),
    "transposed": ("feature_map", _transposed),
    "samples last": ("feature_map", lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3)),
    "weight transposed": ("weight", _transposed),
    "weight offset": ("weight", _offset),
    "features transposed": ("h", _transposed),
    "class factors transposed": (
        "basis", lambda basis: basis._replace(class_factors=_transposed(basis.class_factors))
    ),
    "class factors offset": ("basis", lambda basis: basis._replace(class_factors=_offset(basis.class_factors))),
}  # fmt: skip
"""Name → (operand, another storage of the same values)."""


def operands_of(row: Row) -> dict[str, Any]:
    """Arguments of the row's launcher, in the storage of its case."""
    values = operands(row.case, torch.device("cpu"))
    if "eps" in values:
        values["eps"] = _EPS
    if row.variant in VALUES:
        name, change = VALUES[row.variant]
        values[name] = change(values[name])
    return values


def sample(row: Row, values: Mapping[str, Any], which: slice) -> dict[str, Any]:
    """The arguments for some samples, in the storage of the row's variant."""
    batched = ("feature_map", "h", "a")
    chosen = {}
    for name, value in values.items():
        if name not in batched:
            chosen[name] = value
        elif name == "feature_map" and value.is_contiguous(memory_format=torch.channels_last):
            chosen[name] = value[which].clone(memory_format=torch.channels_last)
        else:
            chosen[name] = value[which].clone()
    if row.variant in STORAGES:
        name, change = STORAGES[row.variant]
        chosen[name] = change(chosen[name])
    return chosen


def all_rows() -> list[Row]:
    """Every row, the fastest kernels first."""
    return [*_pool_rows(), *_head_rows(), *_projection_rows(), *_score_rows()]


def _pool_rows() -> Iterator[Row]:
    for dtype in _DTYPES:
        for workload in (_EDGES, _EVEN, _TOKENS):
            yield Row(Case("pool_nap", workload, dtype, samples=5))
        yield Row(Case("pool_nap", _EVEN, dtype, "channels_last", samples=5))
        for variant in ("padded", "offset", "transposed", "samples last"):
            yield Row(Case("pool_nap", _EDGES, dtype, samples=3), variant)
        yield Row(Case("pool_statistics", _EDGES, dtype, samples=3))
    yield Row(Case("pool_statistics", _EVEN, _BF16, "channels_last", samples=3))
    yield Row(Case("pool_nap", _EDGES, _FP32, samples=3), "rectified")
    yield Row(Case("pool_nap", _EDGES, _FP32, samples=3), "mean + eps = 0")
    yield Row(Case("pool_nap", _EDGES, _FP32, "channels_last", samples=3), "mean + eps = 0")


def _head_rows() -> Iterator[Row]:
    head = Case("masked_energy", _EDGES, samples=19)
    for dtype, precision in itertools.product(_DTYPES, PRECISIONS):
        if dtype in (_FP32, _OWN.get(precision, _BF16)):
            yield Row(head._replace(dtype=dtype, precision=precision))
    for precision in PRECISIONS:
        yield Row(head._replace(workload=_FEW, precision=precision, mask="none", samples=3))
        # Rows of whole vectors.
        yield Row(head._replace(workload=_EVEN, precision=precision, mask="bytes"))
    for variant in ("weight transposed", "weight offset", "features transposed"):
        yield Row(head, variant)
        yield Row(head._replace(dtype=_BF16, precision="bf16"), variant)


def _projection_rows() -> Iterator[Row]:
    for function in ("project_dual", "project_explicit", "project_factored"):
        # An explicit basis is slow: it has C · D · K elements.
        classes = 19 if function == "project_explicit" else 37
        case = Case(function, _EVEN._replace(classes=classes), samples=19)
        for precision in PRECISIONS:
            yield Row(case._replace(workload=_EDGES._replace(classes=classes), precision=precision))
            yield Row(case._replace(dtype=_OWN.get(precision, _FP32), precision=precision))
    stored = (("project_dual", "VARIANT", "stored"),)
    for precision in PRECISIONS:
        yield Row(Case("project_dual", _EDGES, precision=precision, samples=19, forced=stored))
    for precision in ("ieee", "bf16"):
        yield Row(Case("project_dual", _EDGES, precision=precision, samples=19, shifted=False))
        yield Row(Case("project_factored", _EDGES, precision=precision, samples=19), "class factors transposed")
    yield Row(Case("project_factored", _PACKED, samples=19), "class factors offset")


def _score_rows() -> Iterator[Row]:
    cotangents = itertools.cycle(("energy", "predicted", "uniform", "sum_logits", "max_logit"))
    for limit, basis, precision in itertools.product((0, 1 << 20), (*BASES, None), PRECISIONS):
        dtype = _OWN.get(precision, _FP32)
        small = limit > 0
        case = Case(
            "score", _FEW if small else _EDGES, dtype, "rows", precision, basis=basis, samples=7 if small else 19
        )
        case = case._replace(cotangent=next(cotangents), forced=(("score", "LIMIT_KIB", limit),))
        yield Row(case._replace(layout="channels_last") if precision in ("ieee", "fp16") else case)
    for name in ("padded", "rectified"):
        yield Row(Case("score", _FEW, _FP32, samples=5, forced=(("score", "LIMIT_KIB", 0),)), name)
