"""A module whose fitted state is its buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import NotFittedError

__all__ = ["FittedModule", "aligned"]

_ALIGNMENT = 64
"""Bytes: a cache line, and the alignment of torch's CPU allocator."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor row-major at a 64-byte aligned address, copied only if necessary.

    BLAS takes other paths, which round differently, for column-major or unaligned operands; a tensor read from a file starts
    right after the header.
    """
    contiguous = tensor.contiguous()
    return contiguous.clone() if contiguous.data_ptr() % _ALIGNMENT else contiguous


class FittedModule(nn.Module):
    """An nn.Module with buffers that are empty until fitted.

    They move with `.to(device)` but keep their dtype under `.half()`, `.to(dtype)` and the like, since half precision would alter
    a fitted mask or covariance. `load_state_dict` also fills an unfitted module. Fitted or loaded, buffers are row-major and
    aligned, for bitwise equal scores.

    Args:
        fitted: names of the buffers that every fit sets.
    """

    _place: Tensor
    _optional_names: ClassVar[tuple[str, ...]] = ()
    """Buffers that only some fits set; None otherwise."""

    def __init__(self, *fitted: str) -> None:
        super().__init__()
        self._fitted_names = fitted
        # Tracks the device of a module without other buffers.
        self.register_buffer("_place", torch.empty(0, device="cpu"), persistent=False)
        for name in (*fitted, *self._optional_names):
            self.register_buffer(name, None)

    @property
    def is_fitted(self) -> bool:
        """Whether all fitted buffers are set, here and in fitted submodules."""
        own = all(self._buffers[name] is not None for name in self._fitted_names)
        return own and all(child.is_fitted for child in self.children() if isinstance(child, FittedModule))

    def set_fitted(self, **values: Tensor) -> None:
        """Set fitted buffers, detached, `aligned` and on this module's device."""
        for name, value in values.items():
            self._buffers[name] = aligned(value.detach().to(self._place.device))

    def fitted(self, name: str) -> Tensor:
        """A fitted buffer.

        Raises:
            NotFittedError: it has not been fitted or loaded.
        """
        value = self._buffers[name]
        if value is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted: call engine.fit(loader) or load a state first")
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FittedModule:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in (*self._fitted_names, *self._optional_names):
            value = state_dict.get(prefix + name)
            if value is not None:
                self._buffers[name] = torch.empty_like(value, device=self._place.device)
            elif name in self._optional_names:
                self._buffers[name] = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, loaded in self._buffers.items():
            self._buffers[name] = None if loaded is None else aligned(loaded)
