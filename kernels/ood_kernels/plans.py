"""Prepared plans: the launches of one call, repeated for later calls of the same kind without the host's work on them.

The first call runs as written, under a recorder of its launches and allocations. A later one differs in addresses alone: those of
the inputs that move, of its outputs, which own their memory, and of its workspace, which is one allocation. A plan has everything
else: grids, compiled kernels and all other arguments, in the order of the kernel. It is found by the layout of the moving inputs,
by layout and address of the kept ones (head, masks, basis) and by the options; it holds no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .triton_kernels.launch import Launch, arguments_in_order, is_watched, record

__all__ = ["Plan", "planned"]

_ALIGNMENT = 256
"""Bytes, at least as torch aligns what it allocates: kernels compiled for that fit every part of the workspace."""
_MOST = 256
"""Plans held; the oldest go first."""
_ALLOCATIONS = {"new_empty", "empty", "empty_like", "empty_strided"}


class Step(NamedTuple):
    """One launch.

    Attributes:
        run: the compiled kernel on its grid.
        arguments: in the kernel's order; those at `moving` are replaced.
        moving: (place among the arguments, index of the source, bytes from its start) of these addresses.
    """

    run: Callable[..., Any]
    arguments: list[Any]
    moving: list[tuple[int, int, int]]


class Plan(NamedTuple):
    """Launches of a call; sources of addresses are its moving inputs, its outputs, then the workspace.

    Attributes:
        steps: the launches.
        outputs: (shape, dtype) of every output.
        workspace: bytes of it.
    """

    steps: list[Step]
    outputs: list[tuple[tuple[int, ...], torch.dtype]]
    workspace: int

    def __call__(self, moving: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Launch on the current stream of the current device, which is the inputs'."""
        new_empty = moving[0].new_empty
        outputs = [new_empty(shape, dtype=dtype) for shape, dtype in self.outputs]
        workspace = new_empty(self.workspace, dtype=torch.uint8)
        sources = [tensor.data_ptr() for tensor in (*moving, *outputs, workspace)]
        for run, arguments, places in self.steps:
            own = arguments.copy()
            for place, source, offset in places:
                own[place] = sources[source] + offset
            run(*own)
        return tuple(outputs)


_UNKNOWN = Plan([], [], 0)


class _Recorder(TorchDispatchMode):
    """Knows every storage that a call reads or writes: those of its inputs, and those it allocates.

    Attributes:
        allocated: storage → tensor as allocated.
        is_pure: whether torch computed nothing, not even a copy, which every call would have to make anew.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.allocated: dict[int, Tensor] = {}
        self.known = {0, *map(_storage, inputs)}
        self.is_pure = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and _storage(result) not in self.known:
            self.is_pure &= func.overloadpacket.__name__ in _ALLOCATIONS
            self.allocated[_storage(result)] = result
            self.known.add(_storage(result))
        return result


_PLANS: dict[Hashable, Plan | None] = {}


def planned(
    call: Callable[[], Sequence[Tensor]], moving: Sequence[Tensor], kept: Sequence[Tensor], options: Hashable
) -> Sequence[Tensor]:
    """The results of a call that launches kernels: by its plan, where there is one and nobody watches its launches.

    Args:
        call: the call as written, which depends on these inputs and options alone.
        moving: inputs that differ from call to call.
        kept: inputs that stay.
        options: everything else that the call depends on.
    """
    if is_watched():
        return call()
    device = moving[0].get_device()
    key = (options, device, *[(one.shape, one.stride(), one.dtype, one.data_ptr() % 16) for one in moving])
    key += tuple([(one.data_ptr(), one.shape, one.stride(), one.dtype) for one in kept])
    plan = _PLANS.get(key, _UNKNOWN)
    if plan is None:
        return call()
    if plan is not _UNKNOWN:
        # Triton launches on the current device, possibly not the inputs'.
        if device < 0 or device == torch.cuda.current_device():
            return plan(moving)
        with torch.cuda.device(device):
            return plan(moving)
    with _Recorder((*moving, *kept)) as recorder, record() as launches:
        results = call()
    if len(_PLANS) >= _MOST:
        # A copy, since other threads may add plans.
        oldest, *_ = tuple(_PLANS)
        _PLANS.pop(oldest, None)
    _PLANS[key] = _plan(moving, kept, results, launches, recorder)
    return results


def _plan(
    moving: Sequence[Tensor],
    kept: Sequence[Tensor],
    results: Sequence[Tensor],
    launches: Sequence[Launch],
    recorder: _Recorder,
) -> Plan | None:
    """The plan of a recorded call; None if it has to run as written: without compiled kernels, or with copies made by torch."""
    sources = [(_storage(tensor), source, tensor.data_ptr()) for source, tensor in enumerate((*moving, *results))]
    starts = {storage: (source, start) for storage, source, start in sources if storage}
    fixed = {0, *map(_storage, kept)}
    are_apart = len(starts) == len([storage for storage, *_ in sources if storage]) and not fixed & starts.keys()
    are_whole = all(
        not one.numel() or (_storage(one) in recorder.allocated and one.nbytes == one.untyped_storage().nbytes())
        for one in results
    )
    is_compiled = all(launch.compiled is not None for launch in launches)
    if not (recorder.is_pure and are_apart and are_whole and is_compiled):
        return None
    workspace = 0
    for storage, tensor in recorder.allocated.items():
        if storage not in starts:
            starts[storage] = (len(moving) + len(results), tensor.data_ptr() - workspace)
            workspace += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
    steps = []
    for launch in launches:
        arguments = arguments_in_order(launch)
        addresses = []
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                arguments[place] = value.data_ptr()
                if _storage(value) not in fixed:
                    source, start = starts[_storage(value)]
                    addresses.append((place, source, value.data_ptr() - start))
        steps.append(Step(launch.compiled[(*launch.grid, 1, 1)[:3]], arguments, addresses))
    outputs = [(tuple(tensor.shape), tensor.dtype) for tensor in results]
    return Plan(steps, outputs, workspace)


def _storage(tensor: Tensor) -> int:
    """Address of the memory that a tensor is part of; 0 for none."""
    return tensor.untyped_storage().data_ptr()
