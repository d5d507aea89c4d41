"""The columns of `ood-engine score`, and the rows of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..engine import Engine
from ..images.dataset import Batch
from ..scorer import finite_rows
from ..scores import Scores

__all__ = ["Rows", "columns_of", "rows_of"]

Rows = dict[str, list[Any]]

NOT_FINITE = "no finite score: activations are NaN or infinite"
NOT_THE_MODELS = "no score: features or logits recomputed for it differ from the model's own, as on no image of fit"


class _Scored(NamedTuple):
    """The readable images of a batch, on the CPU: scores, class probabilities [n, C], and whether their features are finite [n]."""

    scores: Scores
    probabilities: Tensor
    finite: Tensor


def columns_of(engine: Engine) -> dict[str, str]:
    """Column → type, in table order."""
    columns = {"path": "string", "predicted_class": "int", "class_name": "string", "confidence": "float"}
    for name in engine.detectors:
        columns |= {f"{name}_score": "float", f"{name}_p_value": "float", f"{name}_out_of_distribution": "bool"}
    return columns | {"error": "string"}


def rows_of(engine: Engine, batch: Batch) -> Rows:
    """The rows of one batch; an image without finite scores gets an error instead."""
    scored = _score(engine, batch)
    confidence, predicted = scored.probabilities.max(1)
    names = engine.information.get("class_names") or []
    known = names if len(names) == scored.probabilities.shape[1] else [None] * scored.probabilities.shape[1]
    finite = scored.finite.tolist()
    rows: Rows = {
        "path": list(batch.names),
        "predicted_class": _spread(batch, predicted.tolist(), finite),
        "class_name": _spread(batch, [known[number] for number in predicted.tolist()], finite),
        "confidence": _spread(batch, confidence.tolist(), finite),
    }
    unsound: dict[int, list[str]] = {}
    for name in engine.detectors:
        values = scored.scores[name]
        sound = torch.isfinite(values).tolist()
        for position, is_sound in zip(batch.good, sound, strict=True):
            if not is_sound:
                unsound.setdefault(position, []).append(name)
        p_values, decisions = None, None
        if name in engine.calibrations:
            p_values = engine.calibrations[name].p_values(values).tolist()
            decisions = engine.calibrations[name].is_out_of_distribution(values).tolist()
        rows[f"{name}_score"] = _spread(batch, values.tolist(), sound)
        rows[f"{name}_p_value"] = _spread(batch, p_values, sound)
        rows[f"{name}_out_of_distribution"] = _spread(batch, decisions, sound)
    is_finite = dict(zip(batch.good, finite, strict=True))
    reasons = {
        position: _reason(engine, names, is_finite[position], scored.scores) for position, names in unsound.items()
    }
    errors = {**batch.errors, **reasons}
    rows["error"] = [errors.get(position) for position in range(len(batch.names))]
    return rows


def _score(engine: Engine, batch: Batch) -> _Scored:
    classes = engine.head.weight.shape[0]
    if batch.images is None:
        nothing = torch.empty(0, device="cpu")
        scores = Scores(dict.fromkeys(engine.detectors, nothing))
        return _Scored(scores, torch.empty((0, classes), device="cpu"), nothing.bool())
    engine.scorer.require_fitted()
    with torch.no_grad():
        captured = engine.scorer.run(batch.images)
        scores = engine.scorer.score_captured(batch.images, captured).cpu()
        weight, bias = engine.head.weight, engine.head.bias
        logits = linear(captured.head_input.to(weight.dtype), weight, bias)
        finite = finite_rows(batch.images).cpu() & torch.isfinite(logits).all(1).cpu()
    return _Scored(scores, logits.double().softmax(1).cpu(), finite)


def _reason(engine: Engine, without_score: list[str], is_finite: bool, scores: Scores) -> str:
    if len(without_score) < len(engine.detectors):
        return f"{NOT_FINITE} ({', '.join(without_score)})"
    return NOT_THE_MODELS if is_finite and int(scores.mismatched_rows) else f"{NOT_FINITE} (every detector)"


def _spread(batch: Batch, values: list[Any] | None, sound: list[bool]) -> list[Any]:
    """The values of the readable images at their positions in the batch, None elsewhere."""
    column: list[Any] = [None] * len(batch.names)
    if values is not None:
        for position, value, is_sound in zip(batch.good, values, sound, strict=True):
            column[position] = value if is_sound else None
    return column
