"""Backend selection: Triton kernels or plain torch.

torch's dispatcher has already dispatched on the device; this adds the caller's argument `backend`, the environment variable
`OOD_ENGINE_BACKEND`, and whether Triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["BACKENDS", "default_backend", "is_eager_on_gpu", "kernels"]

BACKENDS = ("reference", "triton")
_VARIABLE = "OOD_ENGINE_BACKEND"


def default_backend() -> str:
    """The environment variable; "" where it is not set."""
    return os.environ.get(_VARIABLE, "")


def is_eager_on_gpu(tensor: Tensor) -> bool:
    """Whether an operator on this tensor runs kernels at once, untraced and under no mode of torch's."""
    return (
        tensor.is_cuda
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def kernels(family: str, tensor: Tensor, requested: str, *, preferred: bool) -> ModuleType | None:
    """The module of a Triton kernel family, or None for plain torch.

    Args:
        family: name of a module in `ood_kernels.triton_kernels`.
        tensor: one of the arguments.
        requested: "reference", "triton", or "" for the environment variable and then `preferred`.
        preferred: whether Triton is the default without a request.

    Raises:
        ValueError: unknown backend.
        RuntimeError: Triton was requested but is unavailable.
    """
    source, name = ("backend", requested) if requested else (_VARIABLE, os.environ.get(_VARIABLE, ""))
    if name and name not in BACKENDS:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(BACKENDS)}")
    if name == "reference" or (not name and not preferred):
        return None
    if not _is_installed():
        if not name:
            _warn_once()
            return None
        raise RuntimeError(f"{source}='triton': Triton is not installed; pip install triton, or use 'reference'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise RuntimeError(
            f"{source}='triton' for a tensor on {tensor.device}: Triton needs a GPU; to interpret its kernels on the CPU, set"
            " TRITON_INTERPRET=1 before starting Python"
        )
    return importlib.import_module(f"{__package__}.triton_kernels.{family}")


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _warn_once() -> None:
    warnings.warn(
        "Triton is not installed; falling back to plain torch on the GPU, which is slower and takes more memory; pip install"
        " triton, or set OOD_ENGINE_BACKEND=reference to silence this warning",
        RuntimeWarning,
        stacklevel=3,
    )
