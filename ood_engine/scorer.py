"""Scoring of images, feature maps and cached features: one forward pass, one read of the map, every detector."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from .calibration import Calibration
from .detectors import Detector
from .errors import DetectorUnavailableError, InputError, NotFittedError, OodEngineWarning, TapError, one_line
from .features.agreement import Agreement
from .features.cache import CacheRows, CacheWriter, FeatureCache, fingerprint
from .features.fit_data import FitData, signals_from_rows
from .features.loader import Loader, image_batches
from .features.set_up import SetUp
from .features.signals import Signals, wide
from .graphs import LARGEST_BUCKET, Inputs, ScoringGraphs
from .model.tap import Captured, Tap
from .runtime import Kernels, Runtime, full_precision, version_of
from .scores import Scores

__all__ = ["Scorer"]

_ROUNDED = 1e-6

_BLOCK = 4096
"""Rows scored at once: a dual basis takes 32 KiB per row, so that the pixels of one image would take gigabytes."""


class Scorer:
    """A tapped model, its detectors, their thresholds, and one set of kernels for fitting, calibration, tuning and scoring.

    Args:
        tap: source of the detectors' inputs.
        detectors: name → detector, fitted or not.
        runtime: precision, backend and CUDA graphs.
        rectify: compute NAP on ReLU(map).

    Attributes:
        image_shape: required (C, H, W) of images; None if they may vary.
        is_fitted: whether the detectors are fitted.
        calibrations: name → calibration; empty before `calibrate`.
        calibration_cache: features of the calibration samples; None after loading.
        lowest: lowest value of the map in the batches of `fit`, see `lowest_value`.
        calibrated_under: precision and backend of the calibration.
        agreement: differences from the model's own activations in `fit`, to which every later sample is held.
        positions: (fewest, most) positions H·W of the feature maps of `fit`; None if unknown.
    """

    def __init__(self, tap: Tap, detectors: dict[str, Detector], runtime: Runtime, *, rectify: bool = False) -> None:
        self.tap = tap
        self.detectors = detectors
        self.kernels = Kernels(runtime)
        self.rectify = rectify
        self.image_shape: tuple[int, ...] | None = None
        self.is_fitted = False
        self.calibrations: dict[str, Calibration] = {}
        self.calibration_cache: FeatureCache | None = None
        self.calibrated_under: dict[str, str | None] | None = None
        self.lowest = 0.0
        self.agreement: Agreement | None = None
        self.positions: tuple[int, int] | None = None
        self._told_positions: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without captured graphs, which belong to one process and its tensors."""
        return {name: value for name, value in vars(self).items() if name != "_graphs"}

    @property
    def runtime(self) -> Runtime:
        """Precision, backend and CUDA graphs; assigning another arithmetic recalibrates from the cached features."""
        return self.kernels.runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self.kernels = Kernels(runtime)
        if runtime.arithmetic != self.calibrated_under and self.calibration_cache is not None:
            self.recalibrate()
        self.warn_of_arithmetic()

    def warn_of_arithmetic(self) -> None:
        """Warn if precision or backend differ between calibration and scoring."""
        if self.calibrations and self.calibrated_under != self.runtime.arithmetic:
            then, now = (
                f"precision={one['precision']!r}, backend={one['backend']!r}"
                for one in (self.calibrated_under or {"precision": None, "backend": None}, self.runtime.arithmetic)
            )
            warnings.warn(
                f"the thresholds were calibrated under {then}, scores are computed under {now}: expected the same arithmetic;"
                " call calibrate(loader) with fresh ID images, or use the runtime of the calibration",
                OodEngineWarning,
                stacklevel=3,
            )

    @property
    def head(self) -> ok.Head:
        """The unpruned head: current weight [C, D] and bias of the model."""
        return ok.Head(*self.tap.weights)

    @property
    def reads_map(self) -> bool:
        """Whether any detector needs the feature map."""
        return True in [detector.needs_map for detector in self.detectors.values()]

    def require_fitted(self) -> None:
        """Raise NotFittedError unless head and map are known and the detectors fitted, TapError if the model has changed since."""
        if not (self.is_fitted and self.tap.is_ready):
            raise NotFittedError(
                "the engine is not fitted: call fit(loader) with ID images, or Engine.load(path, model)"
            )
        self.tap.require_unchanged()

    def run(self, images: Tensor) -> Captured:
        """One forward pass of the model.

        Raises:
            InputError: not a floating-point batch, an empty batch, a shape other than in `fit`, or images the model rejects.
        """
        if isinstance(images, Tensor) and images.ndim > 1 and images.is_floating_point():
            if images.shape[:1] == (0,):
                raise InputError(f"images {list(images.shape)}: the batch is empty; expected at least one image")
            if self.image_shape is not None and images.shape[1:] != self.image_shape:
                fitted = ", ".join(map(str, self.image_shape))
                raise InputError(
                    f"images {list(images.shape)}: expected [N, {fitted}], the channels and size of fit; use the same"
                    " preprocessing, or fit on this size"
                )
        return self.tap(images)

    def check_map(self, feature_map: Tensor) -> str | None:
        """Why NAP is undefined on this map; None if it is defined."""
        if self.rectify:
            return None
        lowest = lowest_value(feature_map)
        if lowest >= 0:
            return None
        return (
            f"the feature map {self.tap.plan.feature_map!r} has negative values (down to {lowest:.3g}), where max / (mean + eps)"
            " means nothing; pass rectify=True to score its ReLU"
        )

    def extract(
        self, loader: Loader, what: str, progress: bool = False, check: Callable[[CacheRows], None] | None = None
    ) -> FeatureCache:
        """In-memory features of all images of a loader, whose batches `check` may refuse."""
        writer = CacheWriter()
        with torch.inference_mode(False), torch.no_grad():
            for images, labels in image_batches(loader, what, progress):
                rows = self.extract_batch(images, labels)
                if check is not None:
                    check(rows)
                writer.append(rows)
        return writer.finish()

    def extract_batch(self, images: Tensor, labels: Tensor, *, learn: bool = False) -> CacheRows:
        """Cache rows of one batch; features of an image with NaN or Inf are NaN.

        Args:
            learn: widen `agreement` by the differences of these samples, at most to the tolerance of verification, and `positions`,
                and lower `lowest`.

        Raises:
            DetectorUnavailableError: a detector needs the map, which has negative values, without `rectify`.
            TapError: samples whose features or logits differ from the model's own.
        """
        captured = self.run(images)
        features = wide(captured.head_input)
        nothing = features.new_empty((len(features), 0))
        maximum, nap_mean = nothing, nothing
        if captured.feature_map is not None and self.reads_map:
            reason = self.check_map(captured.feature_map)
            if reason is not None:
                raise DetectorUnavailableError(reason)
            if learn:
                self.lowest = min(self.lowest, lowest_value(captured.feature_map))
                here, (least, most) = captured.feature_map[0, 0].numel(), self.positions or (2**62, 0)
                self.positions = min(here, least), max(here, most)
            plan = self.tap.plan
            statistics = self.kernels.pool_statistics(captured.feature_map, self.rectify)
            maximum = statistics.maximum
            if plan.proven:
                features = wide(self.tap.features(statistics.h))
            # Stored only if NAP pools something other than the head input.
            is_pooled = plan.proven and not plan.tail and not self.rectify
            nap_mean = nothing if is_pooled else statistics.nap_mean
        valid = finite_samples(images, captured)
        self._require_agreement(features, captured, valid, learn)
        features = torch.where(valid[:, None], features, torch.nan)
        return CacheRows(features, fingerprint(images), labels, maximum, nap_mean)

    def _require_agreement(self, features: Tensor, captured: Captured, valid: Tensor, learn: bool) -> None:
        """Raise TapError unless features and recomputed logits of finite samples are the model's own; synchronises."""
        valid = valid & torch.isfinite(features).all(1)
        if not valid.any():
            return
        features, head_input, logits = features[valid], captured.head_input[valid], captured.logits[valid]
        weights = self.head
        energies = self.kernels.masked_energy(features, weights, None)
        if learn and self.agreement is None:
            self.agreement = Agreement.learn(features, head_input, energies, logits)
        agreement = self.agreement or Agreement()
        least = agreement._replace(features=0.0, logits=0.0) if learn else agreement
        allowed = self._allowed(least, captured, weights)
        head, feature_map = self.tap.plan.head, self.tap.plan.feature_map
        for differences, most, message in (
            (
                agreement.feature_differences(features, head_input),
                allowed.features,
                f"the spatial mean of {feature_map!r} is not what the head {head!r} receives, although it was in the batch that"
                " verified the map: something acts on some images only, such as a clamp or a mask; name a module after it by"
                " feature_map=..., or choose detectors without a map, such as 'energy'",
            ),
            (
                agreement.logit_differences(energies, logits),
                allowed.logits,
                f"the weight of the head {head!r} does not explain the model's output: merge adapters into it, and fit again",
            ),
        ):
            wrong = int((~(differences <= most)).sum())
            if wrong:
                raise TapError(
                    f"{wrong} of {len(features)} images differ by up to {float(differences.max()):.3g}, where {most:.3g} is allowed"
                    f" relative to their size: {message}"
                )
        if learn:
            self.agreement = agreement.widened(features, head_input, energies, logits)

    def _allowed(self, agreement: Agreement, captured: Captured | Inputs, weights: ok.Head) -> Agreement:
        feature_map, head_input, logits = captured.feature_map, captured.head_input, captured.logits
        return agreement.allowed(
            None if feature_map is None else feature_map.dtype,
            None if head_input is None else head_input.dtype,
            None if logits is None else logits.dtype,
            weights.weight.dtype,
            captured.rounding,
            precision=self.kernels.runtime.precision,
        )

    def score(self, images: Tensor) -> Scores:
        """Scores of one batch of images; NaN for images with NaN or Inf, and where features or logits are not the model's own."""
        return self.score_captured(images, self.run(images))

    def score_captured(self, images: Tensor, captured: Captured) -> Scores:
        """Scores of images from the captured activations of their forward pass."""
        valid = finite_samples(images, captured)
        feature_map = captured.feature_map if self.reads_map else None
        return self.score_inputs(Inputs(feature_map, captured.head_input, valid, captured.logits, captured.rounding))

    def score_features(self, feature_map: Tensor | None, features: Tensor | None) -> Scores:
        """Scores from precomputed activations.

        Raises:
            InputError: missing inputs, or shapes that do not match the head.
        """
        width = self.head.weight.shape[1]
        if feature_map is not None:
            is_map = feature_map.ndim == 4 and 0 not in feature_map.shape[1:]
            if not is_map or not feature_map.is_floating_point():
                raise InputError(
                    f"feature_map: expected a floating point [N, D, H, W], got {feature_map.dtype} {list(feature_map.shape)}"
                )
        plan = self.tap.plan
        channels = math.prod(plan.tail[0][1]) if plan.tail else width
        if features is None and (feature_map is None or not plan.proven or feature_map.shape[1] != channels):
            came = "none" if feature_map is None else str(list(feature_map.shape))
            raise InputError(
                f"feature_map {came}: expected [N, {channels}, H, W] of a verified map; otherwise pass features [N, {width}] too"
            )
        if features is not None:
            rows = "N" if feature_map is None else feature_map.shape[0]
            fits = features.ndim == 2 and features.shape[1] == width and rows in ("N", features.shape[0])
            if not fits or not features.is_floating_point():
                raise InputError(
                    f"features: expected a floating point head input [{rows}, {width}], got {features.dtype}"
                    f" {list(features.shape)}"
                )
        given = feature_map if features is None else features
        assert given is not None
        valid = torch.ones(len(given), dtype=torch.bool, device=given.device)
        return self.score_inputs(Inputs(feature_map, features, valid))

    def score_inputs(self, inputs: Inputs) -> Scores:
        """Scores from a feature map and head input, by CUDA graph replay if the runtime enables it, or in blocks of rows."""
        if inputs.feature_map is not None and self.positions != self._told_positions:
            self._tell_positions(*inputs.feature_map.shape[2:])
        valid = inputs.valid
        if len(valid) > _BLOCK:
            blocks = (inputs.rows(slice(start, start + _BLOCK)) for start in range(0, len(valid), _BLOCK))
            return Scores.concatenate([self._score_eagerly(block) for block in blocks])
        if self.kernels.runtime.cuda_graph and valid.is_cuda and 0 < len(valid) <= LARGEST_BUCKET:
            return self._graphs(inputs, self._graph_key())
        return self._score_eagerly(inputs)

    def _tell_positions(self, height: int, width: int) -> None:
        least, most = self.positions or (0, height * width)
        if not least <= height * width <= most:
            self._told_positions = self.positions
            names = ", ".join(name for name, detector in self.detectors.items() if detector.needs_map)
            warnings.warn(
                f"a feature map of {height} × {width} positions, where fit saw {least} to {most} of them: {names} depend on their"
                " number, and thresholds hold for those of fit and calibration; resize such images, or fit and calibrate on such"
                " sizes too (said once)",
                OodEngineWarning,
                stacklevel=4,
            )

    def _graph_key(self) -> Hashable:
        """Everything that a captured graph reads besides its inputs; masks in place, since the kernels pack a copy."""
        detectors = tuple((id(detector), detector.revision) for detector in self.detectors.values())
        masks = [mask for detector in self.detectors.values() for mask in detector.masks or () if mask is not None]
        head = [tensor for tensor in (self.head.weight, self.head.bias) if tensor is not None]
        versions = tuple((tensor.data_ptr(), version_of(tensor)) for tensor in (*head, *masks))
        return detectors, versions, self.kernels, self.agreement

    @cached_property
    def _graphs(self) -> ScoringGraphs:
        return ScoringGraphs(self._score_eagerly)

    def _score_eagerly(self, inputs: Inputs) -> Scores:
        return self._score_signals(self.signals(inputs.feature_map, inputs.head_input), inputs)

    def score_cache(self, cache: FeatureCache) -> Scores:
        """Scores of cached samples, on the CPU."""
        with torch.inference_mode(False), torch.no_grad():
            return Scores.concatenate([self._score_signals(signals).cpu() for signals in self.cached_signals(cache)])

    def cached_signals(self, cache: FeatureCache) -> Iterator[Signals]:
        """Detector inputs of cached samples, in batches."""
        head = self.head
        for rows in cache.batches():
            yield signals_from_rows(rows, head, self.kernels)

    def signals(self, feature_map: Tensor | None, head_input: Tensor | None) -> Signals:
        """Detector inputs from one read of the map, or none if no detector needs it and the head input is given."""
        head, kernels, plan = self.head, self.kernels, self.tap.plan
        constants, pruner, basis = self._needs()
        if feature_map is None or not (constants or head_input is None):
            assert head_input is not None
            return Signals(wide(head_input), head, kernels, pruner=pruner)
        if len(constants) == 1 and plan.proven and not plan.tail and (pruner or basis) is not None:
            eps = constants.pop()
            masks = None if pruner is None else pruner.masks
            out = kernels.score(feature_map, head, masks, basis, eps, self.rectify)
            return Signals(
                out.h,
                head,
                kernels,
                nap={eps: out.nap},
                energies=(out.lse, out.pruned_lse, out.p),
                coordinates={} if basis is None else {basis: out.g_low},
                pruner=pruner,
            )
        nap: dict[float, Tensor] = {}
        statistics = None
        if len(constants) == 1:
            eps = constants.pop()
            pooled, nap[eps] = kernels.pool_nap(feature_map, eps, self.rectify)
        else:
            statistics = kernels.pool_statistics(feature_map, self.rectify)
            pooled = statistics.h
        features = self.tap.features(pooled) if plan.proven else head_input
        assert features is not None
        return Signals(wide(features), head, kernels, statistics=statistics, nap=nap, pruner=pruner)

    def _needs(self) -> tuple[set[float], Detector | None, HasBasisTensors | None]:
        """NAP constants, the first pruning detector and the first basis: what one fused pass can compute."""
        constants: set[float] = set()
        pruner: Detector | None = None
        basis: HasBasisTensors | None = None
        for detector in self.detectors.values():
            if detector.needs_map and (eps := detector.eps) is not None:
                constants.add(eps)
            if detector.prunes and pruner is None:
                pruner = detector
            if basis is None:
                basis = detector.gradient_basis
        return constants, pruner, basis

    def _score_signals(self, signals: Signals, inputs: Inputs | None = None) -> Scores:
        """Every detector's score; NaN in rows with a non-finite input or score, or that are not the model's own."""
        usable = torch.isfinite(signals.features).all(1)
        mismatched = None
        with full_precision(signals.features.device):
            scores = {name: detector(signals).float() for name, detector in self.detectors.items()}
            if inputs is not None:
                usable &= inputs.valid
                agrees = self._agrees(signals, inputs)
                if agrees is not None:
                    mismatched = (usable & ~agrees).sum()
                    usable &= agrees
        scores = {name: torch.where(usable & torch.isfinite(score), score, torch.nan) for name, score in scores.items()}
        return Scores(scores, signals.clamped, mismatched)

    def _agrees(self, signals: Signals, inputs: Inputs) -> Tensor | None:
        """Bool [N]: features and logits are the model's own as far as both are at hand; None if neither is."""
        if self.agreement is None:
            return None
        allowed = self._allowed(self.agreement, inputs, signals.head)
        agrees = None
        if inputs.head_input is not None and inputs.feature_map is not None and self.tap.plan.proven:
            agrees = allowed.feature_differences(signals.features, inputs.head_input) <= allowed.features
        if inputs.logits is not None and signals.energies is not None:
            same_logits = allowed.logit_differences(signals.energies, inputs.logits) <= allowed.logits
            agrees = same_logits if agrees is None else agrees & same_logits
        return agrees

    def fit(
        self, cache: FeatureCache, detectors: dict[str, Detector], seed: int, progress: bool, set_up: SetUp
    ) -> None:
        """Fit detectors on cached ID features, and replace the current ones.

        Raises:
            InputError: too few, non-finite or too large samples, labels out of range, or as `SetUp.check_labels`; the current
                detectors then stay.
        """
        data = FitData(cache, self.head, self.kernels, seed, progress, use_predicted=set_up.labels == "predicted")
        set_up.check_labels(data, detectors)
        with full_precision(self.tap.device):
            for name, detector in detectors.items():
                detector.to(self.tap.device)
                try:
                    detector.fit(data)
                except torch.linalg.LinAlgError as error:
                    raise InputError(
                        f"{name}: the ID features cannot be decomposed ({one_line(error)}): expected moderate values, got up to"
                        f" {float(cache.rows.features.abs().max()):.3g}; normalise the features, or leave the detector out"
                    ) from error
        set_up.warn_of_labels(data)
        self.detectors, self.is_fitted = detectors, True

    def calibrate(self, cache: FeatureCache, false_alarm_rate: float) -> None:
        """Set the thresholds from cached features of held-out ID samples.

        Raises:
            CalibrationError: too few samples for the rate, or non-finite scores.
        """
        scores = self.score_cache(cache)
        self.calibrations = {
            name: Calibration(false_alarm_rate).fit(score, name).to(self.tap.device) for name, score in scores.items()
        }
        self.calibration_cache, self.calibrated_under = cache, self.runtime.arithmetic

    def recalibrate(self) -> None:
        """Recompute the thresholds after a change of settings; drop them if the calibration features are not in memory."""
        rates = {calibration.false_alarm_rate for calibration in self.calibrations.values()}
        self.calibrations = {}
        if self.calibration_cache is not None and rates:
            self.calibrate(self.calibration_cache, rates.pop())


def lowest_value(feature_map: Tensor) -> float:
    """Lowest value of a map; 0 if it is not negative by more than 1e-6 of the largest magnitude, as rounding leaves it."""
    # Non-finite inputs are reported elsewhere.
    lowest, highest = feature_map.float().nan_to_num(0, 0, 0).aminmax()
    return float(lowest) if -lowest > _ROUNDED * torch.maximum(-lowest, highest) else 0.0


def finite_rows(images: Tensor) -> Tensor:
    """Bool [N]: images without NaN or Inf."""
    return torch.isfinite(images).flatten(1).all(1)


def finite_samples(images: Tensor, captured: Captured) -> Tensor:
    """Bool [N]: samples without NaN or Inf in the image, the head input or the logits, where half precision may overflow."""
    # -inf is the logarithm of a probability of 0.
    logits = (captured.logits < torch.inf).all(1)
    return finite_rows(images).to(logits.device) & torch.isfinite(captured.head_input).all(1) & logits
