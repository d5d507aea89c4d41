"""The way from images to features and scores: one forward of the model, one read of the map, every detector."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

import ood_kernels as ok

from .detectors import Detector
from .errors import DetectorUnavailableError, InputError
from .features.cache import CacheRows, CacheWriter, FeatureCache, fingerprint
from .features.fit_data import signals_from_rows
from .features.loader import Loader, image_batches
from .features.signals import GradientBasis, Masks, Signals, wide
from .graphs import LARGEST_BUCKET, Inputs, ScoringGraphs
from .model.tap import Captured, Tap, TapPlan
from .runtime import Kernels, Runtime
from .scores import Scores

__all__ = ["Pipeline"]


class Pipeline:
    """A tap on a model and the detectors that read what it catches."""

    tap: Tap
    rectify: bool
    image_shape: tuple[int, ...] | None
    detectors: dict[str, Detector]
    kernels: Kernels

    @property
    def runtime(self) -> Runtime:
        """Precision, backend and CUDA graphs of scoring; set it to change them."""
        return self.kernels.runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self.kernels = Kernels(runtime)

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
            statistics = self.kernels.pool_statistics(captured.feature_map, self.rectify)
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
        return self.score_inputs((captured.feature_map if self.reads_map else None, captured.head_input, valid))

    def score_inputs(self, inputs: Inputs) -> Scores:
        """Scores from a map and what the head received, replayed as a CUDA graph where the runtime says so."""
        valid = inputs[2]
        if self.kernels.runtime.cuda_graph and valid.is_cuda and 0 < len(valid) <= LARGEST_BUCKET:
            fitted = tuple((id(detector), detector.revision) for detector in self.detectors.values())
            return self._graphs(inputs, (*fitted, self.head.weight.data_ptr(), self.kernels))
        return self._score_eagerly(inputs)

    def _score_eagerly(self, inputs: Inputs) -> Scores:
        feature_map, head_input, valid = inputs
        return self.score_signals(self.signals(feature_map, head_input), valid)

    @cached_property
    def _graphs(self) -> ScoringGraphs:
        return ScoringGraphs(self._score_eagerly)

    def signals(self, feature_map: Tensor | None, head_input: Tensor | None) -> Signals:
        """What the detectors read: from one read of the map, or none where no detector needs it and the head's input is there."""
        wanted = sorted({detector.eps for detector in self.detectors.values() if detector.eps is not None})
        if feature_map is None or not (wanted or head_input is None):
            assert head_input is not None
            return self._signals(wide(head_input))
        pools_what_the_head_reads = self.plan.proven and self.plan.tail is None
        if len(wanted) != 1:
            statistics = self.kernels.pool_statistics(feature_map, self.rectify)
            features = wide(self.tap.features(statistics.h)) if self.plan.proven else head_input
            assert features is not None
            return self._signals(wide(features), statistics)
        eps, basis = wanted[0], self._basis
        if pools_what_the_head_reads and (basis is not None or self._masks is not None):
            masks = self._masks or (None, None)
            outputs = self.kernels.score(feature_map, self.head, masks, basis, eps, self.rectify)
            signals = self._signals(outputs.h, nap={eps: outputs.nap})
            signals.adopt(outputs, basis)
            return signals
        pooled, nap = self.kernels.pool_nap(feature_map, eps, self.rectify)
        features = self.tap.features(pooled) if self.plan.proven else head_input
        assert features is not None
        return self._signals(wide(features), nap={eps: nap})

    def _signals(
        self, features: Tensor, statistics: ok.PoolStatistics | None = None, nap: dict[float, Tensor] | None = None
    ) -> Signals:
        return Signals(features, self.head, statistics, nap, self._masks, self.kernels)

    @property
    def _masks(self) -> Masks | None:
        """Those of the first detector with a pruned head: their energy comes from the same pass as the plain one."""
        return next((detector.masks for detector in self.detectors.values() if detector.masks is not None), None)

    @property
    def _basis(self) -> GradientBasis | None:
        """That of the first detector that reads gradient coordinates."""
        bases = (detector.gradient_basis for detector in self.detectors.values())
        return next((basis for basis in bases if basis is not None), None)

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


def finite_rows(images: Tensor) -> Tensor:
    """Bool [N]: images without NaN or Inf."""
    return torch.isfinite(images).flatten(1).all(1)
