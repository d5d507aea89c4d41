"""Choice of detector settings on pseudo-OOD data: corrupted ID images (arXiv 2402.18162), or the user's own OOD set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..detectors import Detector
from ..errors import InputError, one_of
from ..features.cache import FeatureCache
from ..features.loader import Loader, image_batches
from ..runtime import full_precision
from ..scorer import Scorer
from .corruptions import CORRUPTIONS, corrupt
from .metrics import auroc

__all__ = ["tune"]


def tune(
    scorer: Scorer,
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

    The NAP paper uses ID images under the 15 Hendrycks-Dietterich corruptions as pseudo-OOD data. Severity 3 and mean AUROC are our
    defaults; the paper gives none. The model runs once per corruption, and the search itself only reads features. Thresholds are
    recomputed from the calibration features, which an engine loaded from a state file lacks: calibrate it again. Grids exist for
    NAP's w, OPNP's ranges and the ensemble's a.

    Args:
        scorer: a fitted scorer, updated with the chosen settings and the matching thresholds.
        loader: yields ID images, preferably not those of `fit`; read once and held in memory.
        ood_loader: yields real OOD images, used instead of corrupted ones.
        corruptions: names in `ood_engine.evaluation.corruptions.CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        mean: mean subtracted in preprocessing, one number or one per channel; undone before corruption.
        std: standard deviation divided by in preprocessing, likewise.
        detectors: names of the detectors to tune; None: all with a grid.
        progress: show a progress bar.

    Returns:
        One row per detector and setting: {"detector", "settings", "auroc", "chosen"}.

    Raises:
        InputError: nothing to tune, images outside [0, 1] once mean and std are undone, or non-finite scores; all settings are
            then left unchanged.

    Example:
        >>> import torch, ood_engine as oe
        >>> from ood_engine.demo import SmallCNN
        >>> images = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> engine = oe.Engine(SmallCNN(4), ["nap_energy"]).fit([images[:32]])
        >>> rows = tune(engine.scorer, [images[32:]], corruptions=["gaussian_noise", "fog"])
        >>> chosen = next(row for row in rows if row["chosen"])
        >>> chosen["auroc"] == max(row["auroc"] for row in rows)
        True
        >>> chosen["settings"]["w"] == engine.detectors["nap_energy"].settings["w"]
        True
    """
    names = [name for name in (scorer.detectors if detectors is None else detectors) if _grid_of(scorer, name)]
    if not names:
        raise InputError(f"nothing to tune: none of {', '.join(scorer.detectors)} has settings to search")
    if ood_loader is None and not corruptions:
        raise InputError(
            "corruptions=(): expected at least one of ood_engine.evaluation.corruptions.CORRUPTIONS, or an ood_loader"
        )
    batches = list(image_batches(loader, "reading", False))
    id_cache = scorer.extract(batches, "ID features", progress)
    if ood_loader is not None:
        ood_caches = [scorer.extract(ood_loader, "OOD features", progress)]
    else:
        images = [images for images, _ in batches]
        ood_caches = [
            scorer.extract(_corrupted(images, name, severity, mean, std), f"{name} features", progress)
            for name in corruptions
        ]
    rows = [row for name in names for row in _search(scorer, name, id_cache, ood_caches)]
    for row in rows:
        if row["chosen"]:
            scorer.detectors[row["detector"]].configure(**row["settings"])
    scorer.recalibrate()
    return rows


def _grid_of(scorer: Scorer, name: str) -> Sequence[dict[str, Any]]:
    if name not in scorer.detectors:
        raise InputError(f"tune {name!r}: {one_of(name, scorer.detectors)}")
    return scorer.detectors[name].grid()


def _corrupted(
    batches: list[Tensor], name: str, severity: int, mean: Sequence[float] | float, std: Sequence[float] | float
) -> Iterator[Tensor]:
    for number, images in enumerate(batches):
        shift, scale = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (mean, std))
        if not {shift.numel(), scale.numel()} <= {1, images.shape[1]} or not (scale > 0).all():
            raise InputError(
                f"mean={mean!r}, std={std!r}: expected one number, or one per channel ({images.shape[1]}), and std above 0"
            )
        pixels = images.float().cpu() * scale + shift
        if not (pixels.amin() >= -1e-3 and pixels.amax() <= 1 + 1e-3):
            raise InputError(
                f"images span {float(pixels.amin()):.3g} to {float(pixels.amax()):.3g} once mean and std are undone: expected"
                " [0, 1]; pass the mean and std of your preprocessing"
            )
        yield (corrupt(pixels.clamp(0, 1), name, severity, seed=number) - shift) / scale


def _search(scorer: Scorer, name: str, id_cache: FeatureCache, ood_caches: list[FeatureCache]) -> list[dict[str, Any]]:
    """The rows of one detector, whose settings are restored even if non-finite scores end the search."""
    detector = scorer.detectors[name]
    before = dict(detector.settings)
    rows: list[dict[str, Any]] = []
    try:
        for settings in detector.grid():
            detector.configure(**settings)
            id_scores = _scores(scorer, detector, id_cache)
            values = [auroc(id_scores, _scores(scorer, detector, cache)) for cache in ood_caches]
            rows.append({"detector": name, "settings": settings, "auroc": sum(values) / len(values), "chosen": False})
    finally:
        detector.configure(**before)
    max(rows, key=lambda row: row["auroc"])["chosen"] = True
    return rows


def _scores(scorer: Scorer, detector: Detector, cache: FeatureCache) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), full_precision(scorer.tap.device):
        return torch.cat([detector(signals).cpu() for signals in scorer.cached_signals(cache)])
