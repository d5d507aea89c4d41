"""Cost model: the fastest basis of a subspace for a batch within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from ..errors import InputError

__all__ = ["FORMS", "Cost", "Machine", "Plan", "plan", "plan_of"]

FORMS = ("dual", "explicit", "factored")


class Machine(NamedTuple):
    """Peak rates of a device: `flops` per second in fp32 matrix products, and `bandwidth` in bytes per second."""

    flops: float
    bandwidth: float


# Orders of magnitude, chosen here: only their ratio matters, and little if one basis needs many times the flops of another.
MACHINES = {"cpu": Machine(1e11, 1e10), "cuda": Machine(5e13, 2e12)}

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
        choice: the cheapest basis within the budget.
        costs: all candidates, by estimated time.
        samples: batch size N of the comparison.
        budget: limit of basis and workspace in bytes.
        device: "cpu" or "cuda".
    """

    choice: str
    costs: tuple[Cost, ...]
    samples: int
    budget: int
    device: str

    def __str__(self) -> str:
        """One line per basis."""
        lines = [
            f"{'→' if cost.form == self.choice else ' '} {cost.form:<9} {cost.flops / 1e6:12.1f} MFLOP"
            f" {cost.bytes / 2**20:10.1f} MiB {cost.workspace / 2**20:8.1f} MiB workspace"
            f" {cost.seconds * 1e3:10.3f} ms{'' if cost.fits else '  beyond the budget'}"
            for cost in self.costs
        ]
        head = f"a batch of {self.samples} on {self.device}, at most {self.budget / 2**20:.0f} MiB:"
        return "\n".join([head, *lines])


def plan(
    *,
    samples: int,
    anchors: int,
    classes: int,
    features: int,
    components: int,
    ranks: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    budget: int | None = None,
    machine: Machine | None = None,
    forms: Sequence[str] = FORMS,
    itemsize: int = 4,
) -> Plan:
    """Compare the bases of one PCA subspace.

    dual: 2 N (n (C + D̃ + K) + C K) flops, n (C + D̃ + K) + C K numbers. explicit: 2 N K C D̃ flops, K C D̃ numbers.
    factored: 2 N (C R + D̃ Q + K R Q) flops, as many numbers.

    Args:
        samples: N, of a typical batch.
        anchors: n.
        classes: C.
        features: D̃, including one for the bias.
        components: K.
        ranks: (R, Q) of the factored basis; None excludes it.
        device: "cpu" or "cuda".
        budget: bytes for basis and workspace; None: 4 GiB on a CPU, 2 GiB on a GPU (chosen here).
        machine: peak rates; None: orders of magnitude for the device (chosen here).
        forms: candidates.
        itemsize: bytes per number of the basis.

    Raises:
        InputError: a size below 1, an unknown basis, or no basis within the budget.
    """
    sizes = {"samples": samples, "anchors": anchors, "classes": classes, "features": features, "components": components}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}={value!r}: expected a whole number of at least 1")
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise InputError(f"basis {unknown[0]!r}: expected one of {', '.join(FORMS)}")
    kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
    budget = _DEFAULT_BUDGET[kind] if budget is None else budget
    rates = machine or MACHINES[kind]
    numbers = {
        "dual": anchors * (classes + features + components) + classes * components,
        "explicit": components * classes * features,
    }
    made = {"dual": samples * anchors, "explicit": samples * components * features}
    if ranks is not None:
        numbers["factored"] = classes * ranks[0] + features * ranks[1] + components * ranks[0] * ranks[1]
        made["factored"] = samples * components * ranks[1]
    costs = []
    for form in (form for form in forms if form in numbers):
        flops, size = 2 * samples * numbers[form], itemsize * numbers[form]
        seconds = max(flops / rates.flops, size / rates.bandwidth) + 4 * _PASSES[kind] * made[form] / rates.bandwidth
        workspace = 4 * (made[form] if form == "dual" else min(made[form], max(_BLOCK, samples * features)))
        costs.append(Cost(form, flops, size, workspace, seconds, size + workspace <= budget))
    costs.sort(key=lambda cost: (cost.seconds, cost.bytes))
    fitting = [cost for cost in costs if cost.fits]
    if not fitting:
        smallest = min(costs, key=lambda cost: cost.bytes)
        raise InputError(
            f"no basis of the subspace fits {budget / 2**20:.0f} MiB: the smallest, {smallest.form}, takes"
            f" {(smallest.bytes + smallest.workspace) / 2**20:.0f} MiB; raise the budget, or use fewer anchors or components"
        )
    return Plan(fitting[0].form, tuple(costs), samples, budget, kind)


def plan_of(basis: HasBasisTensors, *, samples: int, budget: int | None = None) -> Plan:
    """Compare a fitted basis with the alternative bases of its subspace, on its device; see `plan`."""
    tensors = basis.tensors()
    classes, features = tensors.check()
    return plan(
        samples=samples,
        anchors=len(tensors.anchor_features) if isinstance(tensors, ok.DualTensors) else 1,
        classes=classes,
        features=features + tensors.bias,
        components=len(tensors.constants),
        ranks=(tensors.core.shape[1], tensors.core.shape[2]) if isinstance(tensors, ok.FactoredTensors) else None,
        device=tensors.constants.device,
        budget=budget,
        forms=list({"explicit": None, tensors.kind: None}),
        itemsize=tensors.constants.element_size(),
    )
