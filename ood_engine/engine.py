"""The engine: fit → calibrate → score → predict → save / load."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ood_kernels as ok

from . import state as states
from .calibration import Calibration
from .detectors import Detector, changed_settings, create_detector
from .errors import (
    CalibrationError,
    DetectorUnavailableError,
    InputError,
    NotFittedError,
    OodEngineWarning,
    StateDriftWarning,
)
from .evaluation.corruptions import CORRUPTIONS
from .evaluation.tune import tune
from .features.cache import CacheWriter, FeatureCache
from .features.canary import Canary
from .features.loader import Loader, image_batches
from .model.tap import Tap, TapPlan
from .runtime import Runtime
from .scorer import Scorer
from .scores import Scores

__all__ = ["DEFAULT_DETECTORS", "Engine"]

DEFAULT_DETECTORS = ("nap_energy", "opnp", "low_dim_gradient")


class Engine:
    """Out-of-distribution scores for a classifier from its last feature map and its last layer.

    The model is left as it is: no hooks, no changed mode. Scoring is thread-safe; fitting, tuning and loading are not.

    Args:
        model: the classifier; it should be trained, and end in an `nn.Linear` (or the softmax of one).
        detectors: names, see `available_detectors`. None takes `DEFAULT_DETECTORS` as far as the model supports them.
        settings: detector name → settings that differ from its defaults, such as {"nap_energy": {"w": 0.4}}.
        head: name of the head, where it is not to be found by proof.
        feature_map: name of the module whose output is the map, where it is not to be found by proof.
        rectify: let NAP see ReLU(map), for models whose map has negative values.
        seed: of everything drawn while fitting.
        runtime: precision, backend and CUDA graphs of all that is computed; see `Runtime`.

    Attributes:
        scorer: what fitting, calibration and scores compute through.
        cache: the feature cache of `fit`; None after `load`.
        unavailable: default detectors that this model cannot have → why.
        tuning: rows of the last `tune`: detector, settings, auroc.
        information: facts kept in the state file; JSON values.

    Raises:
        TapError: a model without a linear head, an unknown layer, or weights that are not finite.
        InputError: an unknown detector or setting.
    """

    def __init__(
        self,
        model: nn.Module,
        detectors: Sequence[str] | None = None,
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        head: str | None = None,
        feature_map: str | None = None,
        rectify: bool = False,
        seed: int = 0,
        runtime: Runtime | None = None,
    ) -> None:
        if isinstance(detectors, str):
            raise InputError(f"detectors={detectors!r}: expected a sequence of names, such as ({detectors!r},)")
        if detectors is not None and not detectors:
            raise InputError("detectors=(): expected at least one name; see ood_engine.available_detectors()")
        self._are_defaults = detectors is None
        names = tuple(dict.fromkeys(DEFAULT_DETECTORS if detectors is None else detectors))
        stray = sorted(set(settings or {}) - set(names))
        if stray:
            raise InputError(f"settings for {stray[0]!r}: expected one of this engine's detectors, {', '.join(names)}")
        unfitted = {name: create_detector(name, **(settings or {}).get(name, {})) for name in names}
        tap = Tap(model, head=head, feature_map=feature_map)
        self.scorer = Scorer(tap, unfitted, runtime or Runtime(), rectify=rectify)
        self.seed = seed
        self.cache: FeatureCache | None = None
        self.unavailable: dict[str, str] = {}
        self.tuning: list[dict[str, Any]] = []
        self.information: dict[str, Any] = {}
        self._fit_fingerprints = torch.empty(0, dtype=torch.int64)
        self._canary: Canary | None = None

    @property
    def detectors(self) -> dict[str, Detector]:
        """Name → detector."""
        return self.scorer.detectors

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """Name → calibration; empty before `calibrate`."""
        return self.scorer.calibrations

    @property
    def head(self) -> ok.Head:
        """The unpruned head: weight [C, D] and bias, as they are in the model now."""
        return self.scorer.head

    @property
    def plan(self) -> TapPlan:
        """Which head and feature map were found, and whether the map is proven."""
        return self.scorer.tap.plan

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the images of `fit`, which all others must have; None where they varied."""
        return self.scorer.image_shape

    @property
    def runtime(self) -> Runtime:
        """Precision, backend and CUDA graphs; set it to change them. Thresholds follow where their features are in memory."""
        return self.scorer.runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self.scorer.runtime = runtime

    def fit(
        self,
        loader: Loader,
        *,
        progress: bool = False,
        cache_limit_bytes: int = 4 * 2**30,
        cache_directory: str | Path | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> Engine:
        """Run the model once over ID data, keep its features, and fit every detector from them.

        Args:
            loader: yields images [n, C, H, W], or (images, labels), preprocessed as in training.
            progress: show a bar.
            cache_limit_bytes: size beyond which the feature cache is kept in memory-mapped files.
            cache_directory: where those files go, in a folder that is removed with the engine; None takes the system's.
            cache_dtype: what features are kept in: torch.float16 halves the room, and rounds what detectors are fitted from to
                5e-4 of each value. None keeps them as the kernels give them.

        Returns:
            The engine itself.

        Raises:
            InputError: no or too few images, images the model rejects, NaN or Inf, labels out of range.
            TapError: head or map not found, or not proven by the recomputed logits.
            DetectorUnavailableError: a detector was named that this model cannot have.
        """
        with torch.inference_mode(False), torch.no_grad():
            writer = CacheWriter(cache_limit_bytes, cache_directory, cache_dtype)
            self.scorer.image_shape, shapes = None, set()
            for number, (images, labels) in enumerate(image_batches(loader, "fitting", progress)):
                if number == 0:
                    self.scorer.tap.find(images)
                    self._leave_out_unavailable(images)
                writer.append(self.scorer.extract_batch(images, labels))
                shapes.add(tuple(images.shape[1:]))
            self._fit_anew(writer.finish(), progress)
        self.scorer.image_shape = shapes.pop() if len(shapes) == 1 else None
        return self

    def fit_features(self, cache: FeatureCache, images: Tensor, *, progress: bool = False) -> Engine:
        """Fit every detector from features that are there already, such as those of a file; see `FeatureCache.from_features`.

        Args:
            cache: ID samples, as this model and head see them.
            images: one batch [n, C, H, W], on which the model is run to find its head and map.
            progress: show a bar.

        Returns:
            The engine itself.

        Raises:
            InputError: features of another width than the head's, too few of them, NaN or Inf; or as `fit`.
            TapError, DetectorUnavailableError: as `fit`.
        """
        with torch.inference_mode(False), torch.no_grad():
            self.scorer.image_shape = None
            self.scorer.tap.find(images)
            self._leave_out_unavailable(images)
            width, needing = self.head.weight.shape[1], [name for name, one in self.detectors.items() if one.needs_map]
            if cache.rows.features.shape[1] != width:
                raise InputError(
                    f"cache of {cache.rows.features.shape[1]} features a sample: expected {width}, what the head takes"
                )
            if needing and not cache.has_map:
                raise InputError(
                    f"{', '.join(needing)}: expected a cache with the maximum of each channel; give maximum=..., or leave the"
                    " detector out"
                )
            self._fit_anew(cache, progress)
        self.scorer.image_shape = tuple(images.shape[1:])
        return self

    def refit(self, **parameters: Any) -> Engine:
        """Fit again from the cache with other settings; the model is not run.

        Args:
            **parameters: either detector name → dict of its settings, or the name of a setting, which then goes to every
                detector that has it: `refit(eps=0.5)`, `refit(opnp={"weight_range": (0.2, 1.0)})`. Calibration is redone from the
                calibration features.

        Returns:
            The engine itself.

        Raises:
            NotFittedError: there is no cache, because `fit` has not run or the engine was loaded from a file.
            InputError: an unknown name or a value out of range.
        """
        if self.cache is None:
            raise NotFittedError(
                "refit needs the feature cache of fit(loader), which a state file does not hold: call fit(loader)"
            )
        settings = changed_settings(self.detectors, parameters)
        with torch.inference_mode(False), torch.no_grad():
            refitted = {name: create_detector(name, **chosen) for name, chosen in settings.items()}
            self.scorer.fit(self.cache, refitted, self.seed)
        self.scorer.recalibrate()
        return self

    def calibrate(
        self, loader: Loader, false_alarm_rate: float = 0.05, *, overlap: str = "refuse", progress: bool = False
    ) -> Engine:
        """Set thresholds from fresh ID data: `predict` then flags a share `false_alarm_rate` of ID inputs.

        Args:
            loader: yields ID images (labels are ignored) that `fit` has not seen.
            false_alarm_rate: share of ID inputs to flag, in (0, 1).
            overlap: "refuse" samples that were used in `fit`, or "drop" them.
            progress: show a bar.

        Returns:
            The engine itself.

        Raises:
            CalibrationError: samples used in `fit`, too few samples for the rate, or scores that are not finite.
            InputError: images the model rejects.
        """
        self.scorer.require_fitted()
        if overlap not in ("refuse", "drop"):
            raise InputError(f"overlap={overlap!r}: expected 'refuse' or 'drop'")
        Calibration(false_alarm_rate)  # refuses a rate out of range before the model runs
        cache = self.scorer.extract(loader, "calibrating", progress)
        used = torch.isin(cache.rows.fingerprints, self._fit_fingerprints)
        if used.any() and overlap == "refuse":
            raise CalibrationError(
                f"{int(used.sum())} of {len(cache)} calibration images were used in fit (the first is number"
                f" {int(used.nonzero()[0])}): expected fresh ID images; hold some out, or pass overlap='drop'"
            )
        if used.all():
            raise CalibrationError(
                f"all {len(cache)} calibration images were used in fit: expected fresh ID images; hold some out"
            )
        if used.any():
            cache = FeatureCache(cache.rows.select((~used).nonzero().flatten()))
        self.scorer.calibrate(cache, false_alarm_rate)
        return self

    def tune(
        self,
        loader: Loader,
        *,
        ood_loader: Loader | None = None,
        corruptions: Sequence[str] = CORRUPTIONS,
        severity: int = 3,
        mean: Sequence[float] | float = 0.0,
        std: Sequence[float] | float = 1.0,
        detectors: Sequence[str] | None = None,
        progress: bool = False,
    ) -> Engine:
        """Choose settings such as NAP's w and OPNP's ranges on pseudo-OOD data; see `ood_engine.evaluation.tune.tune`.

        Returns:
            The engine itself; the rows of the search are in `tuning`.

        Raises:
            NotFittedError: before `fit` or `load`.
            InputError: nothing to tune, images outside [0, 1] once mean and std are undone, or scores that are not finite;
                every setting is then as it was.
        """
        self.scorer.require_fitted()
        self.tuning = tune(
            self.scorer,
            loader,
            ood_loader=ood_loader,
            corruptions=corruptions,
            severity=severity,
            mean=mean,
            std=std,
            detectors=detectors,
            progress=progress,
        )
        return self

    def extract(self, loader: Loader, *, progress: bool = False) -> FeatureCache:
        """The features of everything a loader yields, in memory, such as for `fit_features` or a sweep.

        Raises:
            NotFittedError: before `fit` or `load`.
            InputError: no images, or images the model rejects.
        """
        self.scorer.require_fitted()
        return self.scorer.extract(loader, "extracting", progress)

    def score(self, images: Tensor) -> Scores:
        """Scores of one batch of images [N, C, H, W]: detector → float32 [N], higher = more in-distribution.

        Nothing waits for the device: an input with NaN or Inf gets NaN, counted in `Scores.bad_rows`.

        Raises:
            NotFittedError: before `fit` or `load`.
            InputError: not a batch of floating point images, an empty batch, or images the model rejects.
        """
        self.scorer.require_fitted()
        with torch.no_grad():
            return self.scorer.score(images)

    def score_features(self, feature_map: Tensor | None, features: Tensor | None = None) -> Scores:
        """Scores from what the model computed already; no model is run.

        Args:
            feature_map: [N, D, H, W], for a proven map all that is needed; None for a model without one.
            features: [N, D] what the head received; needed where the map is absent or unproven.

        Raises:
            NotFittedError: before `fit` or `load`.
            InputError: neither is enough, or shapes that do not fit the head.
        """
        self.scorer.require_fitted()
        with torch.no_grad():
            return self.scorer.score_features(feature_map, features)

    def score_loader(self, loader: Loader, *, progress: bool = False) -> Scores:
        """Scores of everything a loader yields, on the CPU, in its order; warns about inputs without a sound score.

        Raises:
            InputError: the loader is empty, or see `score`.
        """
        parts = [self.score(images).cpu() for images, _ in image_batches(loader, "scoring", progress)]
        if not parts:
            raise InputError("the loader gave no images: expected at least one batch; check its path and filters")
        scores = Scores.concatenate(parts)
        scores.report()
        return scores

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Detector → bool [N], True = out-of-distribution; an input without a sound score is flagged.

        Raises:
            NotFittedError: before `calibrate`; otherwise as `score`.
        """
        self._require_calibrated()
        return {
            name: self.calibrations[name].is_out_of_distribution(score) for name, score in self.score(images).items()
        }

    def p_values(self, images: Tensor) -> dict[str, Tensor]:
        """Detector → conformal p-values float32 [N] from the calibration scores; NaN for an input without a sound score.

        Raises:
            NotFittedError: before `calibrate`; otherwise as `score`.
        """
        self._require_calibrated()
        return {name: self.calibrations[name].p_values(score) for name, score in self.score(images).items()}

    def save(self, path: str | Path) -> None:
        """Write everything fitted to a safetensors file; see `ood_engine.state`.

        Raises:
            NotFittedError: before `fit` or `load`.
            OodEngineError: the file cannot be written.
        """
        self.scorer.require_fitted()
        # Not from the calibration features: one of them is each threshold itself, where the last bit changes the decision.
        rows = None if self._canary is None else self._canary.rows
        if self.cache is not None:
            rows = Canary.choose(self.cache)
        assert rows is not None
        scorer = self.scorer
        state = states.State(
            plan=self.plan,
            head=states.HeadDigest.of(self.head),
            rectify=scorer.rectify,
            image_shape=scorer.image_shape,
            seed=self.seed,
            detectors=scorer.detectors,
            calibrations=scorer.calibrations,
            calibrated_under=scorer.calibrated_under,
            fit_fingerprints=self._fit_fingerprints,
            canary=Canary(rows, scorer.score_cache(FeatureCache(rows))),
            unavailable=self.unavailable,
            tuning=self.tuning,
            information=self.information,
        )
        states.write(state, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, runtime: Runtime | None = None) -> Engine:
        """An engine from a state file, for the model it was fitted to.

        Args:
            path: of the state file.
            model: the classifier.
            runtime: precision, backend and CUDA graphs; warns where its arithmetic is not that of the calibration.

        Raises:
            StateError: the file is damaged, of another version, or was fitted to another head.
            TapError: the model's layers are others than those that were fitted.
        """
        state = states.read(Path(path))
        named_map = None if state.plan.proven else state.plan.feature_map
        engine = cls(
            model,
            tuple(state.detectors),
            feature_map=named_map,
            rectify=state.rectify,
            seed=state.seed,
            runtime=runtime,
        )
        scorer = engine.scorer
        scorer.tap.adopt(state.plan)
        state.head.check(states.HeadDigest.of(scorer.head), Path(path))
        state.to(scorer.tap.device)
        scorer.detectors, scorer.is_fitted = state.detectors, True
        scorer.calibrations, scorer.calibrated_under = state.calibrations, state.calibrated_under
        scorer.image_shape = state.image_shape
        engine._fit_fingerprints, engine._canary = state.fit_fingerprints, state.canary
        engine.unavailable, engine.tuning, engine.information = state.unavailable, state.tuning, state.information
        scorer.warn_of_arithmetic()
        now = scorer.score_cache(FeatureCache(state.canary.rows))
        drift = state.canary.drift(now, {name: one.cpu() for name, one in state.calibrations.items()})
        if drift:
            warnings.warn(
                f"the loaded state drifts on this machine ({scorer.tap.device}, {scorer.head.weight.dtype}): {'; '.join(drift)};"
                " fit again here, or load with the device and dtype it was fitted on",
                StateDriftWarning,
                stacklevel=2,
            )
        return engine

    def _leave_out_unavailable(self, images: Tensor) -> None:
        """Drop default detectors that need a map the model does not offer; refuse those that were named."""
        feature_map = self.scorer.run(images[:32]).feature_map
        reason = self.plan.reason if feature_map is None else self.scorer.check_map(feature_map)
        lacking = [name for name, detector in self.detectors.items() if detector.needs_map]
        if reason is None or not lacking:
            return
        message = f"{', '.join(lacking)} not available for this model: {reason}"
        if not self._are_defaults:
            raise DetectorUnavailableError(f"{message}; or name the map by feature_map=..., or leave the detector out")
        warnings.warn(message, OodEngineWarning, stacklevel=3)
        self.unavailable = dict.fromkeys(lacking, reason)
        self.scorer.detectors = {name: one for name, one in self.detectors.items() if name not in lacking}

    def _fit_anew(self, cache: FeatureCache, progress: bool) -> None:
        detectors = {name: create_detector(name, **old.settings) for name, old in self.detectors.items()}
        self.scorer.fit(cache, detectors, self.seed, progress)
        self.cache, self._fit_fingerprints = cache, cache.rows.fingerprints.clone()
        # The model may be another one by now, and with it the features that thresholds were set from.
        self.scorer.calibrations, self.scorer.calibration_cache = {}, None

    def _require_calibrated(self) -> None:
        self.scorer.require_fitted()
        if not self.calibrations:
            raise NotFittedError("the engine is not calibrated: call calibrate(loader) with fresh ID images first")
