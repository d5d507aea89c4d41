"""Metrics of the separation of in-distribution (ID) from out-of-distribution (OOD) samples, and calibration error.

Scores are 1-D torch tensors, NumPy arrays or sequences of numbers; higher means more in-distribution. All metrics but the
calibration error depend on the order of the scores only. Results are fractions in [0, 1], computed in fp64.

`positive` names the positive class: "id" ranks by the score, "ood" by its negative. All metrics but AUROC depend on it, and
published tables use both.

scikit-learn is imported by the first call, because its import takes as long as that of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import InputError, one_line

__all__ = [
    "aupr",
    "auroc",
    "average_precision",
    "ece_from_confidence",
    "evaluate",
    "expected_calibration_error",
    "fpr_at_tpr",
]

ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[float]

_SUM_TOLERANCE = 0.01


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Area under the ROC curve: P(ID score > OOD score) + P(equal) / 2 for a random pair; independent of the positive class.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite.

    Example:
        >>> round(auroc([0.8, 0.9, 0.7, 0.6], [0.1, 0.3, 0.65]), 4)
        0.9167
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_ranking(id_scores, ood_scores, "id")))


def aupr(id_scores: ArrayLike, ood_scores: ArrayLike, *, positive: str) -> float:
    """Area under the precision-recall curve by the trapezoidal rule, as reported by pytorch-ood and OpenOOD.

    Equal to `sklearn.metrics.auc(recall, precision)`. Linear interpolation between points is optimistic, above all with ties;
    see `average_precision`.

    Args:
        id_scores: [N].
        ood_scores: [M].
        positive: "id" or "ood", the positive class.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite; an unknown `positive`.

    Example:
        >>> round(aupr([0.8, 0.9, 0.7, 0.6], [0.1, 0.3, 0.65], positive="id"), 4)
        0.9437
    """
    from sklearn.metrics import auc, precision_recall_curve

    precision, recall, _ = precision_recall_curve(*_ranking(id_scores, ood_scores, positive))
    return float(auc(recall, precision))


def average_precision(id_scores: ArrayLike, ood_scores: ArrayLike, *, positive: str) -> float:
    """Average precision: sum of (R_k - R_(k-1)) P_k over the thresholds, without interpolation.

    Args:
        id_scores: [N].
        ood_scores: [M].
        positive: "id" or "ood", the positive class.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite; an unknown `positive`.

    Example:
        >>> round(average_precision([0.8, 0.9, 0.7, 0.6], [0.1, 0.3, 0.65], positive="id"), 4)
        0.95
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_ranking(id_scores, ood_scores, positive)))


def fpr_at_tpr(id_scores: ArrayLike, ood_scores: ArrayLike, *, positive: str = "id", tpr: float = 0.95) -> float:
    """False positive rate at a true positive rate of at least `tpr`; FPR at 95 % TPR by default.

    The smallest rate among the thresholds at observed scores; ties fall on one side, and nothing is interpolated.

    Args:
        id_scores: [N].
        ood_scores: [M].
        positive: the positive class. "id": share of OOD samples accepted when at least `tpr` of the ID samples are accepted (the
            convention of the NAP, OPNP and low-dimensional-gradient papers). "ood": share of ID samples flagged when at least
            `tpr` of the OOD samples are flagged (OpenOOD, pytorch-ood).
        tpr: a fraction in (0, 1].

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite; an unknown `positive`; a `tpr` outside (0, 1].

    Example:
        >>> round(fpr_at_tpr([0.8, 0.9, 0.7, 0.6], [0.1, 0.3, 0.65]), 4)
        0.3333
        >>> fpr_at_tpr([0.8, 0.9, 0.7, 0.6], [0.1, 0.3, 0.65], positive="ood")
        0.25
    """
    from sklearn.metrics import roc_curve

    if not isinstance(tpr, (int, float)) or not 0 < tpr <= 1:
        raise InputError(f"tpr must be a fraction in (0, 1], not {tpr!r}; write 95 % as 0.95")
    labels, scores = _ranking(id_scores, ood_scores, positive)
    false_rates, true_rates, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(false_rates[true_rates >= tpr].min())


def evaluate(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """All separation metrics of one detector on one ID set and one OOD set.

    Returns:
        auroc, aupr_id, aupr_ood, average_precision_id, average_precision_ood, fpr95_id and fpr95_ood; the suffix is the
        positive class, and fpr95 is `fpr_at_tpr` at 0.95.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite.

    Example:
        >>> figures = evaluate([0.8, 0.9, 0.7, 0.6], [0.1, 0.3, 0.65])
        >>> {name: round(value, 3) for name, value in figures.items() if name.startswith("fpr")}
        {'fpr95_id': 0.333, 'fpr95_ood': 0.25}
    """
    figures = {"auroc": auroc(id_scores, ood_scores)}
    for name, metric in (("aupr", aupr), ("average_precision", average_precision), ("fpr95", fpr_at_tpr)):
        for positive in ("id", "ood"):
            figures[f"{name}_{positive}"] = metric(id_scores, ood_scores, positive=positive)
    return figures


def expected_calibration_error(
    probabilities: ArrayLike | Sequence[Sequence[float]], labels: ArrayLike, n_bins: int = 15
) -> float:
    """Expected calibration error of a classifier: sum over bins of |accuracy - mean confidence| × share of samples.

    Guo et al., arXiv 1706.04599, equation 3. The confidence is the largest probability; the bins are of equal width and closed
    on the right: ((m - 1) / n_bins, m / n_bins]. Ties are resolved in favour of the first class.

    Args:
        probabilities: [N, C], rows that sum to 1 (within 0.01, for half precision).
        labels: [N], integers in [0, C).
        n_bins: at least 1.

    Raises:
        InputError: invalid shapes, types or ranges; values that are not finite.

    Example:
        >>> round(expected_calibration_error([[0.9, 0.1], [0.3, 0.7]], [0, 0]), 4)
        0.4
    """
    chances = _finite("probabilities", probabilities, ndim=2)
    classes = _array("labels", labels)
    if classes.dtype.kind not in "iu" or classes.shape != chances.shape[:1]:
        raise InputError(
            f"labels must be {len(chances)} integers, one per row of probabilities, "
            f"not {classes.dtype} of shape {list(classes.shape)}"
        )
    if classes.min() < 0 or classes.max() >= chances.shape[1]:
        raise InputError(
            f"labels must lie in [0, {chances.shape[1]}), as probabilities have {chances.shape[1]} columns, "
            f"not in [{classes.min()}, {classes.max()}]"
        )
    if chances.min() < 0 or np.abs(chances.sum(1) - 1).max() > _SUM_TOLERANCE:
        raise InputError("probabilities must be >= 0 and sum to 1 in each row; apply a softmax to logits first")

    return ece_from_confidence(chances.max(1), chances.argmax(1) == classes, n_bins)


def ece_from_confidence(confidence: ArrayLike, is_right: ArrayLike, n_bins: int = 15) -> float:
    """Expected calibration error from confidences alone, for sets whose probabilities [N, C] do not fit in memory.

    Args:
        confidence: [N] largest probability of each sample, in [0, 1].
        is_right: bool [N], whether the predicted class is the label.
        n_bins: at least 1; see `expected_calibration_error`.

    Raises:
        InputError: invalid shapes, types or ranges; values that are not finite.

    Example:
        >>> import numpy as np
        >>> round(ece_from_confidence([0.9, 0.7], np.array([True, False])), 4)
        0.4
    """
    if not isinstance(n_bins, int) or n_bins < 1:
        raise InputError(f"n_bins must be an integer of at least 1, not {n_bins!r}")
    confidences, rights = _finite("confidence", confidence, ndim=1), _array("is_right", is_right)
    if confidences.min() < 0 or confidences.max() > 1 + _SUM_TOLERANCE:
        raise InputError(f"confidence must lie in [0, 1], not in [{confidences.min():.3g}, {confidences.max():.3g}]")
    if rights.dtype != bool or rights.shape != confidences.shape:
        raise InputError(
            f"is_right must be {len(confidences)} booleans, one per confidence, not {rights.dtype} of shape {list(rights.shape)}"
        )
    inner_edges = np.arange(1, n_bins) / n_bins
    bins = np.digitize(confidences, inner_edges, right=True)
    return float(np.abs(np.bincount(bins, weights=rights - confidences)).sum() / len(confidences))


def _ranking(id_scores: ArrayLike, ood_scores: ArrayLike, positive: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Labels (1 = positive class) and scores oriented so that the positive class ranks higher, both [n_id + n_ood]."""
    if positive not in ("id", "ood"):
        raise InputError(f'positive must be "id" or "ood", the positive class, not {positive!r}')
    id_values = _finite("id_scores", id_scores, ndim=1)
    ood_values = _finite("ood_scores", ood_scores, ndim=1)
    scores = np.concatenate([id_values, ood_values])
    is_id = np.arange(len(scores)) < len(id_values)
    return (is_id.astype(int), scores) if positive == "id" else ((~is_id).astype(int), -scores)


def _finite(name: str, values: object, *, ndim: int) -> npt.NDArray[np.float64]:
    array = _array(name, values)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name} must hold real numbers, not {array.dtype}")
    if array.ndim != ndim or array.size == 0:
        raise InputError(f"{name} must be {ndim}-D and not empty, not of shape {list(array.shape)}")
    array = array.astype(np.float64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise InputError(f"{name} holds {bad} of {array.size} values that are NaN or infinite; leave those samples out")
    return array


def _array(name: str, values: object) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as an array of numbers: {one_line(error)}") from error
