"""What a model returns: where its logits are, and how they relate to the outputs of its linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "agrees_with_logits",
    "combination",
    "describe",
    "explain",
    "relative_difference",
    "tensor_at",
    "tensors_of",
    "tolerance_of",
]

# Logits sum many rounded terms.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_DEPTH = 4
_FORMS = {"output": lambda z: z, "softmax": lambda z: z.softmax(1), "sigmoid": torch.sigmoid}
_MOST_HEADS = 16


def _items(output: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return output.items()
    if hasattr(output, "_asdict"):
        return output._asdict().items()
    if isinstance(output, (tuple, list)):
        return enumerate(output)
    if is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    if isinstance(output, (nn.Module, type)):
        return ()
    found = dict(getattr(output, "__dict__", {}))
    if hasattr(output, "logits"):
        found["logits"] = output.logits
    return found.items()


def tensors_of(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in a model's output by its path: "" for a tensor itself, else such as "0", "logits" or "heads/1".

    Looks into tuples, lists, mappings, dataclasses and objects.
    """
    if isinstance(output, Tensor):
        return {path: output}
    if path.count("/") >= _DEPTH:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in _items(output):
        found |= tensors_of(value, f"{path}/{key}" if path else str(key))
    return found


def tensor_at(output: Any, path: str) -> Any:
    """The part of a model's output at a path of `tensors_of`; None if there is none."""
    if not path:
        return output
    # Keys may hold a slash themselves.
    rests = ((value, f"{path}/".removeprefix(f"{name}/")) for name, value in _items(output))
    parts = (tensor_at(value, rest[:-1]) for value, rest in rests if len(rest) <= len(path))
    return next((part for part in parts if part is not None), None)


def describe(output: Any) -> str:
    """Type and shapes of a model's output, in words."""
    if isinstance(output, Tensor):
        return f"{output.dtype} {list(output.shape)}"
    shapes = [f"{path!r} {list(tensor.shape)}" for path, tensor in tensors_of(output).items()]
    return f"{type(output).__name__} with {', '.join(shapes) or 'no tensor'}"


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference relative to the largest expected magnitude; infinite if shapes differ."""
    if found.shape != expected.shape or expected.numel() == 0:
        return float("inf")
    difference = (found.double() - expected.double()).abs().max()
    # A zero-initialised head outputs all-zero logits, which only zeros match.
    return 0.0 if difference == 0 else float(difference / expected.abs().max().double())


def tolerance_of(*dtypes: torch.dtype) -> float:
    """Largest relative difference of equal logits that passed through all given dtypes."""
    return max(_TOLERANCE.get(each, 1e-4) for each in dtypes)


def agrees_with_logits(logits: Tensor, output: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a model's output equals these logits, their softmax or log-softmax within the rounding of all given dtypes."""
    tolerance = tolerance_of(logits.dtype, output.dtype, *dtypes)
    forms = (logits, logits.softmax(1), logits.log_softmax(1))
    return any(relative_difference(form, output) <= tolerance for form in forms)


def combination(output: Tensor, heads: Sequence[tuple[str, Tensor]]) -> tuple[str, dict[str, float]] | None:
    """How the model's output [N, C] follows from those of linear layers: a form of `_FORMS`, and the weight of each layer.

    Tries linear combinations of their outputs, softmaxes and sigmoids by least squares; None if there is none.
    """
    last = {name: logits for name, logits in heads if logits.shape == output.shape and torch.isfinite(logits).all()}
    names = list(last)[-_MOST_HEADS:]
    wanted = output.double().flatten()
    # With fewer equations than twice the unknowns, chance explains anything.
    if not names or len(wanted) < 2 * len(names) or not wanted.any():
        return None
    for form, of in _FORMS.items():
        columns = torch.stack([of(last[name].double()).flatten() for name in names], 1).cpu()
        weights = torch.linalg.lstsq(columns, wanted.cpu()[:, None], driver="gelsd").solution
        if relative_difference((columns @ weights)[:, 0], wanted.cpu()) > tolerance_of(output.dtype):
            continue
        used = {name: float(weight) for name, weight in zip(names, weights[:, 0], strict=True) if abs(weight) > 1e-3}
        if used:
            return form, used
    return None


def explain(output: Tensor, heads: Sequence[tuple[str, Tensor]]) -> str | None:
    """The `combination` in words, such as "a mixture of 'head' and 'head_dist'"."""
    found = combination(output, heads)
    if found is None:
        return None
    form, used = found
    if len(used) > 1:
        plural = {"output": "", "softmax": "the softmaxes of ", "sigmoid": "the sigmoids of "}[form]
        quoted = [repr(name) for name in used]
        return f"a mixture of {plural}{', '.join(quoted[:-1])} and {quoted[-1]}"
    ((name, weight),) = used.items()
    return f"{'' if abs(weight - 1) < 1e-3 else f'{weight:.3g} times '}the {form} of {name!r}"
