"""Every error the engine raises on purpose: each says what was expected, what came and what to do."""

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
    """The head or the feature map was not found in the model, or did not prove itself."""


class DetectorUnavailableError(OodEngineError):
    """A detector was asked for that this model or this data cannot support."""


class NotFittedError(OodEngineError):
    """Something fitted is needed and `fit` or `calibrate` has not run."""


class CalibrationError(OodEngineError):
    """The calibration data is too small, not fresh, or not finite."""


class DataError(OodEngineError):
    """A file or folder of images cannot be read as data."""


class StateError(OodEngineError):
    """A state file is damaged, of another version, or was fitted to another head."""


class OodEngineWarning(UserWarning):
    """Something was left out or replaced, and the run goes on."""


class StateDriftWarning(OodEngineWarning):
    """A loaded state does not reproduce its stored scores on this device and dtype."""


def one_line(error: BaseException, *, with_type: bool = False) -> str:
    """The message of an error as one line of at most 300 characters that can be encoded; its type where it has none.

    Args:
        error: any exception.
        with_type: put the name of the type before the message.
    """
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())[:300]
    name = type(error).__name__
    return f"{name}: {text}" if text and with_type else text or name
