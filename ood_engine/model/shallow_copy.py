"""A shallow twin of a model: separate module objects and hooks over shared parameters and buffers.

Hooks on the twin never fire for calls of the model itself, and the twin is always in evaluation mode. Both share the dictionaries
of parameters and buffers, so the twin follows a later `load_state_dict` or `.to()` of the model, but not modules or hooks added
or replaced later.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any
from weakref import ProxyTypes, ref

import torch
from torch import nn

from ..errors import TapError
from .plain_objects import CALLABLES, attributes_of, holds_module

__all__ = ["shallow_twin", "unwrap"]

_SHARED = ("_parameters", "_buffers")
_CONTAINERS = (OrderedDict, defaultdict, dict, list, deque, set, tuple, SimpleNamespace, object)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and (distributed) data-parallel wrappers.

    Raises:
        TapError: not an nn.Module, or a TorchScript module, which does not support hooks on its submodules.
    """
    if not isinstance(model, nn.Module):
        raise TapError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TapError(
            f"model: the TorchScript module {model.original_name!r} cannot be hooked; pass the nn.Module it was scripted from"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    # An OptimizedModule of torch.compile, recognised by attribute because importing its class takes seconds.
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else unwrap(compiled)


def shallow_twin(model: nn.Module, known: dict[int, Any] | None = None) -> Any:
    """Copy the module tree of `model` in evaluation mode, with shared parameters and buffers; the model stays unchanged.

    References to modules in attributes, containers, plain objects, bound methods, partials and closures are redirected to their
    twins. A module that is reachable in another way only is shared with the model, see `strangers`.

    Args:
        known: filled with the id of everything copied → its copy.

    Raises:
        TapError: not an nn.Module, or one that is or contains a TorchScript module.
    """
    return _twin_of(model, {} if known is None else known)


def _twin_of(module: nn.Module, known: dict[int, Any]) -> Any:
    module = unwrap(module)
    if id(module) in known:
        return known[id(module)]
    # Not the class's own __new__, which may require arguments, or drop the forward, as in GraphModule.
    twin = object.__new__(type(module))
    known[id(module)] = twin
    for name, value in vars(module).items():
        vars(twin)[name] = value if name in _SHARED else _translate(value, known)
    # Not by eval(), which a class may override to modify the shared weights, such as merging an adapter.
    vars(twin)["training"] = False
    # Compiled code would bypass the twin's hooks.
    eager = getattr(type(module).forward, "_torchdynamo_orig_callable", None)
    if eager is not None and "forward" not in vars(module):
        vars(twin)["forward"] = MethodType(eager, twin)
    return twin


def _translate(value: Any, known: dict[int, Any]) -> Any:
    """Copy containers, callables and plain objects, with modules replaced by their twins."""
    if type(value) in ProxyTypes:
        # Its twin lives as long as the whole.
        return _translate(value.__repr__.__self__, known)
    if isinstance(value, nn.Module):
        return _twin_of(value, known)
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    if kind in (dict, OrderedDict, defaultdict):
        known[id(value)] = copy = value.copy()
        copy.clear()
        for key, item in value.items():
            copy[_translate(key, known)] = _translate(item, known)
    elif kind is list:
        known[id(value)] = copy = []
        copy.extend(_translate(item, known) for item in value)
    elif kind in (tuple, set, frozenset):
        copy = known[id(value)] = kind(_translate(item, known) for item in value)
    elif kind is CellType:
        copy = known[id(value)] = CellType()
        with suppress(ValueError):
            copy.cell_contents = _captured(value.cell_contents, known)
    elif kind in CALLABLES:
        copy = known[id(value)] = _translate_callable(value, known)
    elif holds_module(value):
        copy = _translate_object(value, known)
    else:
        copy = value
    return copy


def _translate_object(value: Any, known: dict[int, Any]) -> Any:
    """A copy of an object that holds modules, with their twins; the object itself where its kind allows none."""
    kind: Any = type(value)
    if kind is ref:
        copy = known[id(value)] = ref(_translate(value(), known))
        return copy
    base: Any = next(
        one
        for one in (OrderedDict, defaultdict, dict, list, deque, set, tuple, SimpleNamespace, object)
        if issubclass(kind, one)
    )
    try:
        items = [_translate(item, known) for item in value] if base in (set, tuple) else []
        copy = known[id(value)] = base.__new__(kind, *([items] if base is tuple else []))
    except TypeError:
        return value
    if base is set:
        set.update(copy, items)
    elif base in (list, deque):
        base.extend(copy, [_translate(item, known) for item in value])
    elif issubclass(base, dict):
        for key, item in dict.items(value):
            base.__setitem__(copy, _translate(key, known), _translate(item, known))
    for name, item in attributes_of(value).items():
        object.__setattr__(copy, name, _translate(item, known))
    return copy


def _captured(value: Any, known: dict[int, Any]) -> Any:
    """The content of a closure: modules and callables as twins; data, such as the list filled by a user's hook, shared."""
    return _translate(value, known) if isinstance(value, (nn.Module, *CALLABLES)) else value


def _translate_callable(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, MethodType):
        return MethodType(_translate(value.__func__, known), _captured(value.__self__, known))
    if isinstance(value, partial):
        arguments = [_captured(argument, known) for argument in value.args]
        keywords = {key: _captured(argument, known) for key, argument in value.keywords.items()}
        return partial(_translate(value.func, known), *arguments, **keywords)
    if hasattr(value, "_torchdynamo_orig_callable"):
        return _translate(value._torchdynamo_orig_callable, known)
    if value.__closure__ is None:
        return value
    closure = tuple(_translate(cell, known) for cell in value.__closure__)
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    copy.__kwdefaults__ = value.__kwdefaults__
    vars(copy).update(vars(value))
    return copy
