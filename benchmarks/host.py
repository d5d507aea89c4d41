"""What does a call cost on the host, in time and Python calls, by a prepared plan and as written? No GPU is needed.

    python -m benchmarks.host [NAME ...] [--quick] [--json]

A driver that stands for a GPU's compiles for sm_90 and launches nothing: what is left is the host's work, Triton's launcher in C
excepted. Operators take CPU tensors in place of a GPU's, whose allocations may cost another time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import cases, functional
from ood_kernels.masks import unpack_mask
from ood_kernels.workloads import WORKLOADS, Workload

Call = Callable[[], object]


class NoLaunch:
    """In place of Triton's driver: the target is sm_90, kernels are not loaded, launches do nothing."""

    binary_ext = "cubin"

    def __init__(self) -> None:
        self.utils, self.launcher_cls = self, lambda source, metadata: lambda *arguments: None

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """(module, function, registers, spills, threads)."""
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Those of an H100 that are asked for."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        return

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def calls(workload: Workload, samples: int) -> Iterator[tuple[str, Call]]:
    """(name, call) of the operators, with the operands of a fitted engine in bf16."""

    def given(function: str, **changes: Any) -> dict[str, Any]:
        case = cases.Case(function, workload, torch.bfloat16, "channels_last", "bf16", samples=samples, **changes)
        return cases.operands(case, torch.device("cpu"))

    options: dict[str, Any] = {"precision": "bf16", "backend": "triton"}
    for basis in (None, "dual", "explicit", "factored"):
        own = given("score", basis=basis)
        # Packed masks of weights are for users too, those of neurons are not.
        neuron_mask = unpack_mask(own["neuron_mask"], workload.channels)
        head = ok.Head(own["weight"], own["bias"], own["weight_mask"], neuron_mask)
        yield f"score, {basis or 'no'} basis", partial(ok.score, own["feature_map"], head, own["basis"], **options)
    feature_map = own["feature_map"]
    yield "pool_nap", partial(ok.pool_nap, feature_map, backend="triton")
    h = given("masked_energy")["h"].float()
    yield "masked_energy", partial(ok.masked_energy, h, *head, **options)
    projection = given("project_dual")
    p = projection["a"].float()
    yield "project_gradients, dual basis", partial(ok.project_gradients, p, h, projection["basis"], **options)


@contextmanager
def without_gpu(planned: bool) -> Iterator[None]:
    """Let operators take CPU tensors as a GPU's, by plans or as written."""

    def kernels(family: str, *_: Any, **__: Any) -> ModuleType:
        return import_module(f"ood_kernels.triton_kernels.{family}")

    def is_eager_on_gpu(_: Tensor) -> bool:
        return planned

    with (
        mock.patch("ood_kernels.backend.kernels", kernels),
        mock.patch.object(functional, "is_eager_on_gpu", is_eager_on_gpu),
    ):
        yield


def measured(call: Call, rounds: int, repeats: int) -> dict[str, float]:
    """Minimum and median CPU time in µs of `rounds` loops, and the number of Python calls."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - began) / repeats * 1e6)
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {"minimum_us": min(times), "median_us": statistics.median(times), "python_calls": count}


def main(arguments: list[str] | None = None) -> int:
    """Print a row for every call, with and without a plan."""
    parser = argparse.ArgumentParser("python -m benchmarks.host", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only calls whose name contains it, such as 'dual'")
    parser.add_argument("--quick", action="store_true", help="tiny operands and few repeats")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("expected a machine without a GPU, and TRITON_INTERPRET unset: a stub takes the driver's place")
    from triton.runtime.driver import driver

    driver.set_active(NoLaunch())
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, call in calls(WORKLOADS["tiny" if options.quick else "R50"], samples=8):
        if options.names and not any(word in name for word in options.names):
            continue
        for way, planned in (("as written", False), ("plan", True)):
            with without_gpu(planned):
                rows.append({"call": name, "way": way, **measured(call, *((3, 20) if options.quick else (9, 300)))})
            if not options.json:
                print(
                    "{call:32}{way:12}{minimum_us:8.1f} µs (median {median_us:.1f}){python_calls:6} calls".format(
                        **rows[-1]
                    )
                )
    if options.json:
        print(json.dumps({"triton": import_module("triton").__version__, "torch": torch.__version__, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
