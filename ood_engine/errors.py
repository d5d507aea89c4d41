"""Exceptions and warnings of the engine; every message states what was expected, what was received and a remedy."""

from __future__ import annotations

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
    "one_line",
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
