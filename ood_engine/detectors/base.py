"""What a detector is, and the names under which detectors are found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ood_kernels.types import HasBasisTensors

from ..errors import InputError
from ..features.fit_data import FitData
from ..features.signals import Signals
from ..fitted import FittedModule
from ..runtime import Masks

__all__ = ["Detector", "available_detectors", "changed_settings", "create_detector", "default_settings", "register"]


class Detector(FittedModule):
    """One score: `forward(signals)` gives [N], higher = more in-distribution; the fitted state is its buffers.

    Attributes:
        name: the registered name it was made under.
        settings: every constructor argument with its value, enough to make it again.
        needs_map: whether it reads the feature map; a model without one cannot have it.
        prunes: whether it scores a pruned head, whose `masks` it then has.
        revision: how often its settings were changed since it was made.
    """

    needs_map: ClassVar[bool] = False
    prunes: ClassVar[bool] = False

    def __init__(self, *fitted: str) -> None:
        super().__init__(*fitted)
        self.name = type(self).__name__
        self.settings: dict[str, Any] = {}
        self.revision = 0

    def fit(self, data: FitData) -> None:
        """Fit the buffers from cached ID samples; a detector without any needs nothing."""

    def forward(self, signals: Signals) -> Tensor:
        """Score [N], higher = more in-distribution."""
        raise NotImplementedError

    @property
    def eps(self) -> float | None:
        """The NAP constant that its score needs; None where it reads no map."""
        return None

    @property
    def masks(self) -> Masks | None:
        """The masks of the pruned head that its score needs; None where it prunes nothing."""
        return None

    @property
    def gradient_basis(self) -> HasBasisTensors | None:
        """The subspace whose coordinates its score needs; None where it needs none."""
        return None

    def grid(self) -> Sequence[dict[str, Any]]:
        """Settings worth trying on pseudo-OOD data that `configure` takes without a refit; empty where there are none."""
        return ()

    def configure(self, **settings: Any) -> None:
        """Change settings that need no refit."""
        self.settings.update(settings)
        self.revision += 1


_DetectorType = TypeVar("_DetectorType", bound=type[Detector])
_REGISTRY: dict[str, tuple[type[Detector], dict[str, Any], tuple[str, ...]]] = {}


def register(name: str, *, fixed: tuple[str, ...] = (), **defaults: Any) -> Callable[[_DetectorType], _DetectorType]:
    """Class decorator: make the detector available as `name`, with defaults of its own; those in `fixed` are what it is."""

    def add(detector: _DetectorType) -> _DetectorType:
        _REGISTRY[name] = (detector, defaults, fixed)
        return detector

    return add


def available_detectors() -> tuple[str, ...]:
    """The names that `Engine(detectors=...)` accepts."""
    return tuple(sorted(_REGISTRY))


def default_settings(name: str) -> dict[str, Any]:
    """Constructor arguments of a detector with their defaults.

    Raises:
        InputError: no detector of that name.
    """
    if name not in _REGISTRY:
        raise InputError(f"detector {name!r} is not known: expected one of {', '.join(available_detectors())}")
    detector, defaults, _ = _REGISTRY[name]
    parameters = inspect.signature(detector.__init__).parameters.values()
    return {p.name: defaults.get(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def create_detector(name: str, **settings: Any) -> Detector:
    """A new, unfitted detector.

    Raises:
        InputError: no detector of that name, or a setting it does not have, that its name fixes or that is out of range.
    """
    defaults = default_settings(name)
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        known = ", ".join(defaults) or "none"
        raise InputError(f"detector {name!r} has no setting {unknown[0]!r}: expected one of {known}")
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

    A key is either a detector's name, with a dict of its settings, or the name of a setting, which goes to all that have it.

    Raises:
        InputError: a key that is neither.
    """
    changed = {name: dict(detector.settings) for name, detector in detectors.items()}
    for key, value in parameters.items():
        holders = [name for name in changed if key in default_settings(name) and key not in _REGISTRY[name][2]]
        if key in changed and isinstance(value, Mapping):
            changed[key].update(value)
        elif holders:
            for name in holders:
                changed[name][key] = value
        else:
            raise InputError(
                f"refit({key}=...): expected a detector ({', '.join(changed)}) or a setting that one of them has"
            )
    return changed
