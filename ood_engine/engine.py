"""The engine: fit → calibrate → score → predict → save / load."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

import ood_kernels as ok

from . import state as states
from .calibration import Calibration
from .detectors import Detector, changed_settings, create_detector
from .errors import (
    DetectorUnavailableError,
    InputError,
    NotFittedError,
    OodEngineWarning,
    one_of,
)
from .evaluation.by_class import flagged_by_class
from .evaluation.corruptions import CORRUPTIONS
from .evaluation.tune import tune
from .features.agreement import Agreement
from .features.cache import CacheWriter, FeatureCache
from .features.canary import Canary
from .features.held_out import HeldOut
from .features.label_checks import class_names_of
from .features.loader import Loader, image_batches, most_samples
from .features.set_up import Labels, SetUp
from .identity import ModelDigest, SyntheticInputs
from .model.tap import Tap, TapPlan
from .restore import head_size, restore
from .runtime import Runtime
from .scorer import Scorer
from .scores import Scores

__all__ = ["DEFAULT_DETECTORS", "Engine"]

DEFAULT_DETECTORS = ("nap_energy", "opnp", "low_dim_gradient")


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _untraced(method: _Method) -> _Method:
    """Leave a method out of what torch.compile traces: hooks, locks and thread-local storage are not for it."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(_Method, call)


class Engine:
    """Out-of-distribution scores for a classifier, from its last feature map and its last layer.

    The model stays unchanged: no hooks, no change of mode. Scoring is thread-safe; fitting, tuning and loading are not. Methods
    raise NotFittedError before `fit` or `load`; `predict` and `p_values` also before `calibrate`. `progress` shows a progress bar.

    Args:
        model: a trained classifier that ends in an `nn.Linear` (or its softmax).
        detectors: names, see `available_detectors`; by default those of `DEFAULT_DETECTORS` that the model supports.
        settings: detector name → settings other than its defaults, such as {"nap_energy": {"w": 0.4}}.
        head: name of the head; found and verified automatically by default.
        feature_map: name of the module that outputs the feature map; found and verified automatically by default.
        rectify: compute NAP on ReLU(map), for maps with negative values. "auto" decides it in `fit` from all ID batches, says so,
            and never changes it later; magnitudes below 1e-6 of the largest do not count. Ours: the paper's maps have none.
        seed: seed of every random choice in fitting.
        runtime: precision, backend and CUDA graphs of every computation.

    Attributes:
        scorer: the scoring pipeline behind this interface.
        cache: feature cache of `fit`; None after `load`.
        unavailable: default detector → why this model does not support it.
        tuning: rows of the last `tune`: detector, settings, auroc.
        fit_fingerprints: int64 [n] of the images of `fit`, see `features.cache.fingerprint`.
        set_up: what `fit` found out about labels and predictions, and the objections overruled by force=True.
        information: user metadata kept in the state file; JSON values.

    Raises:
        TapError: no linear head, an unknown layer, or non-finite weights.
        InputError: an unknown detector or setting.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ood_engine.demo import small_cnn
        >>> images = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> engine = Engine(small_cnn(), ["nap_energy"]).fit([images[:128]]).calibrate([images[128:]])
        >>> engine.score(images[:4])["nap_energy"].shape
        torch.Size([4])
        >>> engine.predict(torch.zeros(1, 1, 8, 8))
        {'nap_energy': tensor([True])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     engine.save(f"{folder}/state.safetensors")
        ...     engine = Engine.load(f"{folder}/state.safetensors", small_cnn())
    """

    def __init__(
        self,
        model: nn.Module,
        detectors: Sequence[str] | None = None,
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        head: str | None = None,
        feature_map: str | None = None,
        rectify: bool | Literal["auto"] = "auto",
        seed: int = 0,
        runtime: Runtime | None = None,
    ) -> None:
        if isinstance(detectors, str):
            raise InputError(f"detectors={detectors!r}: expected a sequence of names, such as ({detectors!r},)")
        if detectors is not None and not detectors:
            raise InputError("detectors=(): expected at least one name; see ood_engine.available_detectors()")
        if rectify not in (True, False, "auto"):
            raise InputError(f"rectify={rectify!r}: expected True, False or 'auto'")
        self._are_defaults, self._rectify = detectors is None, rectify
        names = tuple(dict.fromkeys(DEFAULT_DETECTORS if detectors is None else detectors))
        stray = sorted(set(settings or {}) - set(names))
        if stray:
            raise InputError(f"settings for {stray[0]!r}: {one_of(stray[0], names)}")
        unfitted = {name: create_detector(name, **(settings or {}).get(name, {})) for name in names}
        tap = Tap(model, head=head, feature_map=feature_map)
        self.scorer = Scorer(tap, unfitted, runtime or Runtime(), rectify=rectify is True)
        self.seed = seed
        self.cache: FeatureCache | None = None
        self.unavailable: dict[str, str] = {}
        self.tuning: list[dict[str, Any]] = []
        self.information: dict[str, Any] = {}
        self.set_up = SetUp()
        self._class_names = class_names_of(model)
        self.fit_fingerprints = torch.empty(0, dtype=torch.int64, device="cpu")
        self._canary: Canary | None = None
        self._synthetic_inputs: SyntheticInputs | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but a cache in files of this process: a pickled engine brings its model along, see `save` for less."""
        mapped = self.cache is not None and self.cache.directory is not None
        return {**vars(self), "cache": None} if mapped else vars(self)

    @property
    def detectors(self) -> dict[str, Detector]:
        """Name → detector."""
        return self.scorer.detectors

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """Name → calibration; empty before `calibrate`."""
        return self.scorer.calibrations

    @property
    def flagged_by_class(self) -> list[dict[str, Any]]:
        """Share of the calibration images flagged, by predicted class; see `ood_engine.evaluation.by_class`."""
        return flagged_by_class(self.scorer)

    @property
    def head(self) -> ok.Head:
        """The unpruned head: current weight [C, D] and bias of the model."""
        return self.scorer.head

    @property
    def plan(self) -> TapPlan:
        """The head and feature map found, and whether the map is verified."""
        return self.scorer.tap.plan

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the images of `fit`, required of all later images; None if they varied."""
        return self.scorer.image_shape

    @property
    def runtime(self) -> Runtime:
        """Precision, backend and CUDA graphs; assigning another recalibrates if the calibration features are in memory."""
        return self.scorer.runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self.scorer.runtime = runtime

    def fit(
        self,
        loader: Loader,
        *,
        labels: Labels = "given",
        force: bool = False,
        progress: bool = False,
        cache_limit_bytes: int = 4 * 2**30,
        cache_directory: str | Path | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> Engine:
        """Run the model once over ID data, cache its features, and fit every detector on them. Returns the engine.

        Args:
            loader: yields images [n, C, H, W] or (images, labels), preprocessed as in training.
            labels: classes for detectors that need labels: "given" by the loader, or "predicted" by the model.
            force: go on where labels, class folders or logits show a wrong set-up; warns, and is recorded in the state.
            cache_limit_bytes: largest feature cache kept in memory; beyond it, memory-mapped files.
            cache_directory: parent of their folder, which is removed with the engine; None: the system's temporary directory.
            cache_dtype: dtype of the cached features; None keeps that of the kernels. torch.float16 halves their size, at a
                relative rounding error of 5e-4.

        Raises:
            InputError: no or too few images, images the model rejects, NaN or Inf, labels out of range, or a wrong set-up: labels
                that the model predicts by chance, class folders other than its classes, a multi-label or one-logit head. After
                the last image the features are kept, for `refit(force=True)` or another engine's `fit_features(engine.cache, ...)`.
            TapError: head or map not found, or recomputed logits that differ from the model's.
            DetectorUnavailableError: a detector named explicitly that this model does not support.
        """
        with torch.inference_mode(False), torch.no_grad(), self._deciding(keeps_both=True):
            writer = CacheWriter(cache_limit_bytes, cache_directory, cache_dtype)
            shapes, set_up = set(), SetUp(labels, force)
            for number, (images, given) in enumerate(image_batches(loader, "fitting", progress)):
                if number == 0:
                    self._start_fit(images, set_up)
                    set_up.check_folders(loader, given, self._class_names, len(self.head.weight))
                writer.append(self.scorer.extract_batch(images, given, learn=True))
                shapes.add(tuple(images.shape[1:]))
            self.scorer.image_shape = shapes.pop() if len(shapes) == 1 else None
            self._fit_anew(self._decided(writer.finish()), progress, set_up)
        return self

    def fit_features(
        self,
        cache: FeatureCache,
        images: Tensor,
        *,
        labels: Labels = "given",
        force: bool = False,
        progress: bool = False,
    ) -> Engine:
        """Fit every detector on precomputed features, such as those of a file. Returns the engine.

        Args:
            cache: ID features from this model, see `FeatureCache.from_features`.
            images: one batch [n, C, H, W], to find head and map.
            labels, force: as in `fit`.

        Raises:
            InputError: a feature width other than the head's, too few samples, NaN or Inf; or as `fit`.
            TapError, DetectorUnavailableError: as `fit`.
        """
        with torch.inference_mode(False), torch.no_grad(), self._deciding(cache.rows.nap_mean.shape[1] > 0):
            set_up = SetUp(labels, force)
            self._start_fit(images, set_up)
            self.scorer.extract_batch(images, torch.zeros(len(images), dtype=torch.int64, device="cpu"), learn=True)
            is_pooled = self.plan.proven and not self.plan.tail and not self.scorer.rectify
            set_up.check_cache(cache, self.head, self.detectors, is_pooled)
            self.scorer.image_shape, self.scorer.positions = tuple(images.shape[1:]), None
            self._fit_anew(self._decided(cache), progress, set_up)
        return self

    def refit(self, *, force: bool = False, **parameters: Any) -> Engine:
        """Refit from the cache with other settings, without running the model, and recalibrate. Returns the engine.

        Args:
            force: as in `fit`, such as after one that was refused.
            **parameters: detector=dict of its settings, or setting=value for every detector that has it:
                `refit(opnp={"weight_range": (0.2, 1.0)})`, `refit(eps=0.5)`.

        Raises:
            NotFittedError: no cache: before `fit`, or after `load`.
            InputError: an unknown name or a value out of range.
        """
        if self.cache is None:
            raise NotFittedError(
                "refit needs the feature cache of fit(loader), which state files do not contain: call fit(loader)"
            )
        self.scorer.tap.require_unchanged()
        settings = changed_settings(self.detectors, parameters)
        with torch.inference_mode(False), torch.no_grad():
            refitted = {name: create_detector(name, **chosen) for name, chosen in settings.items()}
            self.set_up.force |= force
            self.scorer.fit(self.cache, refitted, self.seed, False, self.set_up)
        self.scorer.recalibrate()
        return self

    def calibrate(
        self, loader: Loader, false_alarm_rate: float = 0.05, *, overlap: str = "refuse", progress: bool = False
    ) -> Engine:
        """Set the thresholds on held-out ID data for a given false-alarm rate in `predict`. Returns the engine.

        Args:
            loader: yields held-out ID images; labels are ignored.
            false_alarm_rate: share of ID inputs to flag, in (0, 1).
            overlap: "refuse" or "drop" samples used in `fit`.

        Raises:
            CalibrationError: samples used in `fit`, too few samples for the rate, or non-finite scores.
            InputError: images the model rejects.
        """
        self.scorer.require_fitted()
        rule, held_out = Calibration(false_alarm_rate), HeldOut(self.fit_fingerprints, overlap)
        rule.check_count(most_samples(loader))
        cache = held_out.kept(self.scorer.extract(loader, "calibrating", progress, held_out.check))
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
        """Select settings such as NAP's w and OPNP's ranges on pseudo-OOD data. Returns the engine.

        See `ood_engine.evaluation.tune.tune`; `tuning` holds the rows of the search.

        Raises:
            InputError: nothing to tune, images outside [0, 1] once mean and std are undone, or non-finite scores; the
                settings stay unchanged.
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
        """In-memory features of all images of a loader, for `fit_features` or a sweep.

        Raises:
            InputError: no images, or images the model rejects.
        """
        self.scorer.require_fitted()
        return self.scorer.extract(loader, "extracting", progress)

    @_untraced
    def score(self, images: Tensor) -> Scores:
        """Scores of one batch of images [N, C, H, W]: detector → float32 [N], higher = more in-distribution.

        Does not synchronise with the device: an input with NaN or Inf scores NaN and counts in `Scores.bad_rows`; one whose
        features or logits are not the model's own scores NaN and counts in `Scores.mismatched_rows`.

        Raises:
            InputError: not a floating-point batch, an empty batch, or images the model rejects.
        """
        self.scorer.require_fitted()
        with torch.no_grad():
            return self.scorer.score(images)

    @_untraced
    def score_features(self, feature_map: Tensor | None, features: Tensor | None = None) -> Scores:
        """Scores from precomputed activations, without running the model.

        Args:
            feature_map: [N, D, H, W], sufficient if verified; None for a model without one.
            features: head input [N, D], required if the map is absent or unverified.

        Raises:
            InputError: missing inputs, or shapes that do not match the head.
        """
        self.scorer.require_fitted()
        with torch.no_grad():
            return self.scorer.score_features(feature_map, features)

    def score_loader(self, loader: Loader, *, progress: bool = False) -> Scores:
        """Scores of all images of a loader, in its order, on the CPU; warns of non-finite scores.

        Raises:
            InputError: an empty loader; or as `score`.
        """
        parts = [self.score(images).cpu() for images, _ in image_batches(loader, "scoring", progress)]
        if not parts:
            raise InputError("the loader gave no images: expected at least one batch; check its path and filters")
        scores = Scores.concatenate(parts)
        scores.report()
        return scores

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Detector → bool [N], True = out-of-distribution; an input without a finite score is flagged."""
        self._require_calibrated()
        return {
            name: self.calibrations[name].is_out_of_distribution(score) for name, score in self.score(images).items()
        }

    def p_values(self, images: Tensor) -> dict[str, Tensor]:
        """Detector → conformal p-values float64 [N]; NaN for an input without a finite score."""
        self._require_calibrated()
        return {name: self.calibrations[name].p_values(score) for name, score in self.score(images).items()}

    def save(self, path: str | Path) -> None:
        """Write the fitted state to a safetensors file, see `ood_engine.state`.

        Raises:
            OodEngineError: the file cannot be written.
        """
        self.scorer.require_fitted()
        self.scorer.tap.require_unchanged(thorough=True)
        # Not from the calibration features: one of them equals each threshold, where the last bit flips the decision.
        rows = None if self._canary is None else self._canary.rows
        if self.cache is not None:
            rows = Canary.choose(self.cache)
        assert rows is not None
        scorer, inputs = self.scorer, self._synthetic_inputs
        assert inputs is not None
        state = states.State(
            plan=self.plan,
            head=head_size(scorer),
            model=ModelDigest.of(scorer.tap.tensors()),
            rectify=scorer.rectify,
            agreement=scorer.agreement or Agreement(),
            image_shape=scorer.image_shape,
            positions=scorer.positions,
            set_up=self.set_up.record,
            seed=self.seed,
            detectors=scorer.detectors,
            calibrations=scorer.calibrations,
            calibrated_under=scorer.calibrated_under,
            fit_fingerprints=self.fit_fingerprints,
            canary=Canary(rows, scorer.score_cache(FeatureCache(rows)), inputs, self.score(inputs.images()).cpu()),
            unavailable=self.unavailable,
            tuning=self.tuning,
            information=self.information,
        )
        states.write(state, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, runtime: Runtime | None = None, force: bool = False) -> Engine:
        """An engine from a state file and the model it was fitted to; warns if `runtime` differs from that of the calibration.

        The model is known by a digest of all its parameters and buffers, also cast to another dtype. Of a model whose tensors
        differ, such as a quantised or merged one, the scores on synthetic inputs decide: they may move by a quarter of their spread
        on ID samples, and a warning says by how much they did.

        Args:
            force: warn where another model, or scores that changed, would be refused.

        Raises:
            StateError: a damaged file, another format version, fields out of range, a state fitted to another model, or one that
                does not reproduce its own scores.
            TapError: a model without a linear head, or with non-finite weights.
        """
        state = states.read(Path(path))
        engine = cls(model, tuple(state.detectors), rectify=state.rectify, seed=state.seed, runtime=runtime)
        restore(engine.scorer, state, Path(path), force=force)
        engine.fit_fingerprints, engine._canary = state.fit_fingerprints, state.canary
        engine._synthetic_inputs, engine.set_up = state.canary.inputs, SetUp.of_record(state.set_up)
        engine.unavailable, engine.tuning, engine.information = state.unavailable, state.tuning, state.information
        return engine

    def _start_fit(self, images: Tensor, set_up: SetUp) -> None:
        """Find head and map; drop default detectors without the map they need, and raise for detectors named explicitly."""
        scorer = self.scorer
        scorer.image_shape = scorer.agreement = scorer.positions = None
        scorer.tap.find(images)
        self._synthetic_inputs = SyntheticInputs.like(images)
        feature_map = scorer.run(images[:32]).feature_map
        set_up.check_head(self.head, self.plan.sigmoid, self.detectors)
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

    @contextmanager
    def _deciding(self, keeps_both: bool) -> Iterator[None]:
        """While undecided, NAP is computed on the ReLU, which a map without negative values equals."""
        scorer = self.scorer
        before = scorer.rectify, scorer.agreement, scorer.positions, scorer.image_shape
        scorer.rectify = self._rectify is True or (self._rectify == "auto" and keeps_both)
        scorer.lowest = 0.0
        try:
            yield
        except BaseException:
            if scorer.is_fitted:  # else the cache of a refused fit is for what was decided
                scorer.rectify, scorer.agreement, scorer.positions, scorer.image_shape = before
            raise

    def _decided(self, cache: FeatureCache) -> FeatureCache:
        """Decide `rectify`, and leave out NAP's means where they turn out to be the features."""
        scorer, plan = self.scorer, self.plan
        if self._rectify != "auto" or not scorer.rectify:
            return cache
        if scorer.lowest < 0:
            warnings.warn(
                f"the feature map {plan.feature_map!r} has negative values (down to {scorer.lowest:.3g}), so that NAP is"
                " computed on its ReLU; pass rectify=True to choose this yourself",
                OodEngineWarning,
                stacklevel=3,
            )
            return cache
        scorer.rectify = False
        return cache if plan.tail or not plan.proven else cache.without_nap_mean()

    def _fit_anew(self, cache: FeatureCache, progress: bool, set_up: SetUp) -> None:
        if not self.scorer.is_fitted:
            self._keep(cache, set_up)  # even if the fit is refused
        detectors = {name: create_detector(name, **old.settings) for name, old in self.detectors.items()}
        self.scorer.fit(cache, detectors, self.seed, progress, set_up)
        self._keep(cache, set_up)
        # The weights may have changed since calibration, and the calibration features with them.
        self.scorer.calibrations, self.scorer.calibration_cache = {}, None

    def _keep(self, cache: FeatureCache, set_up: SetUp) -> None:
        self.cache, self.set_up, self.fit_fingerprints = cache, set_up, cache.rows.fingerprints.clone()

    def _require_calibrated(self) -> None:
        self.scorer.require_fitted()
        if not self.calibrations:
            raise NotFittedError("the engine is not calibrated: call calibrate(loader) with fresh ID images first")
