"""What a model consisted of when it was fitted, to notice later changes without reading its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Seal"]

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed 64-bit integer
_CHUNK = 2**20
# Not int64 for 8 bytes: two changed signs, of weight 2^63 each, would cancel.
_INTEGERS = {8: torch.int32, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Seal:
    """Modules, parameters and floating-point buffers of a model, by identity, in-place version and content.

    A model moved to another device or dtype, or loaded with the same weights again, counts as unchanged.

    Args:
        model: the model, whose modules may be replaced later.
        twins: modules that share parameters and buffers with it, including unregistered ones.
    """

    def __init__(self, model: nn.Module, twins: dict[str, nn.Module]) -> None:
        self._tables: list[tuple[str, dict[str, Any]]] = [(name, one._modules) for name, one in model.named_modules()]
        for name, twin in twins.items():
            self._tables += [(name, twin._parameters), (name, twin._buffers)]
        self._tables = [(name, table) for name, table in self._tables if table]
        self._take()

    def _take(self) -> None:
        self._dicts = [table for _, table in self._tables]
        self._values = self._now()
        self._ids = [id(value) for value in self._values.values()]
        # Whole numbers too: batch norm counts its batches, but updates its statistics without a new version.
        self._tensors = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
        self._versions = self._versions_now()
        self._contents = {
            name: (value.dtype, _content(value)) for name, value in self._tensors.items() if _counts(value)
        }

    def _now(self) -> dict[str, Any]:
        return {f"{name}.{key}".lstrip("."): value for name, table in self._tables for key, value in table.items()}

    def _versions_now(self) -> list[int]:
        try:
            return [tensor._version for tensor in self._tensors.values()]
        except RuntimeError:  # inference tensors have no version
            return [0 if tensor.is_inference() else tensor._version for tensor in self._tensors.values()]

    def change(self, *, thorough: bool = False) -> str | None:
        """The first module or tensor that is not what it was; None if all are. Reads weights only where something happened.

        Args:
            thorough: compare the contents of all tensors, and so find assignments to `.data` as well.
        """
        same = [id(value) for table in self._dicts for value in table.values()] == self._ids
        if same and not thorough and self._versions_now() == self._versions:
            return None
        now = self._now()
        for name in [*self._values, *now]:
            if self._differs(name, self._values.get(name), now.get(name)):
                return name
        self._take()
        return None

    def _differs(self, name: str, before: Any, after: Any) -> bool:
        if not _counts(before) or not _counts(after):
            return before is not after and not (isinstance(before, Tensor) and isinstance(after, Tensor))
        dtype, content = self._contents[name]
        if after.dtype == dtype:
            return _content(after) != content
        # Converted: buffers are replaced, the values of parameters are, which leaves nothing to compare with.
        return before is not after and not (before.shape == after.shape and torch.equal(before.to(after), after))


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, and Σ bits_i · (2i + 1)·φ in wrapping 64-bit integers, which any change of one value alters."""
    try:
        flat = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    except (RuntimeError, NotImplementedError, TypeError):  # tensor subclasses, such as sharded and quantised ones
        return tuple(tensor.shape), None if tensor.is_inference() else tensor._version
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + len(part), device=flat.device)
        total += (part * ((2 * position + 1) * _GOLDEN)).sum()
    return tuple(tensor.shape), int(total)
