"""A module whose fitted state is its buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotFittedError

__all__ = ["FittedModule", "aligned"]

_ALIGNMENT = 64
"""Bytes: a cache line, and what torch's CPU allocator keeps to."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, row-major and on an address that is a multiple of 64 bytes: itself where it is so, else a copy.

    BLAS takes other paths, which round differently, for column-major or unaligned operands, and a tensor out of a file starts
    where the file's header ends.
    """
    contiguous = tensor.contiguous()
    return contiguous.clone() if contiguous.data_ptr() % _ALIGNMENT else contiguous


class FittedModule(nn.Module):
    """An nn.Module with buffers that are empty until fitted.

    They move with `.to(device)`, keep their dtype under `.half()`, `.to(dtype)` and the like (a fitted mask or covariance in half
    precision would be another one), and `load_state_dict` fills them in a module that was never fitted. Fitted or loaded, they lie
    row-major and aligned, so that both score alike to the last bit.
    """

    _place: Tensor

    def __init__(self, *fitted: str) -> None:
        super().__init__()
        self._fitted_names = fitted
        # Remembers the device of a module that has no other buffer yet.
        self.register_buffer("_place", torch.empty(0), persistent=False)
        for name in fitted:
            self.register_buffer(name, None)

    @property
    def is_fitted(self) -> bool:
        """Whether every fitted buffer, here and in parts that are fitted modules themselves, is there."""
        own = all(self._buffers[name] is not None for name in self._fitted_names)
        return own and all(child.is_fitted for child in self.children() if isinstance(child, FittedModule))

    def set_fitted(self, **values: Tensor) -> None:
        """Set fitted buffers, detached, on this module's device, as `aligned`."""
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
        for name in self._fitted_names:
            value = state_dict.get(prefix + name)
            if value is not None:
                self._buffers[name] = torch.empty_like(value, device=self._place.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, loaded in self._buffers.items():
            self._buffers[name] = None if loaded is None else aligned(loaded)
