"""Loading of models: a user-defined factory by name, and weights from a file."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, OodEngineWarning, one_line
from .prefixes import prefixes_between

__all__ = ["load_model", "load_weights"]

WRAPPERS = ("state_dict", "model_state_dict", "net", "model")
"""Keys of the state_dict in the checkpoints of training scripts."""

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of DataParallel and torch.compile."""


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """The model built by a factory in user code, in evaluation mode, on the device chosen by the factory.

    Args:
        spec: `package.module:factory`, on the Python path or below the working directory, or `path/file.py:factory`.
            `factory()` returns an nn.Module; a class works too.
        weights: file for `load_weights`; None keeps the factory's weights.

    Raises:
        InputError: no such module, file or factory, a factory that raises or returns something else, or mismatched weights.
    """
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise InputError(f"model {spec!r}: expected package.module:factory or path/file.py:factory")
    with _importable(Path(source).resolve().parent if source.endswith(".py") else Path.cwd()):
        factory = getattr(_import(source, spec), name, None)
        if not callable(factory) or isinstance(factory, nn.Module):
            came = "there is none" if factory is None else f"it is a {type(factory).__name__}"
            raise InputError(
                f"model {spec!r}: expected {source} to have a function {name}() that returns an nn.Module; {came}"
            )
        try:
            model = factory()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"model {spec!r}: {name}() raised {one_line(error, with_type=True)}; it is called without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec!r}: {name}() returned a {type(model).__name__}; expected an nn.Module")
    if weights is not None:
        _fill(model, load_weights(weights), Path(weights))
    return model.eval()


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A state_dict from a `.safetensors` or `torch.save` file, read with weights_only=True: no code is unpickled.

    A state_dict under one of `WRAPPERS` in a checkpoint is unwrapped; the prefixes of DataParallel ("module.") and torch.compile
    ("_orig_mod.") are removed.

    Raises:
        InputError: no such file, a damaged file, a pickled model, or no state_dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {path}: no such file; expected .safetensors or a state_dict written by torch.save")
    found: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(
            f"weights {path}: holds no state_dict; expected tensors by name, as written by torch.save(model.state_dict(), ...)"
        )
    state = dict(found)
    # Wrappers can be nested either way.
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"weights {path}: truncated, or not a safetensors file ({one_line(error, with_type=True)}); copy it again"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # real problems raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weights {path}: not a plain state_dict, and nothing is unpickled here; save it by"
            " torch.save(model.state_dict(), path) or as .safetensors"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError, KeyError, … on damaged files
        raise InputError(
            f"weights {path}: cannot be read ({one_line(error, with_type=True)}); expected .safetensors or a state_dict written"
            " by torch.save"
        ) from error


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    state = _renamed(state, own, path)
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if wrong:
        came, expected = list(state[wrong[0]].shape), list(own[wrong[0]].shape)
        raise InputError(
            f"weights {path}: {wrong[0]!r} has shape {came}, the model expects {expected}{_more(wrong)};"
            " pass the weights of this model"
        )
    # load_state_dict knows the keys that checkpoints of older versions may lack.
    result = model.load_state_dict(state, strict=False)
    problems = [
        f"{kind} {names[0]!r}{_more(names)}"
        for kind, names in (("lacks", result.missing_keys), ("has the unknown", result.unexpected_keys))
        if names
    ]
    if problems:
        raise InputError(f"weights {path}: {' and '.join(problems)}; pass the weights of this model")


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The part of a state_dict that holds the model, under the model's own names, such as without a LightningModule's "model."."""
    # Checkpoints of older versions lack these.
    wanted = {key for key in own if not key.endswith("num_batches_tracked")}
    if not wanted or state.keys() & own.keys():
        return state
    # Not from one prefix to another, under which layers of another name would fit.
    found = [one for one in prefixes_between(wanted, state) if "" in one]
    if len(found) > 1:
        parts = " and ".join(repr(one.added) for one in found)
        raise InputError(f"weights {path}: {parts} both hold this model; save the state_dict of one of them")
    if not found:
        return state
    kept = {key: name for key in own if (name := found[0](key)) in state}
    left = len(state) - len(kept)
    warnings.warn(
        f"weights {path}: their prefix is {found[0].added!r}, that of the model {found[0].removed!r}"
        + (f"; {left} other tensors of the file are ignored" if left else ""),
        OodEngineWarning,
        stacklevel=4,
    )
    return {key: state[name] for key, name in kept.items()}


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import(source: str, spec: str) -> ModuleType:
    try:
        return _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"model {spec!r}: importing {source} failed with {one_line(error, with_type=True)}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"model file {path}: no such file; expected path/file.py:factory")
    name = f"_ood_engine_model_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses look up their module by name
    module_spec.loader.exec_module(module)
    return module
