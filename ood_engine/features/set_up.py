"""Objections of `fit` to a set-up that cannot be right: raised, or overruled and kept in the state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.nn import functional as F

import ood_kernels as ok

from ..errors import InputError, OodEngineWarning
from .cache import NO_LABEL, FeatureCache
from .fit_data import FitData
from .label_checks import (
    folder_problem,
    folders_of,
    is_chance,
    multi_label_rows,
    renumbering,
)

__all__ = ["Labels", "SetUp"]

Labels = Literal["given", "predicted"]
"""Classes for detectors that need labels: those of the loader, or those that the model predicts."""

_EXPECTED_AGREEMENT = 0.9
_POOR_AGREEMENT = 0.5
_NAMED = 3
_SUSPECTS = "check mean and std, image size, channel order, the weights, and the numbering of the classes"
_WITHOUT_LABELS = "fit without them by labels='predicted' (--labels predicted)"
_ONLY_NAP = "detectors=['nap'] (--detectors nap), without labels or with labels='predicted' (--labels predicted)"
_MULTI_LABEL = f"most detectors assume exactly one class per image; choose those that do not, {_ONLY_NAP}"


class Needs(Protocol):
    """What a detector needs, as its class says."""

    needs_map: ClassVar[bool]
    assumes_one_class: ClassVar[bool]


@dataclass
class SetUp:
    """The set-up of one fit.

    Attributes:
        labels: which classes the detectors are fitted on.
        force: overrule objections, which then are warnings.
        label_agreement: share of the given labels that the model predicts; None without labels, or before `check_labels`.
        overruled: the objections overruled.
        are_numbers_known: whether the given labels are numbered as the model's classes, as far as folders and predictions tell.

    Raises:
        InputError: unknown `labels`.
    """

    labels: Labels = "given"
    force: bool = False
    label_agreement: float | None = None
    overruled: list[str] = field(default_factory=list)
    are_numbers_known: bool = True
    _are_labels_checked: bool = True

    def __post_init__(self) -> None:
        if self.labels not in ("given", "predicted"):
            raise InputError(f"labels={self.labels!r}: expected 'given' or 'predicted'")

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> SetUp:
        """The set-up recorded in a state file."""
        return cls(force=bool(record["overruled"]), **record)

    @property
    def record(self) -> dict[str, Any]:
        """What a state file keeps, in JSON values."""
        return {"labels": self.labels, "label_agreement": self.label_agreement, "overruled": self.overruled}

    def check_cache(self, cache: FeatureCache, head: ok.Head, detectors: Mapping[str, Needs], is_pooled: bool) -> None:
        """Raise InputError for precomputed features of another width, or without what a detector needs of the map.

        Args:
            cache: the features.
            head: the unpruned head.
            detectors: name → detector.
            is_pooled: whether the features are the mean of NAP's map.
        """
        width, needing = head.weight.shape[1], [name for name, one in detectors.items() if one.needs_map]
        if cache.rows.features.shape[1] != width:
            raise InputError(
                f"cache of {cache.rows.features.shape[1]} features per sample: expected {width}, the width of the head"
            )
        if needing and not cache.has_map:
            raise InputError(
                f"{', '.join(needing)}: expected a cache with the maximum of each channel; pass maximum=..., or omit the detector"
            )
        if needing and not is_pooled and cache.rows.nap_mean.shape[1] == 0:
            raise InputError(
                f"{', '.join(needing)}: expected a cache with the mean of each channel of NAP's map, which the features of this"
                " model are not; make it by engine.extract(loader), or omit the detector"
            )

    def check_head(self, head: ok.Head, sigmoid: bool, detectors: Mapping[str, Needs]) -> None:
        """Object to a head whose outputs are no logits of exclusive classes, if any detector takes them for such.

        Args:
            head: the unpruned head.
            sigmoid: whether the model returns sigmoids of its output, see `TapPlan.sigmoid`.
            detectors: name → detector.

        Raises:
            InputError: a head of one logit, whatever is forced, or a model that returns sigmoids.
        """
        assuming = [name for name, one in detectors.items() if one.assumes_one_class]
        if not assuming:
            return
        if head.weight.shape[0] == 1:
            raise InputError(
                f"the head has one logit z, whose softmax is 1 for every image, so {', '.join(assuming)} mean nothing: expected one"
                " logit per class; replace it by the nn.Linear of two classes with weight [[0], [w]] and bias [0, b], whose softmax"
                f" is the sigmoid of z, or choose detectors that do not read it, {_ONLY_NAP}"
            )
        if sigmoid:
            self._object(f"the outputs are sigmoids, which do not sum to 1: {_MULTI_LABEL}")

    def check_folders(self, loader: Any, given: Tensor, names: Sequence[str] | None, classes: int) -> None:
        """Object to class folders that cannot be the model's classes, on the first batch.

        Args:
            loader: the loader.
            given: its first labels; without any, folders mean nothing.
            names: names of the model's classes, if known.
            classes: number of the model's classes.

        Raises:
            InputError: as said.
        """
        folders = folders_of(loader)
        problem = folders and folder_problem(folders, names, classes)
        if not problem or not (given != NO_LABEL).any():
            return
        self.are_numbers_known = False
        if self.labels == "predicted":
            self._are_labels_checked = False
        else:
            self._object(
                f"{problem}: expected one folder per class of the model; add or rename folders, or number the labels by the model's"
                f" classes, or {_WITHOUT_LABELS}",
                is_forcible=len(folders or ()) <= classes,
            )

    def check_labels(self, data: FitData, detectors: Mapping[str, Needs]) -> None:
        """Object to labels that agree with the predictions only by chance, and to logits of a multi-label model.

        Raises:
            InputError: as said.
        """
        self._check_agreement(data)
        if any(one.assumes_one_class for one in detectors.values()):
            self._check_multi_label(data)

    def _check_agreement(self, data: FitData) -> None:
        labels = data.cache.rows.labels
        labelled = labels != NO_LABEL
        if not labelled.any() or not self._are_labels_checked:
            return
        labels, predicted = labels[labelled], data.predicted[labelled]
        if not 0 <= int(labels.min()) <= int(labels.max()) < data.head.weight.shape[0]:
            return  # of other classes, and not read
        self.label_agreement = float((labels == predicted).double().mean())
        by_chance, chance = is_chance(labels, predicted)
        hint = _hint(labels, predicted)
        self.are_numbers_known &= not hint
        said = f"the model predicts {100 * self.label_agreement:.1f} % of {len(labels)} labels"
        suspects = _SUSPECTS + (f", or {_WITHOUT_LABELS}" if hint else "")
        if hint and self.labels == "predicted":
            return  # the images are right, and their labels not read
        if by_chance:
            self._object(f"{said}, no more than by chance ({100 * chance:.1f} %){hint}: expected far more; {suspects}")
        elif self.labels == "given" and (hint or self.label_agreement < _POOR_AGREEMENT):
            warnings.warn(f"{said}{hint}; {suspects}", OodEngineWarning, stacklevel=5)

    def warn_of_labels(self, data: FitData) -> None:
        """Warn if detectors were fitted on labels of which fewer than 90 % are predicted."""
        if not data.are_labels_read or self.labels == "predicted" or self.overruled or self.label_agreement is None:
            return
        if self.label_agreement < _EXPECTED_AGREEMENT:
            warnings.warn(
                f"detectors were fitted on labels of which the model predicts {100 * self.label_agreement:.1f} %, and wrong labels"
                " mislead them more than none: expected at least 90 %; check the labels, or fit on the predicted classes by"
                " labels='predicted' (--labels predicted)",
                OodEngineWarning,
                stacklevel=5,
            )

    def _check_multi_label(self, data: FitData) -> None:
        logits = _logits(data.head, next(data.signals()).features)
        have_class = self.label_agreement is not None and self.label_agreement >= _POOR_AGREEMENT
        count = multi_label_rows(logits, have_class=have_class)
        if count:
            self._object(
                f"the logits of {count} of {len(logits)} images say 'no class' or 'several classes', as of a multi-label model, or"
                f" of images not prepared as in its training: {_MULTI_LABEL}"
            )

    def _object(self, objection: str, *, is_forcible: bool = True) -> None:
        if not self.force:
            way_out = "; or go on by force=True (--force), which the state records" if is_forcible else ""
            raise InputError(f"{objection}{way_out}")
        if objection not in self.overruled:
            self.overruled.append(objection)
            warnings.warn(f"overruled by force: {objection}", OodEngineWarning, stacklevel=5)


def _logits(head: ok.Head, features: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.to(features.dtype)
    return F.linear(features, head.weight.to(features.dtype), bias)


def _hint(labels: Tensor, predicted: Tensor) -> str:
    """The numbering of the classes under which more labels would agree; empty if there is none."""
    moved = renumbering(labels, predicted)
    if not moved:
        return ""
    renumbered = labels.clone()
    for label, number in moved.items():
        renumbered[labels == label] = number
    share = float((renumbered == predicted).double().mean())
    if is_chance(renumbered, predicted)[0]:
        return ""
    few = ", ".join(f"{label} → {number}" for label, number in list(moved.items())[:_NAMED])
    more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
    return f", but {100 * share:.1f} % of them once renumbered (label → class: {few}{more})"
