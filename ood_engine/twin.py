"""A shallow twin of a model: its own module objects and hooks over the same parameters and buffers.

Hooks on the twin never fire for the user's own calls, and the twin's `eval()` leaves the user's mode alone. Parameters and
buffers are the very same dictionaries, so a later `load_state_dict` or `.to()` of the model is seen by the twin.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from .errors import TapError

__all__ = ["shallow_twin"]

_SHARED = ("_parameters", "_buffers")


def unwrap(model: nn.Module) -> nn.Module:
    """The module beneath torch.compile and (distributed) data parallelism.

    Raises:
        TapError: not an nn.Module, or a TorchScript module, whose inside cannot be hooked.
    """
    if not isinstance(model, nn.Module):
        raise TapError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TapError("model: a TorchScript module cannot be hooked; pass the nn.Module it was scripted from")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        return unwrap(model._orig_mod)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    return model


def shallow_twin(model: nn.Module) -> Any:
    """Copy the module tree of `model`, sharing parameters and buffers; the model itself is not changed."""
    return _twin_of(unwrap(model), {})


def _twin_of(module: nn.Module, known: dict[int, Any]) -> Any:
    module = unwrap(module)
    if id(module) not in known:
        twin = module.__class__.__new__(module.__class__)
        known[id(module)] = twin
        for name, value in module.__dict__.items():
            twin.__dict__[name] = value if name in _SHARED else _translate(value, known)
        # A model compiled in place would run the user's compiled code, past the twin's hooks.
        twin.__dict__["_compiled_call_impl"] = None
    return known[id(module)]


def _translate(value: Any, known: dict[int, Any]) -> Any:
    """Copy containers, and lead modules and their bound methods to their twins, wherever a module keeps them."""
    if isinstance(value, nn.Module):
        return _twin_of(value, known)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _twin_of(value.__self__, known))
    if isinstance(value, dict):
        copy = value.copy()
        for key, item in value.items():
            copy[key] = _translate(item, known)
        return copy
    if type(value) in (list, tuple):
        return type(value)(_translate(item, known) for item in value)
    return value
