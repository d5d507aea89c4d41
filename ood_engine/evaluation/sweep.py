"""Sweep over bases, numbers of components and heads of `low_dim_gradient`, measured from feature caches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ood_kernels as ok

from ..detectors import create_detector
from ..detectors.low_dim_gradient import HEADS, LowDimGradient
from ..errors import InputError, OodEngineError, OodEngineWarning, one_line
from ..features.cache import FeatureCache
from ..features.fit_data import FitData, signals_from_rows
from ..features.loader import with_progress
from ..runtime import Kernels, full_precision
from ..subspace import BASES
from .metrics import auroc, fpr_at_tpr

__all__ = ["COLUMNS", "COMPONENTS", "NORMALISATIONS", "sweep"]

Row = dict[str, Any]

COMPONENTS = (8, 32, 128, 512)
"""Default numbers of components, up to what the data can span: our default; the paper gives none."""
NORMALISATIONS = ("none", "nfk", "nfk-separable")
COLUMNS = (
    "basis",
    "normalisation",
    "components_wanted",
    "n_components",
    "head",
    "ood_set",
    "auroc",
    "fpr95",
    "flops_per_sample",
    "bytes",
    "fit_seconds",
    "refused",
)
"""Keys of a row, in order."""
SAMPLES = 64
_REFUSALS = (OodEngineError, MemoryError, torch.OutOfMemoryError, torch.linalg.LinAlgError)


class _Subspace(NamedTuple):
    basis: str
    normalisation: str
    components_wanted: int | None


def sweep(
    head: ok.Head,
    kernels: Kernels,
    fit_cache: FeatureCache,
    id_cache: FeatureCache,
    ood_caches: Mapping[str, FeatureCache],
    *,
    bases: Sequence[str] = tuple(BASES),
    components: Sequence[int] | None = None,
    heads: Sequence[str] = HEADS,
    normalisations: Sequence[str] = ("none",),
    cotangent: str = "energy",
    max_anchors: int = 4096,
    max_bytes: int = 2 * 2**30,
    seed: int = 0,
    progress: bool = False,
    on_rows: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Fit `low_dim_gradient` for each basis × number of components × head and evaluate it on each OOD set, without running a model.

    A combination that cannot be fitted becomes a row with the reason, and the sweep continues. ID samples that are also fit samples
    and samples with non-finite features are excluded with a warning.

    Args:
        head: the unpruned head of the model.
        kernels: kernels of the engine's runtime (`engine.scorer.kernels`).
        fit_cache: ID samples to fit on.
        id_cache: held-out ID samples.
        ood_caches: OOD set name → samples.
        bases: names in `ood_engine.subspace.BASES`; "class_average" has one component per class and is fitted once.
        components: numbers of components; None: `COMPONENTS` up to what the anchors can span.
        heads: names in `ood_engine.detectors.low_dim_gradient.HEADS`.
        normalisations: names in `NORMALISATIONS`.
        cotangent: name of the scalar function of the logits that is differentiated.
        max_anchors: maximum number of anchors of a basis.
        max_bytes: maximum size of a basis; 2 GiB is our default.
        seed: seed of all random draws in fitting.
        progress: show a progress bar.
        on_rows: called after each combination with all rows so far, for instance to save them.

    Returns:
        One row per combination and OOD set, with the keys `COLUMNS`: `auroc` and `fpr95` (ID positive) are fractions;
        `n_components` is the number found, at most `components_wanted`; `flops_per_sample` (in a batch of 64), `bytes` and
        `fit_seconds` cover the basis and the matrices of the head. `refused` is None or the reason why the combination was not
        fitted; such a row stands for all OOD sets, and its measurements are None.

    Raises:
        InputError: an unknown name, an empty sequence, unsuitable samples or labels, or no sample left to evaluate.

    Example:
        >>> import torch, ood_engine as oe
        >>> from ood_engine.demo import SmallCNN
        >>> images = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> engine = oe.Engine(SmallCNN(4), ["energy"]).fit([images[:48]])
        >>> id_cache, ood_cache = engine.extract([images[48:72]]), engine.extract([images[72:] ** 4])
        >>> caches = (engine.cache, id_cache, {"dark": ood_cache})
        >>> rows = sweep(engine.head, engine.scorer.kernels, *caches, bases=["dual"], components=[2, 8], heads=["knn", "residual"])
        >>> [(row["n_components"], row["head"]) for row in rows]
        [(2, 'knn'), (2, 'residual'), (8, 'knn'), (8, 'residual')]
    """
    _check_names("bases", bases, tuple(BASES))
    _check_names("heads", heads, HEADS)
    _check_names("normalisations", normalisations, NORMALISATIONS)
    if not ood_caches:
        raise InputError("ood_caches: expected at least one OOD set")
    data = FitData(fit_cache, head, kernels, seed)
    components = _default_components(data, max_anchors) if components is None else _checked_components(components)
    subspaces = [
        _Subspace(basis, normalisation, wanted)
        for basis in dict.fromkeys(bases)
        for normalisation in dict.fromkeys(normalisations)
        for wanted in ((None,) if basis == "class_average" else components)
    ]
    usable = {name: (cache, _usable(name, cache)) for name, cache in ood_caches.items()}
    measured = _Measured(head, kernels, (id_cache, _usable("ID", id_cache, fit_cache)), usable)
    rows: list[Row] = []
    said: set[str] = set()
    options: dict[str, Any] = {"cotangent": cotangent, "max_anchors": max_anchors}
    for subspace in with_progress(subspaces, "sweeping", progress, unit="subspace"):
        with _each_warning_once(said):
            data = FitData(fit_cache, head, kernels, seed)
            for found in _of_subspace(data, subspace, heads, options, max_bytes, measured):
                rows.extend(found)
                if on_rows is not None:
                    on_rows(rows)
    return rows


class _Measured(NamedTuple):
    """The evaluation sets: caches, with the indices of their usable rows."""

    head: ok.Head
    kernels: Kernels
    id_set: tuple[FeatureCache, Tensor]
    ood_sets: Mapping[str, tuple[FeatureCache, Tensor]]

    def scores(self, detector: nn.Module, cache: FeatureCache, index: Tensor) -> Tensor:
        """[N] on the CPU.

        Raises:
            InputError: scores that are not finite.
        """
        parts = [
            detector(signals_from_rows(rows, self.head, self.kernels)).float().cpu() for rows in cache.batches(index)
        ]
        scores = torch.cat(parts)
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            raise InputError(f"{bad} of {len(scores)} scores are NaN or infinite: expected finite scores")
        return scores

    def rates(self, detector: nn.Module) -> list[Row]:
        """AUROC and FPR95 per OOD set."""
        id_scores = self.scores(detector, *self.id_set)
        rows = []
        for name, ood_set in self.ood_sets.items():
            scores = self.scores(detector, *ood_set)
            rows.append({"ood_set": name, "auroc": auroc(id_scores, scores), "fpr95": fpr_at_tpr(id_scores, scores)})
        return rows


def _of_subspace(
    data: FitData, subspace: _Subspace, heads: Sequence[str], options: dict[str, Any], max_bytes: int, sets: _Measured
) -> Iterator[list[Row]]:
    """The rows of each head in turn; the basis is fitted once for all heads."""
    settings = {**options, "basis": subspace.basis, "normalisation": subspace.normalisation}
    if subspace.components_wanted is not None:
        settings["n_components"] = subspace.components_wanted
    reason, basis_seconds = None, 0.0
    try:
        _check_explicit_bytes(data.head, subspace, max_bytes)
        # This head consists of its basis alone, which `FitData` then holds for the others.
        basis_seconds = _fit(data, settings, "projected_norm", max_bytes)[1]
    except _REFUSALS as error:
        reason = one_line(error)
    for head in dict.fromkeys(heads):
        found: list[Row] = [{"refused": reason}]
        if reason is None:
            try:
                detector, seconds = _fit(data, settings, head, max_bytes)
                with torch.inference_mode(False), torch.no_grad(), full_precision(data.head.weight.device):
                    rates = sets.rates(detector)
                cost = _cost(detector) | {"fit_seconds": round(basis_seconds + seconds, 4)}
                found = [cost | rate for rate in rates]
            except _REFUSALS as error:
                found = [{"refused": one_line(error)}]
        named = dict.fromkeys(COLUMNS) | subspace._asdict() | {"head": head}
        yield [named | row for row in found]


def _fit(data: FitData, settings: dict[str, Any], head: str, max_bytes: int) -> tuple[LowDimGradient, float]:
    """A fitted detector and the fitting time in seconds."""
    detector = create_detector("low_dim_gradient", head=head, **settings)
    assert isinstance(detector, LowDimGradient)
    device = data.head.weight.device
    started = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad(), full_precision(device):
        detector.to(device)
        detector.fit(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    if detector.basis.bytes > max_bytes:
        raise InputError(_too_large(detector.basis.bytes, max_bytes))
    return detector, seconds


def _cost(detector: LowDimGradient) -> Row:
    """Operations and bytes of a score: the projection, and one multiply-add per entry of the head's matrices."""
    buffers = [] if detector.low is None else [buffer for buffer in detector.low.buffers() if buffer is not None]
    entries = sum(buffer.numel() for buffer in buffers if buffer.ndim == 2)
    return {
        "n_components": detector.basis.n_components,
        "flops_per_sample": round(detector.basis.flops(SAMPLES) / SAMPLES) + 2 * entries,
        "bytes": detector.basis.bytes + sum(buffer.numel() * buffer.element_size() for buffer in buffers),
    }


def _check_explicit_bytes(head: ok.Head, subspace: _Subspace, max_bytes: int) -> None:
    """Refuse oversized explicit components before they are computed; the other bases stay small."""
    classes, width = head.weight.shape
    if subspace.basis == "explicit" and subspace.components_wanted is not None:
        required = subspace.components_wanted * classes * (width + 1) * head.weight.element_size()
        if required > max_bytes:
            raise InputError(_too_large(required, max_bytes))


def _too_large(required: int, max_bytes: int) -> str:
    return f"a basis of {required / 2**20:.3g} MiB: expected at most {max_bytes / 2**20:.3g} MiB; raise the limit or lower K"


def _check_names(what: str, given: Sequence[str], known: tuple[str, ...]) -> None:
    if isinstance(given, str) or not given:
        raise InputError(f"{what}={given!r}: expected some of {', '.join(known)}")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{what}: {unknown[0]!r} is not known; expected some of {', '.join(known)}")


def _checked_components(given: Sequence[int]) -> list[int]:
    wrong = [number for number in given if not isinstance(number, int) or isinstance(number, bool) or number < 1]
    if wrong or not given:
        raise InputError(f"components={list(given)!r}: expected whole numbers of at least 1, such as 8, 32, 128")
    return sorted(set(given))


def _default_components(data: FitData, max_anchors: int) -> list[int]:
    """Centred gradients of n anchors span at most n - 1 directions, and never more than the number of parameters."""
    classes, width = data.head.weight.shape
    most = max(1, min(len(data.split(max_anchors)[0]) - 1, classes * (width + 1)))
    return [number for number in COMPONENTS if number <= most] or [most]


def _usable(name: str, cache: FeatureCache, seen: FeatureCache | None = None) -> Tensor:
    """Indices of the samples with finite features that are not in `seen`."""
    finite = torch.cat([torch.isfinite(rows.features).all(1) for rows in cache.batches()])
    fresh = torch.ones_like(finite)
    if seen is not None:
        fresh = ~torch.isin(cache.rows.fingerprints, seen.rows.fingerprints)
    problems = {"have NaN or infinite features": int((~finite).sum()), "are also fit samples": int((~fresh).sum())}
    for problem, count in problems.items():
        if count == len(cache):
            raise InputError(
                f"all {count} samples of {name} {problem}: expected some to evaluate; provide other images"
            )
        if count:
            warnings.warn(
                f"{name}: {count} of {len(cache)} samples {problem}, and are left out", OodEngineWarning, stacklevel=3
            )
    index = (finite & fresh).nonzero().squeeze(1)
    if not len(index):
        raise InputError(f"no sample of {name} is left to evaluate: expected finite images that were not used in fit")
    return index


@contextmanager
def _each_warning_once(said: set[str]) -> Iterator[None]:
    """Pass each distinct warning once: many combinations share the same data."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if str(warning.message) not in said:
            said.add(str(warning.message))
            warnings.warn(warning.message, warning.category, stacklevel=3)
