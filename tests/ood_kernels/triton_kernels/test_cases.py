from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest
import torch

from ood_kernels import cases, triton_kernels, tune
from ood_kernels.triton_kernels import launch
from ood_kernels.workloads import WORKLOADS

# The interpreter computes what a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# Every way that a case can be called, at sizes that the interpreter can do.
SMALL = dict.fromkeys(
    case._replace(workload=WORKLOADS["tiny"], samples=3)
    for case in cases.all_cases()
    if case.workload.name in ("R50", "tiny")
)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_what_is_tuned_equals_the_reference(case, device):
    torch.manual_seed(0)
    values = cases.operands(case, device)
    with launch.forced(cases.forced_by(case)):
        ours = tune.tensors_of(cases.run(case, values))
    truth = tune.tensors_of(cases.run_reference(case, values))
    assert tune.is_close(ours, truth, tune.TOLERANCES[case.precision])


def test_the_cases_launch_every_kernel():
    modules = [
        import_module(f"{triton_kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    defined = {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    launched = set()
    for case in cases.all_cases():
        with launch.record() as launches, launch.forced(cases.forced_by(case)):
            cases.run(case, cases.operands(case, torch.device("meta")))
        assert launches, case
        launched |= {(one.kernel.fn.__module__, one.kernel.fn.__name__) for one in launches}
    assert launched == defined
