"""Do labels, class folders and logits fit the model? Plain functions on tensors and names; `features.set_up` acts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

__all__ = [
    "class_names_of",
    "folder_problem",
    "folders_of",
    "is_chance",
    "multi_label_rows",
    "renumbering",
]

_SIGNIFICANCE = 0.01
_FEWEST_PER_CLASS = 5
_DECIDED = math.log(9)  # a sigmoid outside (0.1, 0.9)
_RELATIVE = 0.2
_SHARE_DECIDED = 0.95
_SHARE = 0.1
_SHARE_UNDECIDED = 0.2
_PERMUTATIONS = 199


def is_chance(labels: Tensor, predicted: Tensor) -> tuple[bool, float]:
    """(whether agreement is no better than chance, the chance rate), for int64 [n] labels and predicted classes.

    Chance is r = Σ_c q_c q̂_c, the agreement of independent labels and predictions with these class frequencies. It is not rejected
    if P(X ≥ k) > 1 % for X ~ Binomial(n, r) and k agreements, unless not even n agreements would reject it; 1 % is our default.
    Where most samples are of one class the binomial hides what is right of the others, so that random permutations of the labels
    must agree as often, too. Labels of a single class that most predictions share decide nothing.

    Example:
        >>> labels = torch.arange(40) % 4
        >>> is_chance(labels, labels)[0], is_chance(labels, torch.zeros_like(labels))
        (False, (True, 0.25))
    """
    count = len(labels)
    classes = int(max(labels.max(), predicted.max())) + 1
    shares = [torch.bincount(one, minlength=classes).double() / count for one in (labels, predicted)]
    rate = float(shares[0] @ shares[1])
    agreed = int((labels == predicted).sum())
    is_undecidable = rate**count > _SIGNIFICANCE or (bool((labels == labels[0]).all()) and 2 * agreed > count)
    is_frequent = not is_undecidable and _binomial_tail(agreed, count, rate) > _SIGNIFICANCE
    return is_frequent and _agrees_permuted(labels, predicted), rate


def _binomial_tail(least: int, count: int, rate: float) -> float:
    """P(X ≥ least) for X ~ Binomial(count, rate)."""
    if least == 0 or rate == 0:
        return float(least == 0)
    successes = torch.arange(least, count + 1, dtype=torch.float64, device="cpu")
    failures = count - successes
    choices = math.lgamma(count + 1) - torch.lgamma(successes + 1) - torch.lgamma(failures + 1)
    return float((choices + successes * math.log(rate) + failures * math.log1p(-rate)).logsumexp(0).exp())


def _agrees_permuted(labels: Tensor, predicted: Tensor) -> bool:
    """Whether P(X ≥ k) > 1 % for k agreements, and X those of randomly permuted labels, estimated with a seed of its own."""
    generator = torch.Generator().manual_seed(0)
    least, reached = int((labels == predicted).sum()), 0
    for _ in range(_PERMUTATIONS):
        permuted = labels[torch.randperm(len(labels), generator=generator, device="cpu")]
        reached += int((permuted == predicted).sum()) >= least
        if 1 + reached > _SIGNIFICANCE * (1 + _PERMUTATIONS):
            return True
    return False


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


def multi_label_rows(logits: Tensor, *, have_class: bool = False) -> int:
    """How many rows of logits [n, C] say 'no class' or 'several classes', as sigmoids; 0 unless they are a multi-label model's.

    A row is decided if its largest logit and 95 % of all exceed, in magnitude, log 9 (a sigmoid outside (0.1, 0.9)) and a fifth of
    the row's largest; cross-entropy leaves most of them near their mean. Of its classes none may be present, or from 2 to C/2:
    logits that are positive for most classes are shifted. A softmax is blind to a shift, which spreads its rows over the threshold
    or leaves none above it. So over 10 % of the rows must say so, over 10 % have a class, and the undecided be at most 20 %, or
    fewer than those of several classes. The numbers are ours.

    Args:
        logits: of ID samples.
        have_class: each sample is known to have a class, so that 'no class' only means a small logit.
    """
    if logits.shape[1] == 1:
        return 0
    size = logits.abs()
    is_large = size > (_RELATIVE * size.amax(1, keepdim=True)).clamp(min=_DECIDED)
    top = logits.argmax(1, keepdim=True)
    is_decided = (is_large.double().mean(1) >= _SHARE_DECIDED) & is_large.gather(1, top)[:, 0]
    present = (logits > 0).sum(1)
    kinds = (present == 0, present == 1, (present > 1) & (2 * present <= logits.shape[1]))
    none, one, several = (int((is_decided & kind).sum()) for kind in kinds)
    found = several + (0 if have_class else none)
    undecided = len(logits) - int(is_decided.sum())
    is_multi_label = min(found, one + several) > _SHARE * len(logits) and (
        undecided <= max(_SHARE_UNDECIDED * len(logits), several)
    )
    return found if is_multi_label else 0


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
    while isinstance(dataset, Subset):  # other wrappers may map the labels
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
