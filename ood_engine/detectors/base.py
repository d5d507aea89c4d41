"""The detector interface and the registry of detectors by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ood_kernels.types import HasBasisTensors

from ..errors import InputError, did_you_mean, one_of
from ..features.fit_data import FitData
from ..features.signals import Signals
from ..fitted import FittedModule
from ..runtime import Masks

__all__ = [
    "Detector",
    "available_detectors",
    "changed_settings",
    "create_detector",
    "default_settings",
    "register",
    "summary",
]


class Detector(FittedModule):
    """One score: `forward(signals)` returns [N], higher = more in-distribution; the fitted state is its buffers.

    Attributes:
        name: registered name.
        settings: all constructor arguments, sufficient to recreate it.
        needs_map: whether it requires the feature map.
        assumes_one_class: whether it takes the logits or labels for those of exactly one class per image.
        prunes: whether it scores a head pruned by its `masks`.
        revision: number of changes of settings since creation.
    """

    needs_map: ClassVar[bool] = False
    assumes_one_class: ClassVar[bool] = True
    prunes: ClassVar[bool] = False

    def __init__(self, *fitted: str) -> None:
        super().__init__(*fitted)
        self.name = type(self).__name__
        self.settings: dict[str, Any] = {}
        self.revision = 0

    def fit(self, data: FitData) -> None:
        """Fit the buffers on cached ID samples; by default there are none."""

    def forward(self, signals: Signals) -> Tensor:
        """Score [N], higher = more in-distribution."""
        raise NotImplementedError

    @property
    def eps(self) -> float | None:
        """Its NAP constant; None without NAP."""
        return None

    @property
    def masks(self) -> Masks | None:
        """Masks of its pruned head; None without pruning."""
        return None

    @property
    def gradient_basis(self) -> HasBasisTensors | None:
        """Subspace of the gradient coordinates it reads; None if it reads none."""
        return None

    def grid(self) -> Sequence[dict[str, Any]]:
        """Candidate settings for tuning on pseudo-OOD data, applied by `configure` without a refit."""
        return ()

    def configure(self, **settings: Any) -> None:
        """Change settings that do not require a refit."""
        self.settings.update(settings)
        self.revision += 1


_DetectorType = TypeVar("_DetectorType", bound=type[Detector])
_REGISTRY: dict[str, tuple[type[Detector], dict[str, Any], tuple[str, ...]]] = {}


def register(name: str, *, fixed: tuple[str, ...] = (), **defaults: Any) -> Callable[[_DetectorType], _DetectorType]:
    """Class decorator: register a detector as `name`, with its own `defaults`; settings in `fixed` cannot be changed."""

    def add(detector: _DetectorType) -> _DetectorType:
        _REGISTRY[name] = (detector, defaults, fixed)
        return detector

    return add


def available_detectors() -> tuple[str, ...]:
    """The names accepted by `Engine(detectors=...)`."""
    return tuple(sorted(_REGISTRY))


def default_settings(name: str) -> dict[str, Any]:
    """Constructor arguments of a detector with their defaults.

    Raises:
        InputError: no detector of that name.
    """
    if name not in _REGISTRY:
        raise InputError(f"detector {name!r} is not known: {one_of(name, available_detectors())}")
    detector, defaults, _ = _REGISTRY[name]
    parameters = inspect.signature(detector.__init__).parameters.values()
    return {p.name: defaults.get(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def summary(name: str) -> str:
    """One sentence on a detector, from its docstring.

    Raises:
        InputError: no detector of that name.
    """
    defaults = default_settings(name)
    sentence = (_REGISTRY[name][0].__doc__ or "").partition("\n")[0]
    fixed = ", ".join(f"{key} {defaults[key]}" for key in _REGISTRY[name][2])
    return f"{fixed}: {sentence}" if fixed else sentence


def create_detector(name: str, **settings: Any) -> Detector:
    """A new, unfitted detector.

    Raises:
        InputError: no detector of that name, or a setting that is unknown, fixed by the name or out of range.
    """
    defaults = default_settings(name)
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        raise InputError(f"detector {name!r} has no setting {unknown[0]!r}: {one_of(unknown[0], defaults)}")
    for key in _REGISTRY[name][2]:
        if settings.get(key, defaults[key]) != defaults[key]:
            raise InputError(f"detector {name!r}: its {key} is {defaults[key]!r} by its name, got {settings[key]!r}")
    settings = {**defaults, **settings}
    detector = _REGISTRY[name][0](**settings)
    detector.name = name
    detector.settings = settings
    return detector


def changed_settings(detectors: Mapping[str, Detector], parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of every detector after `Engine.refit(**parameters)`.

    A key is a detector's name, with a dict of its settings, or a setting, applied to every detector that has it.

    Raises:
        InputError: a key that is neither.
    """
    changed = {name: dict(detector.settings) for name, detector in detectors.items()}
    known = dict.fromkeys(key for settings in changed.values() for key in settings)
    for key, value in parameters.items():
        holders = [name for name in changed if key in default_settings(name) and key not in _REGISTRY[name][2]]
        if key in changed and isinstance(value, Mapping):
            changed[key].update(value)
        elif holders:
            for name in holders:
                changed[name][key] = value
        else:
            raise InputError(
                f"refit({key}=...): expected a detector ({', '.join(changed)}) or a setting of one of them"
                f"{did_you_mean(key, [*changed, *known])}"
            )
    return changed
