"""Cost model: the faster of a basis and its explicit form, for a batch within a memory budget."""

from __future__ import annotations

from typing import NamedTuple

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from ..errors import InputError

__all__ = ["Cost", "Plan", "matrix_elements", "plan"]

# Peak flops per second in fp32 matrix products, and bandwidth in bytes per second. Orders of magnitude, chosen here: only their
# ratio matters, and little if one basis needs many times the flops of another.
_RATES = {"cpu": (1e11, 1e10), "cuda": (5e13, 2e12)}

# Passes of plain torch over intermediate results, measured by benchmarks/fitting.py; GPU kernels keep them on chip.
_PASSES = {"cpu": 4, "cuda": 0}

# Chunk size of the explicit basis' [N, K, D̃] in plain torch.
_BLOCK = 4 * 2**20

_DEFAULT_BUDGET = {"cpu": 4 * 2**30, "cuda": 2 * 2**30}


class Cost(NamedTuple):
    """Cost of one basis for a batch of `samples`.

    Attributes:
        form: "dual", "explicit" or "factored".
        flops: floating-point operations per batch.
        bytes: size of the basis, read once per batch.
        workspace: bytes of the largest intermediate result of a batch.
        seconds: max(flops / rate, bytes / bandwidth), on a CPU plus four passes over intermediate results (the Gram matrix
            [N, n]; [N, K, D̃] or [N, K, Q]); an estimate for comparison, not a prediction.
        fits: whether basis and workspace fit the budget.
    """

    form: str
    flops: int
    bytes: int
    workspace: int
    seconds: float
    fits: bool


class Plan(NamedTuple):
    """The candidate bases, cheapest first, and the selected one.

    Attributes:
        choice: the cheapest basis within the budget; the smallest if all are beyond it.
        costs: all candidates, by estimated time.
        samples: batch size N of the comparison.
    """

    choice: str
    costs: tuple[Cost, ...]
    samples: int


def matrix_elements(tensors: ok.BasisTensors) -> int:
    """Numbers of all matrices of a basis; a projection multiplies each of them once per sample."""
    return sum(part.numel() for part in tensors.parts() if part is not None and part.ndim > 1)


def plan(basis: HasBasisTensors, *, samples: int = 64, budget: int | None = None) -> Plan:
    """Compare a fitted basis with the same subspace as explicit vectors, on its device.

    dual: 2 N (n (C + D + K) + C K) flops, n (C + D + K) + C K numbers. explicit: 2 N K C D̃ flops, K C D̃ numbers.
    factored: 2 N (C R + D̃ Q + K R Q) flops, as many numbers.

    Args:
        basis: the fitted basis.
        samples: N, of a typical batch.
        budget: bytes for basis and workspace; None: 4 GiB on a CPU, 2 GiB on a GPU (chosen here).

    Raises:
        InputError: fewer than 1 sample.
    """
    if samples < 1:
        raise InputError(f"samples={samples!r}: expected a whole number of at least 1")
    tensors = basis.tensors()
    classes, features = tensors.check()
    components, width = tensors.n_components, features + tensors.bias
    kind = "cpu" if tensors.constants.device.type == "cpu" else "cuda"
    budget = _DEFAULT_BUDGET[kind] if budget is None else budget
    rate, bandwidth = _RATES[kind]
    # Form → (numbers of its matrices, numbers of its intermediate result).
    sizes = {"explicit": (components * classes * width, samples * components * width)}
    if isinstance(tensors, ok.DualTensors):
        sizes["dual"] = matrix_elements(tensors), samples * len(tensors.anchor_features)
    if isinstance(tensors, ok.FactoredTensors):
        sizes["factored"] = matrix_elements(tensors), samples * components * tensors.core.shape[2]
    costs = []
    for form, (numbers, made) in sizes.items():
        flops, size = 2 * samples * numbers, tensors.constants.element_size() * numbers
        seconds = max(flops / rate, size / bandwidth) + 4 * _PASSES[kind] * made / bandwidth
        workspace = 4 * (made if form == "dual" else min(made, max(_BLOCK, samples * width)))
        costs.append(Cost(form, flops, size, workspace, seconds, size + workspace <= budget))
    costs.sort(key=lambda cost: (cost.seconds, cost.bytes))
    fitting = [cost for cost in costs if cost.fits] or [min(costs, key=lambda cost: cost.bytes)]
    return Plan(fitting[0].form, tuple(costs), samples)
