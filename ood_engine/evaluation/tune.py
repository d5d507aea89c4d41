"""Settings chosen without OOD data: corrupted ID images stand in for it (arXiv 2402.18162), or a user's own OOD set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..detectors import Detector
from ..errors import InputError
from ..features.cache import FeatureCache
from ..features.fit_data import signals_from_rows
from ..features.loader import Loader, image_batches
from ..scorer import full_precision
from .corruptions import CORRUPTIONS, corrupt
from .metrics import auroc

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["tune"]


def tune(
    engine: Engine,
    loader: Loader,
    *,
    ood_loader: Loader | None = None,
    corruptions: Sequence[str] = CORRUPTIONS,
    severity: int = 3,
    mean: Sequence[float] | float = 0.0,
    std: Sequence[float] | float = 1.0,
    detectors: Sequence[str] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Search each detector's grid for the settings with the best mean AUROC between ID and (pseudo-)OOD data.

    The paper takes ID images under the 15 Hendrycks-Dietterich corruptions for OOD; its severity and objective are not published:
    severity 3 and mean AUROC are ours. The model runs once per corruption; trying settings only reads features, and
    thresholds are set again from the calibration features; an engine from a state file has none of those, and is to be
    calibrated anew. NAP's w, OPNP's ranges and the ensemble's a have grids.

    Args:
        engine: fitted.
        loader: yields ID images, best not those of `fit`; they are read once and kept in memory.
        ood_loader: real OOD images instead of corrupted ones.
        corruptions: names of `ood_engine.evaluation.corruptions.CORRUPTIONS`.
        severity: 1 to 5.
        mean: what was subtracted from images in [0, 1], a number or one a channel; undone before corrupting.
        std: what they were divided by.
        detectors: names to tune; None tunes all with a grid.
        progress: show a bar.

    Returns:
        One row per detector and setting: {"detector", "settings", "auroc", "chosen"}; also kept as `engine.tuning`.

    Raises:
        InputError: nothing to tune, images that do not lie in [0, 1] once mean and std are undone, or scores that are not
            finite; every setting is then as it was.
    """
    names = [name for name in (engine.detectors if detectors is None else detectors) if _grid_of(engine, name)]
    if not names:
        raise InputError(f"nothing to tune: none of {', '.join(engine.detectors)} has settings to search")
    if ood_loader is None and not corruptions:
        raise InputError(
            "corruptions=(): expected at least one of ood_engine.evaluation.corruptions.CORRUPTIONS, or an ood_loader"
        )
    batches = list(image_batches(loader, "reading", False))
    id_cache = engine.extract(batches, "ID features", progress)
    if ood_loader is not None:
        ood_caches = [engine.extract(ood_loader, "OOD features", progress)]
    else:
        images = [images for images, _ in batches]
        ood_caches = [
            engine.extract(_corrupted(images, name, severity, mean, std), f"{name} features", progress)
            for name in corruptions
        ]
    rows = [row for name in names for row in _search(engine, name, id_cache, ood_caches)]
    for row in rows:
        if row["chosen"]:
            engine.detectors[row["detector"]].configure(**row["settings"])
    engine.tuning = rows
    engine.recalibrate()
    return rows


def _grid_of(engine: Engine, name: str) -> Sequence[dict[str, Any]]:
    if name not in engine.detectors:
        raise InputError(f"tune {name!r}: expected one of this engine's detectors, {', '.join(engine.detectors)}")
    return engine.detectors[name].grid()


def _corrupted(
    batches: list[Tensor], name: str, severity: int, mean: Sequence[float] | float, std: Sequence[float] | float
) -> Iterator[Tensor]:
    for number, images in enumerate(batches):
        shift, scale = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (mean, std))
        if not {shift.numel(), scale.numel()} <= {1, images.shape[1]} or not (scale > 0).all():
            raise InputError(
                f"mean={mean!r}, std={std!r}: expected a number, or one for each of the {images.shape[1]} channels, and std above 0"
            )
        pixels = images.float().cpu() * scale + shift
        if not (pixels.amin() >= -1e-3 and pixels.amax() <= 1 + 1e-3):
            raise InputError(
                f"images span {float(pixels.amin()):.3g} to {float(pixels.amax()):.3g} once mean and std are undone: expected"
                " [0, 1]; pass the mean and std of your preprocessing"
            )
        yield (corrupt(pixels.clamp(0, 1), name, severity, seed=number) - shift) / scale


def _search(engine: Engine, name: str, id_cache: FeatureCache, ood_caches: list[FeatureCache]) -> list[dict[str, Any]]:
    """The rows of one detector, which is left with the settings it had: the scores may hold NaN half-way."""
    detector = engine.detectors[name]
    before = dict(detector.settings)
    rows: list[dict[str, Any]] = []
    try:
        for settings in detector.grid():
            detector.configure(**settings)
            id_scores = _scores(engine, detector, id_cache)
            values = [auroc(id_scores, _scores(engine, detector, cache)) for cache in ood_caches]
            rows.append({"detector": name, "settings": settings, "auroc": sum(values) / len(values), "chosen": False})
    finally:
        detector.configure(**before)
    max(rows, key=lambda row: row["auroc"])["chosen"] = True
    return rows


def _scores(engine: Engine, detector: Detector, cache: FeatureCache) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), full_precision(engine.tap.device):
        return torch.cat([detector(signals_from_rows(rows, engine.head)).cpu() for rows in cache.batches()])
