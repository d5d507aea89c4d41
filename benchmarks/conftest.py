"""The pytest-benchmark suite: `pytest benchmarks/bench_activation.py`, a file a subject, a test a case and provider.

The cases are those of `ood-engine bench`, which measures them in turns, beside their limits and with their memory; here
pytest-benchmark times one after the other, with warm caches, for its own tables, files and comparisons.
`OOD_ENGINE_BENCH_EFFORT=full` takes all sizes, else the quick ones. Operands are made at collection already, for a case does not
know its providers before.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

from ood_engine.bench.cases import Case, Plan, Provider
from ood_engine.bench.runner import held_to_truth
from ood_engine.bench.suite import effort_for

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Measured:
    """A provider of a case, held to the truth and handed to pytest-benchmark."""

    _built: tuple[Plan, Case] | None = None

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.name = plan, name

    def __call__(self, benchmark: Any) -> None:
        case = self._case()
        provider = next(provider for provider in case.providers if provider.name == self.name)
        fields = held_to_truth(provider, case)
        benchmark.group = str(self.plan)
        benchmark.extra_info.update(fields, workload=self.plan.workload, **self.plan.sizes)
        benchmark(_waiting(provider) if _DEVICE.type == "cuda" else provider.call)

    def _case(self) -> Case:
        """The operands of one case at a time."""
        if Measured._built is None or Measured._built[0] is not self.plan:
            Measured._built = None
            gc.collect()
            Measured._built = self.plan, self.plan.build()
        return Measured._built[1]


def _waiting(provider: Provider) -> Any:
    def call() -> None:
        provider.call()
        torch.cuda.synchronize()

    return call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every provider of every case of the module's `plans`."""
    if "measured" not in metafunc.fixturenames:
        return
    effort = effort_for(os.environ.get("OOD_ENGINE_BENCH_EFFORT", "quick") != "full", _DEVICE)
    # Cases that differ in the state of the caches alone are one here.
    plans = {str(plan): plan for plan in metafunc.module.plans(effort)}
    found = [
        pytest.param(Measured(plan, provider.name), id=f"{plan}, {provider.name}")
        for plan in plans.values()
        for provider in plan.build().providers
    ]
    metafunc.parametrize("measured", found)
