"""Launches as compiled code: compiled for a GPU that is absent, and run by `ptx_emulator`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from ptx_emulator import Kernel, Report

from ..aot.compiled import TARGETS, Job, specialise
from ..triton_kernels.launch import Launch

__all__ = ["Executor"]


class Executor:
    """Compiles each launch it is called with for a target, and runs it; for `launch.executed_by`.

    Args:
        target: NVIDIA target, a key of `aot.compiled.TARGETS`.

    Attributes:
        reports: of the launches so far.
        order: shuffles the CTAs of each launch; None for their order in the grid.
    """

    def __init__(self, target: str = "sm_90") -> None:
        self.reports: list[Report] = []
        self.order: np.random.Generator | None = None
        self._target = target
        self._kernels: dict[str, Kernel] = {}

    def __call__(self, launch: Launch) -> None:
        """Run one launch."""
        job = specialise(launch, self._target)
        key = repr(job)
        if key not in self._kernels:
            self._kernels[key] = Kernel.of_triton(_compiled(job))
        names = [name for name, kind in job.signature.items() if kind != "constexpr"]
        values = [launch.arguments[name] for name in names]
        # A pointer that is None is a constant, other types are numbers already.
        arguments = [value if isinstance(value, (Tensor, float)) else int(value) for value in values]
        self.reports.append(self._kernels[key].run(launch.grid, arguments, names=names, order=self.order))


def _compiled(job: Job) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    backend, arch, warp_size, _ = TARGETS[job.target]
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=job.options)
