"""Scores of several detectors on one in-distribution set and one or more out-of-distribution sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import InputError

__all__ = ["UNPRUNED", "Evaluation", "finite", "printable"]

UNPRUNED = "unpruned"
"""Name of the unpruned head in `Evaluation.ece`."""


@dataclass
class Evaluation:
    """All data of a report. Scores: HIGHER = MORE IN-DISTRIBUTION; non-finite scores are excluded and counted.

    Arrays are converted to NumPy on construction (scores to float64), so CPU tensors and lists are accepted.

    Attributes:
        title: heading of the report.
        id_name: name of the in-distribution (ID) set.
        id_scores: detector → [N] scores of the ID set.
        ood_scores: out-of-distribution (OOD) set → detector → [N] scores, for every detector of `id_scores`.
        kinds: OOD set → a label such as "near" or "far"; optional per set.
        information: facts about the run (model, head, map, sizes, versions, machine), in display order.
        example_images: set → some of its images, [n, H, W] or [n, H, W, 3], values in [0, 1].
        thresholds: detector → decision threshold; lower scores are flagged as OOD.
        accuracy: accuracy on the ID images, a fraction in [0, 1].
        ece: head → expected calibration error on the ID images, a fraction in [0, 1]; heads are `UNPRUNED` and the names of the
            pruning detectors.

    Raises:
        InputError: no detector, no OOD set, a detector without scores on a set, scores that are not one-dimensional numbers,
            images of invalid shape, or a kind, threshold or calibration error of an unknown name.
    """

    title: str
    id_name: str
    id_scores: dict[str, np.ndarray]
    ood_scores: dict[str, dict[str, np.ndarray]]
    kinds: dict[str, str] = field(default_factory=dict)
    information: dict[str, str] = field(default_factory=dict)
    example_images: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    ece: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id_scores:
            raise InputError("id_scores is empty, expected the scores of at least one detector; score the ID set first")
        if not self.ood_scores:
            raise InputError("ood_scores is empty, expected at least one OOD set; score one beside the ID set")
        self.id_scores = _score_arrays(self.id_scores, self.id_name)
        for name, scores in self.ood_scores.items():
            _check_same_detectors(self.detectors, scores, name)
        self.ood_scores = {name: _score_arrays(scores, name) for name, scores in self.ood_scores.items()}
        self.example_images = {name: _image_array(images, name) for name, images in self.example_images.items()}
        _check_known("kinds", self.kinds, "an OOD set", self.ood_scores)
        _check_known("thresholds", self.thresholds, "a detector", self.id_scores)
        _check_known("ece", self.ece, "a head", (UNPRUNED, *self.id_scores))
        if self.accuracy is not None and not 0.0 <= self.accuracy <= 1.0:
            raise InputError(f"accuracy is {self.accuracy}, expected a fraction in [0, 1]; divide percent by 100")

    def only(self, detectors: Iterable[str]) -> Evaluation:
        """The evaluation restricted to some detectors, in the given order.

        Raises:
            InputError: a detector without scores.
        """
        names = list(detectors)
        _check_known("only", dict.fromkeys(names), "a detector", self.id_scores)
        return replace(
            self,
            id_scores={name: self.id_scores[name] for name in names},
            ood_scores={ood: {name: scores[name] for name in names} for ood, scores in self.ood_scores.items()},
            thresholds={name: value for name, value in self.thresholds.items() if name in names},
            ece={name: value for name, value in self.ece.items() if name in (UNPRUNED, *names)},
        )

    @property
    def detectors(self) -> list[str]:
        """Names of the detectors, in the given order."""
        return list(self.id_scores)


def finite(scores: np.ndarray) -> np.ndarray:
    """The finite entries of scores [N], in order: [M] with M <= N."""
    return scores[np.isfinite(scores)]


def printable(name: object) -> str:
    """The text on one line, with U+FFFD for control, format and undecodable characters."""
    spaced = "".join(" " if character.isspace() else character for character in str(name))
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in spaced)


def _score_arrays(scores: Mapping[str, np.ndarray], set_name: str) -> dict[str, np.ndarray]:
    arrays = {}
    for detector, values in scores.items():
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"scores of {detector!r} on {set_name!r} are not numbers ({error}); pass one real number per image"
            ) from error
        if array.ndim != 1:
            raise InputError(
                f"scores of {detector!r} on {set_name!r} have shape {list(array.shape)}, expected [N]; "
                "pass one number per image"
            )
        arrays[detector] = array
    return arrays


def _image_array(images: np.ndarray, set_name: str) -> np.ndarray:
    array = np.asarray(images)
    grey, colour = array.ndim == 3, array.ndim == 4 and array.shape[-1] == 3
    if not (grey or colour) or 0 in array.shape[1:]:
        raise InputError(
            f"example_images of {set_name!r} have shape {list(array.shape)}, expected [n, H, W] or [n, H, W, 3]; "
            "move the channels last"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"example_images of {set_name!r} have dtype {array.dtype}, expected floats in [0, 1]; divide bytes by 255"
        )
    return array


def _check_same_detectors(detectors: list[str], scores: Mapping[str, np.ndarray], set_name: str) -> None:
    if set(scores) != set(detectors):
        raise InputError(
            f"OOD set {set_name!r} has scores of {sorted(scores)}, expected those of the ID set, {sorted(detectors)}; "
            "score every set with the same detectors"
        )


def _check_known(field_name: str, given: Iterable[str], what: str, known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{field_name} names {unknown}, expected {what} out of {sorted(known)}; correct the name")
