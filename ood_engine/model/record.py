"""Record of one forward pass: the outputs that may be feature maps, passages of pooled vectors, and calls of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layouts import LAYOUTS, layouts_of, puts_channels_first

__all__ = ["Candidate", "Head", "Passage", "Recorder", "first_argument", "is_linear"]

_UNCHANGING = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)


class Head(NamedTuple):
    """One call of a linear layer on one vector per sample; `passages` of them were recorded before it."""

    name: str
    call: int
    received: Tensor
    output: Tensor
    passages: int


class Candidate(NamedTuple):
    """One reading of a module's output as a feature map, with mean and maximum [N, D] over its positions.

    `channels_first` is what the modules that returned this shape say of it; None if they do not.
    """

    name: str
    call: int
    layout: str
    relu: bool
    mean: Tensor
    peak: Tensor
    dtype: torch.dtype
    channels_first: bool | None


class Passage(NamedTuple):
    """A module from one vector per sample to another; `shape` is what it received, without the samples."""

    name: str
    before: Tensor
    after: Tensor
    shape: tuple[int, ...]


class Recorder:
    """Records forward passes by hooks, in order of module return.

    Attributes:
        shapes: module → shape of its last floating-point output.
        received: linear layer → shape of its last input.
    """

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []
        self.passages: list[Passage] = []
        self.heads: list[Head] = []
        self.shapes: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self._calls: dict[str, int] = {}
        self._pending: list[Tensor | None] = []
        self._channels_first: dict[torch.Size, bool] = {}

    @contextmanager
    def on(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Hooks on all modules, by name."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._after, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        received = first_argument(args, kwargs)
        if is_linear(module) and isinstance(received, Tensor):
            self.received[name] = list(received.shape)
        # Copies, because the module may work in place, and the model may modify its output afterwards.
        self._pending.append(None if _as_vectors(received) is None else received.detach().clone())

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        received = self._pending.pop()
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        output = output.detach().clone()
        self.shapes[name] = list(output.shape)
        self._add_candidates(name, call, module, output)
        before, after = _as_vectors(received), _as_vectors(output)
        if received is None or before is None or after is None or len(before) != len(after):
            return
        if is_linear(module):
            self.heads.append(Head(name, call, before, after, len(self.passages)))
        if not isinstance(module, _UNCHANGING):
            self.passages.append(Passage(name, before, after, tuple(received.shape[1:])))

    def _add_candidates(self, name: str, call: int, module: nn.Module, output: Tensor) -> None:
        known = puts_channels_first(module)
        if known is not None:
            self._channels_first[output.shape] = known
        known = self._channels_first.get(output.shape)
        layouts = layouts_of(output)
        dtype = torch.promote_types(output.dtype, torch.float32)
        rectified = output.relu() if layouts and output.amin() < 0 else None
        for layout in layouts:
            feature_map = LAYOUTS[layout](output)
            peak = feature_map.amax((2, 3)).to(dtype)
            if rectified is not None:
                mean = LAYOUTS[layout](rectified).mean((2, 3), dtype=dtype)
                self.candidates.append(Candidate(name, call, layout, True, mean, peak.relu(), output.dtype, known))
            mean = feature_map.mean((2, 3), dtype=dtype)
            self.candidates.append(Candidate(name, call, layout, False, mean, peak, output.dtype, known))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear, or a convolution that is one where it is called on a single position."""
    if isinstance(module, nn.modules.conv._ConvNd):
        is_plain = (
            not module.transposed and module.groups == 1 and module.padding in ((0,) * 3, (0,) * 2, (0,), "valid")
        )
        return is_plain and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a module call, positional or keyword; None without arguments."""
    return next(iter((*args, *kwargs.values())), None)


def _as_vectors(tensor: Any) -> Tensor | None:
    """One vector per sample, such as [N, D], [N, D, 1, 1] or [N, 1, D], as [N, D]; None for anything else."""
    if not isinstance(tensor, Tensor) or tensor.ndim < 2 or not tensor.is_floating_point():
        return None
    return tensor.flatten(1) if sum(size > 1 for size in tensor.shape[1:]) <= 1 else None
