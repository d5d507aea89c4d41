"""AUROC, FPR at 95 % TPR and AUPR of scores that are there already, half of them of OOD samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor

from ... import metrics
from ..cases import OURS, Case, Effort, MissingProviderError, Plan, Provider, providers_of
from ..operands import series
from ..peers import OODEEL, PYTORCH_OOD, import_peer

__all__ = ["SUBJECTS", "case_of", "plans"]

SCIKIT_LEARN = "scikit-learn"
ROC = "auroc, fpr95"
ALL = "auroc, fpr95, aupr"
SUBJECTS = (ROC, ALL)
"""oodeel has no AUPR, so that the figures it has are a subject of their own."""

_TPR = 0.95
_SECONDS = 0.1
_MOST_FOR_OODEEL = 50_000
_LEAST_TOLERANCE, _TOLERATED_SCORES = 1e-3, 20


def plans(effort: Effort) -> Iterator[Plan]:
    """20 000 scores, and along their number."""
    for subject in SUBJECTS:
        values = (2_000, 6_000, 20_000) if effort.is_quick else (2_000, 6_000, 20_000, 200_000)
        for sizes, sweeps in series({"N": 20_000}, N=values):
            build = partial(case_of, subject, sizes["N"])
            yield Plan(subject, "scores", sizes, build, torch.float64, sweeps=sweeps, seconds=_SECONDS)


def case_of(subject: str, samples: int) -> Case:
    """The case of one of `SUBJECTS`; the scores lie on the CPU, where metrics are computed."""
    generator = torch.Generator().manual_seed(0)
    id_scores, ood_scores = torch.randn(2, samples // 2, generator=generator, dtype=torch.float64)
    id_scores += 1.5
    makers: list[Callable[..., Provider]] = [_ours, _scikit_learn, _pytorch_ood]
    if subject == ROC:
        makers.append(_oodeel)
    found, missing = providers_of(*(partial(make, id_scores, ood_scores, subject == ALL) for make in makers))
    return Case(found, _truth(id_scores, ood_scores)[: 3 if subject == ALL else 2], None, missing)


def _truth(id_scores: Tensor, ood_scores: Tensor) -> list[Tensor]:
    """By counting: there are no ties. OOD is the positive class, found at low scores."""
    labels = torch.cat([torch.zeros_like(id_scores), torch.ones_like(ood_scores)])
    found = labels[torch.cat([id_scores, ood_scores]).argsort()]
    recall, false_rate = found.cumsum(0) / len(ood_scores), (1 - found).cumsum(0) / len(id_scores)
    area = (found * (1 - false_rate)).sum() / len(ood_scores)
    precision = found.cumsum(0) / torch.arange(1, len(found) + 1)
    start = precision.new_tensor([1.0]), recall.new_tensor([0.0])
    precision, recall_from_0 = torch.cat([start[0], precision]), torch.cat([start[1], recall])
    return [area, false_rate[recall >= _TPR].amin(), torch.trapezoid(precision, recall_from_0)]


def _figures(values: Any) -> list[Tensor]:
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def _ours(id_scores: Tensor, ood_scores: Tensor, has_aupr: bool) -> Provider:
    def call() -> list[float]:
        figures = [
            metrics.auroc(id_scores, ood_scores),
            metrics.fpr_at_tpr(id_scores, ood_scores, positive="ood", tpr=_TPR),
        ]
        return [*figures, metrics.aupr(id_scores, ood_scores, positive="ood")] if has_aupr else figures

    return Provider(OURS, call, check=_figures, uses_numpy=True)


def _arrays(id_scores: Tensor, ood_scores: Tensor) -> tuple[Any, Any]:
    """Labels, 1 = OOD, and outlier scores."""
    labels = np.concatenate([np.zeros(len(id_scores), int), np.ones(len(ood_scores), int)])
    return labels, -torch.cat([id_scores, ood_scores]).numpy()


def _scikit_learn(id_scores: Tensor, ood_scores: Tensor, has_aupr: bool) -> Provider:
    labels, outlier_scores = _arrays(id_scores, ood_scores)

    def call() -> list[float]:
        false_rates, true_rates, _ = roc_curve(labels, outlier_scores, drop_intermediate=False)
        figures = [roc_auc_score(labels, outlier_scores), false_rates[true_rates >= _TPR].min()]
        if has_aupr:
            precision, recall, _ = precision_recall_curve(labels, outlier_scores)
            figures.append(auc(recall, precision))
        return figures

    return Provider(SCIKIT_LEARN, call, check=_figures, uses_numpy=True, note="by its functions one by one")


def _pytorch_ood(id_scores: Tensor, ood_scores: Tensor, has_aupr: bool) -> Provider:
    functional = import_peer(PYTORCH_OOD).metrics.functional
    outlier_scores = -torch.cat([id_scores, ood_scores])
    labels = torch.cat([torch.zeros_like(id_scores), -torch.ones_like(ood_scores)]).long()

    def call() -> list[Tensor]:
        figures = [functional.auroc(outlier_scores, labels), functional.fpr_at_tpr(outlier_scores, labels, _TPR)]
        return [*figures, functional.aupr(outlier_scores, labels)] if has_aupr else figures

    return Provider(PYTORCH_OOD, call, check=_figures)


def _oodeel(id_scores: Tensor, ood_scores: Tensor, has_aupr: bool) -> Provider:
    assert not has_aupr
    samples = len(id_scores) + len(ood_scores)
    if samples > _MOST_FOR_OODEEL:
        raise MissingProviderError(OODEEL, f"metrics: quadratic in N, too long for {samples} scores")
    evaluate = import_peer(OODEEL).eval.metrics.bench_metrics
    outlier_scores = (-id_scores).numpy(), (-ood_scores).numpy()

    def call() -> list[float]:
        figures = evaluate(outlier_scores, metrics=["auroc", "fpr95tpr"])
        return [figures["auroc"], figures["fpr95tpr"]]

    # All scores between two of its thresholds may be of ID samples.
    tolerance = max(_LEAST_TOLERANCE, _TOLERATED_SCORES / samples)
    note = "looks at every 4th threshold, and for FPR takes the first beyond 95 %"
    return Provider(OODEEL, call, check=_figures, tolerance=tolerance, uses_numpy=True, note=note)
