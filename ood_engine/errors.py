"""Exceptions and warnings of the engine; every message states what was expected, what was received and a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CalibrationError",
    "DataError",
    "DetectorUnavailableError",
    "InputError",
    "NotFittedError",
    "OodEngineError",
    "OodEngineWarning",
    "StateDriftWarning",
    "StateError",
    "TapError",
    "did_you_mean",
    "one_line",
    "one_of",
]


class OodEngineError(ValueError):
    """Base class. The command line prints its one line and exits with code 2."""


class InputError(OodEngineError):
    """A tensor or an argument has the wrong type, shape, dtype, range or values."""


class TapError(OodEngineError):
    """Head or feature map were not found in the model, or could not be verified."""


class DetectorUnavailableError(OodEngineError):
    """This model or data does not support the requested detector."""


class NotFittedError(OodEngineError):
    """A call requires `fit` or `calibrate` first."""


class CalibrationError(OodEngineError):
    """The calibration data is too small, not held out, or not finite."""


class DataError(OodEngineError):
    """A file or folder of images cannot be read."""


class StateError(OodEngineError):
    """A state file is damaged, has another version, or was fitted to another head."""


class OodEngineWarning(UserWarning):
    """Something was omitted or substituted; the run continues."""


class StateDriftWarning(OodEngineWarning):
    """A loaded state does not reproduce its stored scores on this device and dtype."""


def one_line(error: BaseException, *, with_type: bool = False) -> str:
    """The message of an error as one encodable line of at most 300 characters; its type if it has no message.

    Args:
        error: any exception.
        with_type: prefix the message with the type name.
    """
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())[:300]
    name = type(error).__name__
    return f"{name}: {text}" if text and with_type else text or name


def one_of(name: object, known: Iterable[object]) -> str:
    """The part of a message that refuses a name: the known ones, and the closest if one is similar.

    Example:
        >>> one_of("nap-enrgy", ["nap", "nap_energy", "opnp"])
        "expected one of nap, nap_energy, opnp; did you mean 'nap_energy'?"
    """
    names = [str(one) for one in known]
    return f"expected one of {', '.join(names) or 'none'}{did_you_mean(name, names)}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message that refuses a name: the most similar known one, if any."""
    return "".join(f"; did you mean {one!r}?" for one in get_close_matches(str(name), known, 1))
