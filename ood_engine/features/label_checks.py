"""Do labels, class folders and logits fit the model? Plain functions on tensors and names; `features.set_up` acts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "class_names_of",
    "folder_problem",
    "folders_of",
    "is_chance",
    "looks_multi_label",
    "renumbering",
]

_SIGNIFICANCE = 0.01
_FEWEST_PER_CLASS = 5
_DECIDED = math.log(9)  # a sigmoid outside (0.1, 0.9)
_RELATIVE = 0.2
_SHARE_DECIDED = 0.95


def is_chance(labels: Tensor, predicted: Tensor) -> tuple[bool, float]:
    """(whether agreement is no better than chance, the chance rate), for int64 [n] labels and predicted classes.

    Chance is r = Σ_c q_c q̂_c, the agreement of independent labels and predictions with these class frequencies. It is not rejected
    if P(X ≥ k) > 1 % for X ~ Binomial(n, r) and k agreements, unless not even n agreements would reject it; 1 % is our default.

    Example:
        >>> labels = torch.arange(40) % 4
        >>> is_chance(labels, labels)[0], is_chance(labels, torch.zeros_like(labels))
        (False, (True, 0.25))
    """
    count = len(labels)
    classes = int(max(labels.max(), predicted.max())) + 1
    shares = [torch.bincount(one, minlength=classes).double() / count for one in (labels, predicted)]
    rate = float(shares[0] @ shares[1])
    is_undecidable = rate**count > _SIGNIFICANCE
    agreed = int((labels == predicted).sum())
    return not is_undecidable and _binomial_tail(agreed, count, rate) > _SIGNIFICANCE, rate


def _binomial_tail(least: int, count: int, rate: float) -> float:
    """P(X ≥ least) for X ~ Binomial(count, rate)."""
    if least == 0 or rate == 0:
        return float(least == 0)
    successes = torch.arange(least, count + 1, dtype=torch.float64, device="cpu")
    failures = count - successes
    choices = math.lgamma(count + 1) - torch.lgamma(successes + 1) - torch.lgamma(failures + 1)
    return float((choices + successes * math.log(rate) + failures * math.log1p(-rate)).logsumexp(0).exp())


def renumbering(labels: Tensor, predicted: Tensor) -> dict[int, int]:
    """Label → class, for labels that seem to belong to another class than that of their number.

    Label a belongs to class b ≠ a if at least 5 samples, and more than half of a's and of those predicted as b, are in both.

    Example:
        >>> labels = torch.arange(30) % 3
        >>> renumbering(labels, (labels + 1) % 3)
        {0: 1, 1: 2, 2: 0}
    """
    pairs, counts = torch.stack([labels, predicted]).unique(dim=1, return_counts=True)
    a, b = pairs
    is_mutual = (2 * counts > torch.bincount(labels)[a]) & (2 * counts > torch.bincount(predicted)[b])
    moved = is_mutual & (a != b) & (counts >= _FEWEST_PER_CLASS)
    return dict(zip(a[moved].tolist(), b[moved].tolist(), strict=True))


def looks_multi_label(logits: Tensor) -> Tensor:
    """Bool [n]: logits [n, C] whose sigmoids are decided on no class, or on several, which a softmax would let compete.

    A row is decided if 95 % of its logits exceed log 9 (a sigmoid outside (0.1, 0.9)) and a fifth of the row's largest, in
    magnitude; cross-entropy leaves most of them near their mean. Of its classes none may be present, or from 2 to C/2: logits that
    are positive for most classes are shifted. The numbers are ours.
    """
    size = logits.abs()
    least = (_RELATIVE * size.amax(1, keepdim=True)).clamp(min=_DECIDED)
    is_decided = (size > least).double().mean(1) >= _SHARE_DECIDED
    present = (logits > 0).sum(1)
    return is_decided & (present != 1) & (2 * present <= logits.shape[1]) & (logits.shape[1] > 1)


def class_names_of(model: Any) -> list[str] | None:
    """The names of a model's classes: its `class_names`, `classes` or `config.id2label`, unless these are placeholders."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, Mapping) and sorted(named) == list(range(len(named))):
        named = [named[number] for number in range(len(named))]
    for names in (getattr(model, "class_names", None), getattr(model, "classes", None), named):
        found = _strings(names)
        if found is not None and not all(name.startswith("LABEL_") for name in found):
            return found
    return None


def folders_of(loader: Any) -> list[str] | None:
    """The class folders from which a loader numbers its labels; None if it has none, or numbers them otherwise."""
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if getattr(dataset, "target_transform", None) is not None:
        return None
    return _strings(getattr(dataset, "class_names", None)) or _strings(getattr(dataset, "classes", None))


def folder_problem(folders: Sequence[str], names: Sequence[str] | None, classes: int) -> str | None:
    """What is wrong with class folders that are numbered in their order; None if they can be the model's classes.

    Args:
        folders: names of the folders.
        names: names of the model's classes, if known.
        classes: number of the model's classes.
    """
    names = list(names) if names is not None and len(names) == classes else []
    known = [(number, name) for number, name in enumerate(folders) if name in names]
    for number, name in known:
        if names[number : number + 1] != [name]:
            return f"the class folder {name!r} is number {number}, the model's class {name!r} is number {names.index(name)}"
    if len(folders) == classes or len(known) == len(folders):
        return None
    problem = f"{len(folders)} class folders, such as {folders[0]!r}, for a head of {classes} classes"
    if len(folders) > classes:
        return problem
    return (
        f"{problem}: they are numbered in sorted order, so that every class after a missing folder has a wrong number"
    )


def _strings(names: Any) -> list[str] | None:
    is_list = isinstance(names, (list, tuple)) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None
