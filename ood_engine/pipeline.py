"""The way from images to features and scores: one forward of the model, one read of the map, every detector."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok

from .batches import Loader, image_batches
from .cache import CacheRows, CacheWriter, FeatureCache, fingerprint
from .detectors import Detector
from .errors import DetectorUnavailableError, InputError
from .fitting import signals_from_rows
from .scores import Scores
from .signals import Signals
from .tap import Captured, Tap, TapPlan

__all__ = ["Pipeline"]


class Pipeline:
    """A tap on a model and the detectors that read what it catches."""

    tap: Tap
    rectify: bool
    image_shape: tuple[int, ...] | None
    detectors: dict[str, Detector]

    @property
    def head(self) -> ok.Head:
        """The unpruned head: weight [C, D] and bias, as they are in the model now."""
        layer = self.tap.head
        return ok.Head(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    @property
    def plan(self) -> TapPlan:
        """Which head and feature map were found, and whether the map is proven."""
        return self.tap.plan

    @property
    def reads_map(self) -> bool:
        """Whether any detector needs the feature map."""
        return any(detector.needs_map for detector in self.detectors.values())

    def extract(self, loader: Loader, what: str, progress: bool = False) -> FeatureCache:
        """The features of everything a loader yields, in memory."""
        writer = CacheWriter()
        with torch.inference_mode(False), torch.no_grad():
            for images, labels in image_batches(loader, what, progress):
                writer.append(self.extract_batch(images, labels))
        return writer.finish()

    def extract_batch(self, images: Tensor, labels: Tensor) -> CacheRows:
        """The cache rows of one batch; an image with NaN or Inf has NaN features.

        Raises:
            DetectorUnavailableError: a detector reads the map, and it has negative values without `rectify`.
        """
        captured = self.run(images)
        features = wide(captured.head_input)
        nothing = features.new_empty((len(features), 0))
        maximum, nap_mean = nothing, nothing
        if captured.feature_map is not None and self.reads_map:
            reason = self.check_map(captured.feature_map)
            if reason is not None:
                raise DetectorUnavailableError(reason)
            statistics = ok.pool_statistics(captured.feature_map, rectify=self.rectify)
            maximum = statistics.maximum
            if self.plan.proven:
                features = wide(self.tap.features(statistics.h))
            # Kept only where NAP does not pool what the head reads.
            is_pooled = self.plan.proven and self.plan.tail is None and not self.rectify
            nap_mean = nothing if is_pooled else statistics.nap_mean
        valid = finite_rows(images).to(features.device)
        features = torch.where(valid[:, None], features, torch.nan)
        return CacheRows(features, fingerprint(images), labels, maximum, nap_mean)

    def run(self, images: Tensor) -> Captured:
        """One forward of the model.

        Raises:
            InputError: not a batch of floating point images, an empty batch, images of another size than those of `fit`, or
                images the model rejects.
        """
        if isinstance(images, Tensor) and images.ndim > 1 and images.is_floating_point():
            if images.shape[:1] == (0,):
                raise InputError(f"images {list(images.shape)}: the batch is empty; expected at least one image")
            if self.image_shape is not None and images.shape[1:] != self.image_shape:
                fitted = ", ".join(map(str, self.image_shape))
                raise InputError(
                    f"images {list(images.shape)}: expected [N, {fitted}], the channels and size of fit; preprocess them alike, or"
                    " fit on this size"
                )
        return self.tap(images)

    def check_map(self, feature_map: Tensor) -> str | None:
        """Why NAP cannot read this map; None where it can."""
        if self.rectify:
            return None
        negative = feature_map[feature_map < 0]
        negative = negative[torch.isfinite(negative)]  # a bad image is refused for what it is
        if not len(negative):
            return None
        return (
            f"the feature map {self.plan.feature_map!r} has negative values (down to {float(negative.min()):.3g}), where"
            " max / (mean + eps) means nothing; pass rectify=True to score its ReLU"
        )

    def score_captured(self, images: Tensor, captured: Captured) -> Scores:
        """Scores of a forward pass; NaN for images with NaN or Inf."""
        valid = finite_rows(images).to(captured.head_input.device)
        return self.score_signals(self.signals(captured.feature_map, captured.head_input), valid)

    def signals(self, feature_map: Tensor | None, head_input: Tensor | None) -> Signals:
        """What the detectors read: from one read of the map, or none where no detector needs it and the head's input is there."""
        nap: dict[float, Tensor] = {}
        statistics = None
        features = head_input
        wanted = sorted({detector.eps for detector in self.detectors.values() if detector.eps is not None})
        if feature_map is not None and (wanted or head_input is None):
            if len(wanted) == 1:
                pooled, nap[wanted[0]] = ok.pool_nap(feature_map, wanted[0], rectify=self.rectify)
            else:
                statistics = ok.pool_statistics(feature_map, rectify=self.rectify)
                pooled = statistics.h
            if self.plan.proven:
                features = self.tap.features(pooled)
        assert features is not None
        masks = [detector.masks for detector in self.detectors.values() if detector.masks is not None]
        return Signals(wide(features), self.head, statistics, nap, masks[0] if masks else None)

    def score_signals(self, signals: Signals, valid: Tensor | None = None) -> Scores:
        """Every detector's score; NaN in rows that are not sound."""
        sound = torch.isfinite(signals.features).all(1)
        if valid is not None:
            sound &= valid
        scores = {}
        with full_precision(signals.features.device):
            for name, detector in self.detectors.items():
                score = detector(signals).float()
                scores[name] = torch.where(sound & torch.isfinite(score), score, torch.nan)
        return Scores(scores, signals.clamped)

    def score_rows(self, cache: FeatureCache) -> Scores:
        """Scores of cached samples, on the CPU."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [self.score_signals(signals_from_rows(rows, self.head)).cpu() for rows in cache.batches()]
        return Scores.concatenate(parts)


def full_precision(device: torch.device) -> torch.autocast:
    """Autocast is for the model; detectors would run in half precision behind the caller's back."""
    return torch.autocast(device.type, enabled=False)


def wide(tensor: Tensor) -> Tensor:
    """fp32 unless it is fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finite_rows(images: Tensor) -> Tensor:
    """Bool [N]: images without NaN or Inf."""
    return torch.isfinite(images).flatten(1).all(1)
