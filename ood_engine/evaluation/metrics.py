"""How well scores separate in-distribution (ID) from out-of-distribution (OOD) samples; calibration error.

Scores are 1-D torch tensors, numpy arrays or sequences of numbers; higher means more in-distribution. Only the order of
the scores counts, except in the calibration error. Results are fractions in [0, 1], computed in fp64.

`positive` names the class that is looked for: "id" ranks by the score, "ood" by its negative. Every figure but AUROC
depends on it, and published tables use both.

scikit-learn is imported by the first call, as it takes as long to import as torch.
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
    """Area under the ROC curve: P(ID score > OOD score) + P(equal) / 2 of a random pair.

    It is the same whichever class is positive.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_ranking(id_scores, ood_scores, "id")))


def aupr(id_scores: ArrayLike, ood_scores: ArrayLike, *, positive: str) -> float:
    """Area under the precision-recall curve by the trapezoid rule, as pytorch-ood and OpenOOD report it.

    It equals `sklearn.metrics.auc(recall, precision)`. Interpolating between points is optimistic, above all with ties;
    see `average_precision`.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite; an unknown `positive`.
    """
    from sklearn.metrics import auc, precision_recall_curve

    precision, recall, _ = precision_recall_curve(*_ranking(id_scores, ood_scores, positive))
    return float(auc(recall, precision))


def average_precision(id_scores: ArrayLike, ood_scores: ArrayLike, *, positive: str) -> float:
    """Average precision: sum of (R_k - R_(k-1)) P_k over the thresholds, without interpolation.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite; an unknown `positive`.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_ranking(id_scores, ood_scores, positive)))


def fpr_at_tpr(id_scores: ArrayLike, ood_scores: ArrayLike, *, positive: str = "id", tpr: float = 0.95) -> float:
    """Smallest false positive rate among the thresholds with a true positive rate of at least `tpr`.

    Thresholds lie at scores, and a tie falls on one side as a whole; nothing is interpolated.

    - positive="id": the share of OOD samples accepted where at least `tpr` of the ID samples are accepted (the
      convention of the NAP, OPNP and low-dimensional gradient papers).
    - positive="ood": the share of ID samples flagged where at least `tpr` of the OOD samples are flagged (OpenOOD,
      pytorch-ood).

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite; an unknown `positive`; a `tpr` not
            in (0, 1].
    """
    from sklearn.metrics import roc_curve

    if not isinstance(tpr, (int, float)) or not 0 < tpr <= 1:
        raise InputError(f"tpr must be a fraction in (0, 1], not {tpr!r}; write 95 % as 0.95")
    labels, scores = _ranking(id_scores, ood_scores, positive)
    false_rates, true_rates, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(false_rates[true_rates >= tpr].min())


def evaluate(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """All figures of one detector on one pair of sets; fpr95 is `fpr_at_tpr` at 0.95.

    Returns:
        auroc, aupr_id, aupr_ood, average_precision_id, average_precision_ood, fpr95_id, fpr95_ood.

    Raises:
        InputError: scores that are empty, not 1-D, not real numbers, or not finite.
    """
    return {
        "auroc": auroc(id_scores, ood_scores),
        "aupr_id": aupr(id_scores, ood_scores, positive="id"),
        "aupr_ood": aupr(id_scores, ood_scores, positive="ood"),
        "average_precision_id": average_precision(id_scores, ood_scores, positive="id"),
        "average_precision_ood": average_precision(id_scores, ood_scores, positive="ood"),
        "fpr95_id": fpr_at_tpr(id_scores, ood_scores, positive="id"),
        "fpr95_ood": fpr_at_tpr(id_scores, ood_scores, positive="ood"),
    }


def expected_calibration_error(
    probabilities: ArrayLike | Sequence[Sequence[float]], labels: ArrayLike, n_bins: int = 15
) -> float:
    """Expected calibration error of a classifier: sum over bins of |accuracy - mean confidence| × share of samples.

    Guo et al., arXiv 1706.04599, equation 3. Confidence is the largest probability, and bins of equal width are closed
    on the right: ((m - 1) / n_bins, m / n_bins]. Of equal largest probabilities the first class is the prediction.

    Args:
        probabilities: [N, C], rows that sum to 1 (within 0.01, for half precision).
        labels: [N], integers in [0, C).
        n_bins: at least 1.

    Raises:
        InputError: other shapes, types or ranges; values that are not finite.
    """
    _check_bins(n_bins)
    chances = _finite("probabilities", probabilities, ndim=2)
    classes = _array("labels", labels)
    if classes.dtype.kind not in "iu" or classes.shape != chances.shape[:1]:
        raise InputError(
            f"labels must be {len(chances)} integers, one a row of probabilities, "
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
    """Expected calibration error from confidences alone, for sets whose [N, C] probabilities do not fit in memory.

    Args:
        confidence: [N] largest probability of each sample, in [0, 1].
        is_right: bool [N], whether the class of this probability is the label.
        n_bins: at least 1; see `expected_calibration_error`.

    Raises:
        InputError: other shapes, types or ranges; values that are not finite.
    """
    _check_bins(n_bins)
    confidences, rights = _finite("confidence", confidence, ndim=1), _array("is_right", is_right)
    if confidences.min() < 0 or confidences.max() > 1 + _SUM_TOLERANCE:
        raise InputError(f"confidence must lie in [0, 1], not in [{confidences.min():.3g}, {confidences.max():.3g}]")
    if rights.dtype != bool or rights.shape != confidences.shape:
        raise InputError(
            f"is_right must be {len(confidences)} booleans, one a confidence, not {rights.dtype} of shape {list(rights.shape)}"
        )
    inner_edges = np.arange(1, n_bins) / n_bins
    bins = np.digitize(confidences, inner_edges, right=True)
    return float(np.abs(np.bincount(bins, weights=rights - confidences)).sum() / len(confidences))


def _check_bins(n_bins: int) -> None:
    if not isinstance(n_bins, int) or n_bins < 1:
        raise InputError(f"n_bins must be an integer of at least 1, not {n_bins!r}")


def _ranking(id_scores: ArrayLike, ood_scores: ArrayLike, positive: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Labels (1 = positive class) and scores that are higher for the positive class, both [n_id + n_ood]."""
    if positive not in ("id", "ood"):
        raise InputError(f'positive must be "id" or "ood", the class that is looked for, not {positive!r}')
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
