"""Kernel launches: `launch` launches every kernel, `choose` selects its tile.

The tile determines the summation order. It therefore depends on the shape without the batch size N, so that a sample's score is
bitwise identical alone and in any batch; tuned configurations are keyed by shape too, never by N.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import PRECISIONS

__all__ = [
    "CONFIGS",
    "PRECISIONS",
    "Choice",
    "Launch",
    "arguments_in_order",
    "cdiv",
    "choose",
    "executed_by",
    "forced",
    "is_watched",
    "launch",
    "next_power_of_2",
    "record",
]

CONFIGS = Path(__file__).parent / "configs"

Setting = Mapping[str, int | str]
_BACKEND = "cuda" if torch.version.hip is None else "hip"


class Launch(NamedTuple):
    """One recorded launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        arguments: by name, including tiles, `num_warps` and `num_stages`.
        wide: whether contiguity and alignment allow 16-byte loads of the large tensors.
        compiled: the compiled kernel; None if it was recorded only, or interpreted.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    wide: bool
    compiled: Any = None


class Choice(NamedTuple):
    """One look-up by `choose` under `forced`.

    Attributes:
        family: kernel family.
        shape: key of the look-up.
        default: configuration valid on any GPU.
    """

    family: str
    shape: dict[str, int | str]
    default: dict[str, int | str]


_RECORDER: ContextVar[list[Launch] | None] = ContextVar("ood_kernels_launches", default=None)
_EXECUTOR: ContextVar[Callable[[Launch], Any] | None] = ContextVar("ood_kernels_executor", default=None)
_FORCED: ContextVar[tuple[Mapping[str, Setting], list[Choice]] | None] = ContextVar("ood_kernels_forced", default=None)


def cdiv(number: int, size: int) -> int:
    """⌈number / size⌉; Triton's own takes a microsecond on the host."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """Smallest power of two not below a positive number."""
    return 1 << (number - 1).bit_length()


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches inside the context; launches on "meta" tensors are recorded only."""
    launches: list[Launch] = []
    token = _RECORDER.set(launches)
    try:
        yield launches
    finally:
        _RECORDER.reset(token)


@contextmanager
def executed_by(execute: Callable[[Launch], Any]) -> Iterator[None]:
    """Hand the launches inside the context, but those on "meta" tensors, to a function instead of Triton.

    It returns what `plans` may launch again, as a compiled kernel of Triton's, or None.
    """
    token = _EXECUTOR.set(execute)
    try:
        yield
    finally:
        _EXECUTOR.reset(token)


@contextmanager
def forced(configs: Mapping[str, Setting]) -> Iterator[list[Choice]]:
    """Make `choose` merge these configurations over the defaults of their families, and collect its look-ups.

    For tuning and ahead-of-time checks: this GPU's tuned configurations are ignored inside the context.
    """
    choices: list[Choice] = []
    token = _FORCED.set((configs, choices))
    try:
        yield choices
    finally:
        _FORCED.reset(token)


def launch(kernel: Any, grid: Sequence[int], wide: bool = False, **arguments: Any) -> None:
    """Launch a kernel on the device and current stream of its first tensor; an empty grid is a no-op."""
    if 0 in grid:
        return
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    own = Launch(kernel, tuple(grid), arguments, wide)
    execute = _EXECUTOR.get()
    if execute is not None and not tensor.is_meta:
        own = own._replace(compiled=execute(own))
    elif not tensor.is_meta:
        # Triton launches on the current device, possibly not the tensor's.
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            own = own._replace(compiled=kernel[own.grid](**arguments_for(_BACKEND, arguments)))
    launches = _RECORDER.get()
    if launches is not None:
        launches.append(own)


def arguments_in_order(launch: Launch) -> list[Any]:
    """A launch's arguments as its compiled kernel takes them here."""
    arguments = arguments_for(_BACKEND, launch.arguments)
    return [arguments[name] for name in launch.kernel.arg_names]


def is_watched() -> bool:
    """Whether inside `record` or `forced`."""
    return _RECORDER.get() is not None or _FORCED.get() is not None


def arguments_for(backend: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments adapted to the backend, "cuda" or "hip".

    AMD's matrix cores multiply fp32 natively, which replaces "tf32x3", and its compiler has no register limit. Its warps have 64
    threads, so tiles sized by thread count (VEC elements each) take half as many warps, as do the small tiles of "tf32x3".
    `enable_fp_fusion` is explicit because its default differs between Triton versions.
    """
    if backend == "hip":
        is_split = arguments.get("PRECISION") == "tf32x3"
        exact = {"PRECISION": "ieee", "num_warps": min(4, arguments["num_warps"])} if is_split else {}
        arguments = {name: value for name, value in (arguments | exact).items() if name != "maxnreg"}
        if "VEC" in arguments:
            arguments["num_warps"] = max(1, arguments["num_warps"] // 2)
    return arguments | {"enable_fp_fusion": True}


def choose(family: str, shape: Setting, default: Setting, device: torch.device) -> dict[str, Any]:
    """The configuration of a kernel family for a shape: the nearest tuned one for this GPU, or else the default.

    Args:
        family: kernel family in configs/<device>.json.
        shape: key of the tile, such as {"layout": "rows", "spatial": 49, "channels": 2048, "itemsize": 2}; never N.
            Strings must match exactly, numbers approximately.
        default: constexpr arguments, `num_warps` and `num_stages`, valid on any GPU.
        device: the tensors' device.
    """
    forcing = _FORCED.get()
    if forcing is not None:
        configs, choices = forcing
        choices.append(Choice(family, dict(shape), dict(default)))
        return dict(default) | dict(configs.get(family, {}))
    tuned = _tuned(_device_name(device)).get(family, ()) if device.type == "cuda" else ()
    near = [row for row in tuned if alike(row["shape"], shape)]
    if not near:
        return dict(default)
    return dict(default) | min(near, key=lambda row: distance(row["shape"], shape))["config"]


def alike(tuned: Setting, shape: Setting) -> bool:
    """Whether a tuned shape matches a shape in all strings."""
    return {name: value for name, value in shape.items() if isinstance(value, str)}.items() <= tuned.items()


def distance(left: Setting, right: Setting) -> float:
    """Distance between shapes: sum of squared log-ratios of their numbers."""
    pairs = [(left.get(name, 0), value) for name, value in right.items() if not isinstance(value, str)]
    return sum(math.log((1 + int(one)) / (1 + other)) ** 2 for one, other in pairs)


@cache
def _tuned(device_name: str) -> dict[str, list[dict[str, Any]]]:
    path = CONFIGS / f"{device_name}.json"
    if not path.exists():
        return {}
    families: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["families"]
    return families


@cache
def _device_name(device: torch.device) -> str:
    return file_name(torch.cuda.get_device_name(device))


def file_name(device_name: str) -> str:
    """A GPU's name as a file name: "NVIDIA H100 80GB HBM3" → "nvidia_h100_80gb_hbm3"."""
    return "".join(letter if letter.isalnum() else "_" for letter in device_name.lower())
