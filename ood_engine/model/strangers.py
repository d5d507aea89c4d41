"""Modules of the model itself that its twin would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import TapError
from .shallow_copy import shallow_twin

__all__ = ["StrangerGuard"]


class StrangerGuard:
    """A twin, and a context for its first forward passes that refuses modules of the model itself, before they run.

    Such a module is reached through something that the twin shares with the model, such as a global variable, and would run in
    the model's mode, and change its statistics.

    Attributes:
        twin: the twin of the model.
        twins: name → every module of the twin; those that are not registered are numbered.

    Raises:
        TapError: as `shallow_twin`.
    """

    def __init__(self, model: nn.Module) -> None:
        known: dict[int, Any] = {}
        self.twin = shallow_twin(model, known)
        self.twins: dict[str, nn.Module] = dict(self.twin.named_modules())
        registered = set(map(id, self.twins.values()))
        others = [one for one in known.values() if isinstance(one, nn.Module) and id(one) not in registered]
        self.twins |= {f"{type(one).__name__} {number}": one for number, one in enumerate(others)}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._allowed = set(map(id, self.twins.values()))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Raise TapError from a forward pass in this thread that calls a module with weights that is no twin."""
        thread = get_ident()

        def refuse(module: nn.Module, args: Any) -> None:
            has_state = id(module) in self._names or module._parameters or module._buffers
            if get_ident() == thread and id(module) not in self._allowed and has_state:
                name = self._names.get(id(module), "")
                raise TapError(
                    f"the model calls its {type(module).__name__} {name!r} through an object that cannot be copied, such as a"
                    " global variable, so that scoring would change the model: expected modules in its attributes; set"
                    " self.module = ... and call self.module(...)"
                )

        handle = register_module_forward_pre_hook(refuse)
        try:
            yield
        finally:
            handle.remove()
