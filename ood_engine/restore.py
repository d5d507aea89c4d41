"""Whether a state that was read is that of the model at hand: sizes, digests, then scores.

Scores decide what no digest can. Those of the stored ID features show another arithmetic, or detectors that someone altered; those
of the synthetic inputs another backbone, other layers, or preprocessing inside the model.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from .errors import OodEngineError, OodEngineWarning, StateDriftWarning, StateError, TapError, one_line
from .features.cache import FeatureCache
from .features.canary import SYNTHETIC_TOLERANCE
from .identity import HeadSize, ModelDigest
from .scorer import Scorer
from .scores import Scores
from .state import State

__all__ = ["head_size", "restore"]

_FORCE = "force=True (--force) goes on anyway"


def head_size(scorer: Scorer) -> HeadSize:
    """Sizes of the head of a scorer."""
    classes, features = scorer.head.weight.shape
    return HeadSize(classes, features, scorer.head.bias is not None)


def restore(scorer: Scorer, state: State, path: Path, *, force: bool = False) -> None:
    """Give a scorer the state read from a file, if it is that of its model.

    Args:
        force: warn where another model, or scores that changed, would be refused; sizes and layers must fit all the same.

    Raises:
        StateError: layers or sizes that do not fit, another model, or a state that does not reproduce its own scores.
    """
    try:
        scorer.tap.adopt(state.plan)
    except TapError as error:
        raise StateError(f"{path}: {error}; load the model of the fit, or fit again") from error
    size = head_size(scorer)
    if size != state.head:
        raise StateError(
            f"{path}: fitted to a head of {state.head}, this model's has {size}; load the model of the fit, or fit again"
        )
    state.to(scorer.tap.device)
    scorer.detectors, scorer.is_fitted = state.detectors, True
    scorer.calibrations, scorer.calibrated_under = state.calibrations, state.calibrated_under
    scorer.image_shape, scorer.positions, scorer.agreement = state.image_shape, state.positions, state.agreement
    _compare(scorer, state, path, force)
    scorer.warn_of_arithmetic()


def _compare(scorer: Scorer, state: State, path: Path, force: bool) -> None:
    digest = ModelDigest.of(scorer.tap.tensors())
    now, synthetic = _scores(scorer, state, path)
    canary = state.canary
    drift = canary.drift(now, {name: one.cpu() for name, one in state.calibrations.items()})
    moved, worst = canary.synthetic_drift(synthetic)
    words = f"{worst!r} scores synthetic inputs {100 * moved:.3g} % away from where it did"
    is_cast = digest.dtype != state.model.dtype
    is_same_arithmetic = scorer.runtime.precision == "ieee" and state.calibrated_under in (
        None,
        scorer.runtime.arithmetic,
    )
    if moved > SYNTHETIC_TOLERANCE and not is_cast:
        drift.append(f"{words}, where {100 * SYNTHETIC_TOLERANCE:g} % is allowed")
    place = f"({scorer.tap.device}, torch.{digest.dtype})"
    if not state.model.matches(digest):
        problem = f"{path}: fitted to another model: sizes agree, weights or buffers do not"
        if not canary.is_decisive:
            words = "no synthetic input has a score by which to compare them"
        if moved > SYNTHETIC_TOLERANCE or not canary.is_decisive:
            _refuse(f"{problem}, and {words}; load the checkpoint of the fit, or fit again; {_FORCE}", force)
        else:
            _warn(f"{problem}, but {words} (quantised or merged since?); fit again to be sure", OodEngineWarning)
    elif drift and not is_cast and is_same_arithmetic:
        problem = f"{path}: does not reproduce its own scores on this machine {place}"
        _refuse(f"{problem}: {'; '.join(drift)}; copy it again, or fit again here; {_FORCE}", force)
    elif drift:
        _warn(
            f"the loaded state drifts on this machine {place}: {'; '.join(drift)}; fit again here, or load on the device and in"
            " the dtype of the fit",
            StateDriftWarning,
        )


def _scores(scorer: Scorer, state: State, path: Path) -> tuple[Scores, Scores]:
    """Scores of the stored ID features and of the synthetic inputs."""
    try:
        with torch.no_grad():
            return (
                scorer.score_cache(FeatureCache(state.canary.rows)),
                scorer.score(state.canary.inputs.images()).cpu(),
            )
    except torch.OutOfMemoryError:
        raise
    except (OodEngineError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise StateError(
            f"{path}: its detectors cannot score with this model ({one_line(error, with_type=True)}); load the model of the fit,"
            " copy the file again, or fit again"
        ) from error


def _refuse(message: str, force: bool) -> None:
    if not force:
        raise StateError(message)
    _warn(message, StateDriftWarning)


def _warn(message: str, category: type[OodEngineWarning]) -> None:
    warnings.warn(message, category, stacklevel=5)
