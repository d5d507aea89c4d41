"""Objects other than modules through which a model reaches modules."""

from __future__ import annotations

from collections import deque
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

from torch import nn

__all__ = ["CALLABLES", "attributes_of", "holds_module"]

CALLABLES = (MethodType, FunctionType, partial)
_OWN_SLOTS = ("__dict__", "__weakref__")
_MOST_OBJECTS = 1000


def attributes_of(value: Any) -> dict[str, Any]:
    """Attributes of a plain object in its dictionary and slots."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    found = {name: getattr(value, name) for name in names if name not in _OWN_SLOTS and hasattr(value, name)}
    return found | getattr(value, "__dict__", {})


def _is_plain(value: Any) -> bool:
    """Whether a copy of an object cannot do harm: no class or module, nothing of torch's, nothing that is cleaned up."""
    kind = type(value)
    if isinstance(value, (type, ModuleType, nn.Module, *CALLABLES)) or hasattr(kind, "__del__"):
        return False
    return kind.__module__.partition(".")[0] != "torch"


def holds_module(value: Any) -> bool:
    """Whether a module can be reached from an object through few others."""
    pending, seen, found = [value], {id(value)}, False
    while pending and len(seen) < _MOST_OBJECTS:
        one = pending.pop()
        held: list[Any] = []
        if type(one) is ref:
            held = [one()]
        elif _is_plain(one):
            held = list(attributes_of(one).values())
            if isinstance(one, (dict, list, tuple, set, frozenset, deque)):
                held += [*one, *one.values()] if isinstance(one, dict) else one
        for part in held:
            found |= isinstance(part, nn.Module)
            if id(part) not in seen:
                seen.add(id(part))
                pending.append(part)
    return found and not pending
