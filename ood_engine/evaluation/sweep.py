"""Which subspace, how many components and which detector on them: all combinations, measured from feature caches."""

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
"""The numbers of components that are tried by default, as far as the data can carry them; ours."""
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
    wanted: int | None


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
    """Fit `low_dim_gradient` with every basis × number of components × head, and measure it on every OOD set; no model is run.

    A combination that cannot be fitted is a row that says why, and the sweep goes on. ID samples that are also fit samples,
    and samples whose features are not finite, are left out with a warning.

    Args:
        head: the unpruned head of the model.
        kernels: the functions that compute, those of the engine (`engine.scorer.kernels`).
        fit_cache: ID samples to fit on.
        id_cache: other ID samples.
        ood_caches: OOD set name → its samples.
        bases: of `ood_engine.subspace.BASES`. "class_average" has a component a class, and is fitted once.
        components: numbers of components; None takes `COMPONENTS` up to what the anchors can span.
        heads: of `ood_engine.detectors.low_dim_gradient.HEADS`.
        normalisations: of `NORMALISATIONS`.
        cotangent: the scalar of the logits that is differentiated.
        max_anchors: most anchors of a basis.
        max_bytes: largest basis that is fitted; 2 GiB is ours.
        seed: of all that is drawn while fitting.
        progress: show a bar.
        on_rows: called with all rows so far after every combination, so that they can be kept.

    Returns:
        One row per combination and OOD set, keys as in `COLUMNS`: `auroc` and `fpr95` (ID positive) are fractions;
        `n_components` is what was found, at most `components_wanted`; `flops_per_sample` (of a batch of 64) and `bytes` count the
        basis and the matrices of the head, `fit_seconds` fitting both. `refused` is None, or the reason; such a row stands for
        all OOD sets, and its other values are None.

    Raises:
        InputError: an unknown name, an empty sequence, samples or labels that cannot be fitted on, or no sample left to measure.
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
    for subspace in with_progress(subspaces, "sweeping", progress, unit="subspace"):
        options: dict[str, Any] = {"cotangent": cotangent, "max_anchors": max_anchors}
        with _each_warning_once(said):
            for found in _of_subspace(
                FitData(fit_cache, head, kernels, seed), subspace, heads, options, max_bytes, measured
            ):
                rows.extend(found)
                if on_rows is not None:
                    on_rows(rows)
    return rows


class _Measured(NamedTuple):
    """The sets that every combination is measured on: caches with the rows of theirs that count."""

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
            raise InputError(f"{bad} of {len(scores)} scores are NaN or infinite: expected finite ones")
        return scores

    def rates(self, detector: nn.Module) -> list[Row]:
        """AUROC and FPR95 by OOD set."""
        id_scores = self.scores(detector, *self.id_set)
        rows = []
        for name, ood_set in self.ood_sets.items():
            scores = self.scores(detector, *ood_set)
            rows.append({"ood_set": name, "auroc": auroc(id_scores, scores), "fpr95": fpr_at_tpr(id_scores, scores)})
        return rows


def _of_subspace(
    data: FitData, subspace: _Subspace, heads: Sequence[str], options: dict[str, Any], max_bytes: int, sets: _Measured
) -> Iterator[list[Row]]:
    """The rows of one head after the other; the basis is fitted once for all of them."""
    settings = {**options, "basis": subspace.basis, "normalisation": subspace.normalisation}
    if subspace.wanted is not None:
        settings["n_components"] = subspace.wanted
    reason, basis_seconds = None, 0.0
    try:
        _check_explicit_bytes(data.head, subspace, max_bytes)
        # This head is nothing but its basis, which `FitData` then has for the others.
        basis_seconds = _fit(data, settings, "projected_norm", max_bytes)[1]
    except _REFUSALS as error:
        reason = one_line(error)
    for head in dict.fromkeys(heads):
        named = {
            "basis": subspace.basis,
            "normalisation": subspace.normalisation,
            "components_wanted": subspace.wanted,
            "head": head,
        }
        if reason is not None:
            yield [_row(named, refused=reason)]
            continue
        try:
            detector, seconds = _fit(data, settings, head, max_bytes)
            with torch.inference_mode(False), torch.no_grad(), full_precision(data.head.weight.device):
                rates = sets.rates(detector)
        except _REFUSALS as error:
            yield [_row(named, refused=one_line(error))]
            continue
        cost = _cost(detector) | {"fit_seconds": round(basis_seconds + seconds, 4)}
        yield [_row(named, **cost, **rate) for rate in rates]


def _fit(data: FitData, settings: dict[str, Any], head: str, max_bytes: int) -> tuple[LowDimGradient, float]:
    """A fitted detector, and the seconds it took."""
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
    """What a score reads and computes: the projection, and one multiply and add for every entry of the head's matrices."""
    buffers = [] if detector.low is None else [buffer for buffer in detector.low.buffers() if buffer is not None]
    entries = sum(buffer.numel() for buffer in buffers if buffer.ndim == 2)
    return {
        "n_components": detector.basis.n_components,
        "flops_per_sample": round(detector.basis.flops(SAMPLES) / SAMPLES) + 2 * entries,
        "bytes": detector.basis.bytes + sum(buffer.numel() * buffer.element_size() for buffer in buffers),
    }


def _row(named: Row, **values: Any) -> Row:
    known = {**named, **values}
    return {column: known.get(column) for column in COLUMNS}


def _check_explicit_bytes(head: ok.Head, subspace: _Subspace, max_bytes: int) -> None:
    """Refuse components that would be too large before they are made; the other forms stay small."""
    classes, width = head.weight.shape
    if subspace.basis == "explicit" and subspace.wanted is not None:
        required = subspace.wanted * classes * (width + 1) * head.weight.element_size()
        if required > max_bytes:
            raise InputError(_too_large(required, max_bytes))


def _too_large(required: int, max_bytes: int) -> str:
    return f"a basis of {required / 2**20:.3g} MiB: expected at most {max_bytes / 2**20:.3g} MiB; raise the limit or ask for less"


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
    """Centred gradients of n anchors span n - 1 directions, and no more than there are parameters."""
    classes, width = data.head.weight.shape
    most = max(1, min(len(data.split(max_anchors)[0]) - 1, classes * (width + 1)))
    return [number for number in COMPONENTS if number <= most] or [most]


def _usable(name: str, cache: FeatureCache, seen: FeatureCache | None = None) -> Tensor:
    """Positions of the samples with finite features that are none of `seen`."""
    finite = torch.cat([torch.isfinite(rows.features).all(1) for rows in cache.batches()])
    fresh = torch.ones_like(finite)
    if seen is not None:
        fresh = ~torch.isin(cache.rows.fingerprints, seen.rows.fingerprints)
    problems = {"have NaN or infinite features": int((~finite).sum()), "are also fit samples": int((~fresh).sum())}
    for problem, count in problems.items():
        if count == len(cache):
            raise InputError(f"all {count} samples of {name} {problem}: expected some to measure; give other images")
        if count:
            warnings.warn(
                f"{name}: {count} of {len(cache)} samples {problem}, and are left out", OodEngineWarning, stacklevel=3
            )
    index = (finite & fresh).nonzero().squeeze(1)
    if not len(index):
        raise InputError(f"no sample of {name} is left to measure: expected finite images that are no fit images")
    return index


@contextmanager
def _each_warning_once(said: set[str]) -> Iterator[None]:
    """Let a warning through where none of the same words came before: many combinations meet the same data."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if str(warning.message) not in said:
            said.add(str(warning.message))
            warnings.warn(warning.message, warning.category, stacklevel=3)
