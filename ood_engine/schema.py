"""What a state file must hold, checked before anything is made of it.

A state that another program wrote and signed passes every digest; its fields, types, ranges and shapes are checked here, and
what they mean by the canary, see `restore`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .errors import StateError
from .features.agreement import OutputForm
from .features.cache import CacheRows
from .model.layouts import LAYOUTS

__all__ = ["check_header", "check_tensors", "described", "refuse_constant"]


class _Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _whole(least: int, below: int = 2**63) -> _Rule:
    return _Rule(f"a whole number from {least}", lambda value: type(value) is int and least <= value < below)


def _list_of(rule: _Rule) -> _Rule:
    return _Rule(f"a list, each {rule.words}", lambda value: isinstance(value, list) and all(map(rule.holds, value)))


def _map_of(rule: _Rule) -> _Rule:
    return _Rule(
        f"a mapping of names, each to {rule.words}",
        lambda value: isinstance(value, dict) and all(map(rule.holds, value.values())),
    )


def _record(**fields: _Rule) -> _Rule:
    words = ", ".join(f"{name}: {rule.words}" for name, rule in fields.items())
    return _Rule(
        f"a record of ({words})",
        lambda value: (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(rule.holds(value[name]) for name, rule in fields.items())
        ),
    )


def _or_null(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.words}, or null", lambda value: value is None or rule.holds(value))


def _one_of(*values: str) -> _Rule:
    return _Rule(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


_NUMBER = _Rule("a finite number", _is_number)
_NOT_NEGATIVE = _Rule("a finite number from 0", lambda value: _is_number(value) and value >= 0)
_SHARE = _Rule("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1)
_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = _Rule("a text", lambda value: isinstance(value, str))
_DIGEST = _Rule(
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"),
)
_MAPPING = _Rule("a mapping", lambda value: isinstance(value, dict))
_SHAPE = _list_of(_whole(1, 2**31))
_STEP = _Rule(
    "a [name, shape]",
    lambda value: isinstance(value, list) and len(value) == 2 and _TEXT.holds(value[0]) and _SHAPE.holds(value[1]),
)
_DTYPES = ("float64", "float32", "float16", "bfloat16")

_COST = {"form": _TEXT, "flops": _NOT_NEGATIVE, "bytes": _NOT_NEGATIVE, "workspace": _NOT_NEGATIVE}
_FIELDS: dict[str, _Rule] = {
    "format": _whole(0),
    "package": _TEXT,
    "torch": _TEXT,
    "plan": _record(
        head=_TEXT,
        feature_map=_or_null(_TEXT),
        call=_whole(0),
        layout=_one_of(*LAYOUTS),
        relu=_FLAG,
        tail=_list_of(_STEP),
        proven=_FLAG,
        reason=_TEXT,
        head_call=_whole(0),
        head_proven=_FLAG,
        head_reason=_TEXT,
        output=_TEXT,
        sigmoid=_FLAG,
    ),
    "image_shape": _or_null(_SHAPE),
    "positions": _or_null(
        _Rule(
            "[fewest, most], whole numbers from 1",
            lambda value: _list_of(_whole(1)).holds(value) and len(value) == 2 and value[0] <= value[1],
        )
    ),
    "set_up": _record(
        labels=_one_of("given", "predicted"),
        label_agreement=_or_null(_Rule("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)),
        overruled=_list_of(_TEXT),
    ),
    "agreement": _record(
        features=_NOT_NEGATIVE, logits=_NOT_NEGATIVE, scale=_NOT_NEGATIVE, output=_one_of(*get_args(OutputForm))
    ),
    "head": _record(classes=_whole(1), features=_whole(1), bias=_FLAG),
    "model": _record(dtype=_one_of(*_DTYPES), own=_DIGEST, rounded=_record(**dict.fromkeys(_DTYPES, _DIGEST))),
    "synthetic_inputs": _record(shape=_SHAPE, low=_NUMBER, high=_NUMBER),
    "detectors": _list_of(_record(name=_TEXT, settings=_MAPPING)),
    "subspaces": _list_of(
        _record(
            form=_TEXT,
            components=_whole(0),
            detectors=_list_of(_TEXT),
            samples=_whole(1),
            cheapest=_TEXT,
            costs=_list_of(_record(**_COST, seconds=_NOT_NEGATIVE, fits=_FLAG)),
        )
    ),
    "false_alarm_rates": _map_of(_SHARE),
    "thresholds": _map_of(_NUMBER),
    "calibration_samples": _or_null(_whole(1)),
    "fit_samples": _whole(1),
    "rectify": _FLAG,
    "seed": _whole(-(2**63), 2**64),
    "calibrated_under": _or_null(_record(precision=_TEXT, backend=_or_null(_TEXT))),
    "unavailable": _map_of(_TEXT),
    "tuning": _list_of(_record(detector=_TEXT, settings=_MAPPING, auroc=_NUMBER, chosen=_FLAG)),
    "information": _MAPPING,
    "aliases": _map_of(_TEXT),
    "tensors": _map_of(_record(dtype=_TEXT, shape=_list_of(_whole(0)))),
    "tensors_digest": _DIGEST,
}


def check_header(header: Mapping[str, Any]) -> None:
    """Raise StateError unless every field is there, of its type and in its range, and fields agree with one another."""
    if header.keys() != _FIELDS.keys():
        lacking, unknown = sorted(_FIELDS.keys() - header.keys()), sorted(header.keys() - _FIELDS.keys())
        raise StateError(f"its header lacks {lacking or 'nothing'} and has the unknown {unknown or 'nothing'}")
    for name, rule in _FIELDS.items():
        if not rule.holds(header[name]):
            raise StateError(f"{name} in its header: expected {rule.words}, got {repr(header[name])[:80]}")
    names = [entry["name"] for entry in header["detectors"]]
    inputs, rates = header["synthetic_inputs"], header["false_alarm_rates"]
    agree = {
        "detectors: expected at least one, each once": bool(names) and len(set(names)) == len(names),
        "synthetic_inputs: expected low ≤ high": inputs["low"] <= inputs["high"],
        "image_shape: expected that of synthetic_inputs, or null": header["image_shape"] in (None, inputs["shape"]),
        "false_alarm_rates: expected one for every detector, or none": rates.keys() in (set(names), set()),
        "thresholds: expected one for every false-alarm rate": header["thresholds"].keys() == rates.keys(),
        "calibration_samples: expected a number with thresholds, else null": bool(rates)
        == (header["calibration_samples"] is not None),
        "calibrated_under: expected where there are thresholds": not rates or header["calibrated_under"] is not None,
    }
    for words, holds in agree.items():
        if not holds:
            raise StateError(f"its header contradicts itself: {words}")


def described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Dtype and shape of every tensor, as in a header."""
    return {
        key: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for key, tensor in tensors.items()
    }


def check_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise StateError unless the tensors are those that the header speaks of, with its shapes and finite values."""
    found, aliases = described(tensors), header["aliases"]
    for key in sorted(found.keys() | header["tensors"].keys()):
        came, listed = found.get(key, "none"), header["tensors"].get(key, "none")
        if came != listed:
            raise StateError(f"its tensor {key!r}: expected {listed} by its header, got {came}")
    for key, original in aliases.items():
        if key in tensors or original not in tensors:
            raise StateError(f"its alias {key!r} of {original!r}: expected a new name of a tensor in the file")
    keys = tensors.keys() | aliases.keys()
    detectors = [entry["name"] for entry in header["detectors"]]
    expected: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {}
    count = tensors["canary.rows.fingerprints"].numel() if "canary.rows.fingerprints" in tensors else 1
    for field in CacheRows._fields:
        is_number = field in ("fingerprints", "labels")
        expected[f"canary.rows.{field}"] = (torch.int64, (count,)) if is_number else (torch.float32, (count, None))
    expected["canary.rows.features"] = torch.float32, (count, header["head"]["features"])
    expected["fit.fingerprints"] = torch.int64, (header["fit_samples"],)
    for name in detectors:
        expected[f"canary.scores.{name}"] = torch.float32, (count,)
        expected[f"canary.synthetic.{name}"] = torch.float32, (4,)
    for name in header["thresholds"]:
        expected[f"calibrations.{name}.scores"] = torch.float32, (header["calibration_samples"],)
    rest = {key for key in keys if key.startswith(tuple(f"detectors.{name}." for name in detectors))}
    if keys - rest != expected.keys():
        lacking, unknown = sorted(expected.keys() - keys), sorted(keys - rest - expected.keys())
        raise StateError(f"it lacks the tensors {lacking[:3] or 'none'} and has the unknown {unknown[:3] or 'none'}")
    for key, (dtype, shape) in expected.items():
        tensor = tensors[aliases.get(key, key)]
        fits = tensor.ndim == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        floats = tensor.is_floating_point() and dtype.is_floating_point and key.startswith("canary.rows.")
        if not fits or not (tensor.dtype == dtype or floats) or not count:
            raise StateError(
                f"its tensor {key!r}: expected {dtype} {[size or 'any' for size in shape]}, got {tensor.dtype} {list(tensor.shape)}"
            )
    for key, tensor in tensors.items():
        # Probes without clamps have infinite ones; synthetic inputs may have no score.
        may = key.endswith((".lower", ".upper")) or key.startswith("canary.synthetic.")
        if tensor.is_floating_point() and not may and not torch.isfinite(tensor).all():
            raise StateError(f"its tensor {key!r} has NaN or infinite values: expected finite ones")


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is no JSON number")
