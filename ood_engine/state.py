"""State files: safetensors with a JSON header, without pickle.

The header holds the format and package versions, the tap plan, a digest of the head, every detector's settings and a digest of
all tensors; the tensors are the detectors' buffers, the calibration scores, the fingerprints of the fit samples and the canary.
Tensors shared by several detectors are stored once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

import ood_kernels as ok

from .calibration import Calibration
from .detectors import Detector, create_detector
from .errors import OodEngineError, StateError
from .features.agreement import Agreement
from .features.cache import CacheRows
from .features.canary import Canary
from .files import atomic_file
from .fitted import aligned
from .model.discovery import TapPlan
from .subspace import Basis
from .version import __version__

__all__ = ["FORMAT", "HeadDigest", "State", "read", "read_header", "write"]

FORMAT = 5
_KEY = "ood_engine"
_DIGEST_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class HeadDigest(NamedTuple):
    """Identity of a head: its sizes, and the SHA-256 of its values in every dtype the model may be cast to."""

    classes: int
    features: int
    bias: bool
    dtype: str
    digests: dict[str, str]

    @classmethod
    def of(cls, head: ok.Head) -> HeadDigest:
        """The digest of a head."""
        digests = {}
        for dtype in _DIGEST_DTYPES:
            digest = hashlib.sha256(repr(tuple(head.weight.shape)).encode())
            for tensor in (head.weight, head.bias):
                if tensor is not None:
                    digest.update(_bytes(tensor.to(dtype)))
            digests[_name(dtype)] = digest.hexdigest()
        classes, features = head.weight.shape
        return cls(classes, features, head.bias is not None, _name(head.weight.dtype), digests)

    def check(self, other: HeadDigest, path: Path) -> None:
        """Raise StateError unless `other`, the head of the given model, is the same."""
        if self[:3] != other[:3]:
            raise StateError(
                f"{path}: fitted to a head of {self._words()}, this model's has {other._words()}; load the model of the fit,"
                " or fit again"
            )
        if self.digests[other.dtype] != other.digests[other.dtype]:
            raise StateError(
                f"{path}: fitted to another head: shapes agree, weights do not; load the checkpoint of the fit, or fit again"
            )

    def _words(self) -> str:
        return f"{self.classes} classes × {self.features} features {'with' if self.bias else 'without'} bias"


@dataclass
class State:
    """The persistent state of an engine.

    Attributes:
        plan: the head and feature map found.
        head: digest of the head.
        rectify: whether NAP is computed on ReLU(map).
        agreement: largest differences from the model's own activations in `fit`.
        image_shape: (C, H, W) of the images of `fit`; None if they varied.
        positions: (fewest, most) positions H·W of the feature maps of `fit`; None if unknown.
        set_up: labels and overruled objections of `fit`, see `features.set_up`; JSON values.
        seed: seed of every random choice in fitting.
        detectors: name → fitted detector.
        calibrations: name → calibration; empty before `calibrate`.
        calibrated_under: precision and backend of the calibration; None before it.
        fit_fingerprints: int64 [n] fingerprints of the samples of `fit`.
        canary: ID samples with their scores.
        unavailable: default detector → why this model does not support it.
        tuning: rows of the last tuning.
        information: user metadata; JSON values.
    """

    plan: TapPlan
    head: HeadDigest
    rectify: bool
    agreement: Agreement
    image_shape: tuple[int, ...] | None
    positions: tuple[int, int] | None
    set_up: dict[str, Any]
    seed: int
    detectors: dict[str, Detector]
    calibrations: dict[str, Calibration]
    calibrated_under: dict[str, str | None] | None
    fit_fingerprints: Tensor
    canary: Canary
    unavailable: dict[str, str]
    tuning: list[dict[str, Any]]
    information: dict[str, Any]

    def to(self, device: torch.device) -> None:
        """Move all fitted tensors; shared tensors stay shared."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Tensor:
            # Keeps the original alive next to its copy, since an id is unique only among live objects.
            return moved.setdefault(id(tensor), (tensor, tensor.to(device)))[1]

        for module in (*self.detectors.values(), *self.calibrations.values()):
            module._apply(once)


def write(state: State, path: Path) -> None:
    """Write a state file atomically.

    Raises:
        OodEngineError: a full disk, or a path that cannot be written.
    """
    tensors, aliases = _share(_tensors(state))
    header = _header(state) | {"aliases": aliases, "tensors_digest": _tensors_digest(tensors)}
    text = json.dumps(header, sort_keys=True)
    metadata = {_KEY: text, "digest": hashlib.sha256(text.encode()).hexdigest()}
    try:
        # The writer of safetensors creates files readable by their owner alone.
        with atomic_file(path) as file:
            file.write(to_bytes(tensors, metadata))
    except OSError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise OodEngineError(
            f"{path}: could not be written ({error}); {size / 2**20:.1f} MiB are needed; free some space or choose another path"
        ) from error


def read_header(path: Path) -> dict[str, Any]:
    """The header of a state file, without its tensors and without a model.

    Raises:
        StateError: no such file, not a state file, damaged, altered, or another format version.
    """
    return _open(path, with_tensors=False)[0]


def read(path: Path) -> State:
    """The state in a file, on the CPU.

    Raises:
        StateError: as `read_header`.
    """
    header, tensors = _open(path, with_tensors=True)
    tensors = {key: aligned(tensor) for key, tensor in tensors.items()}
    tensors |= {key: tensors[original] for key, original in header["aliases"].items()}
    detectors = {}
    for entry in header["detectors"]:
        detector = create_detector(entry["name"], **entry["settings"])
        detector.load_state_dict(_below(tensors, f"detectors.{entry['name']}."), assign=True)
        detectors[entry["name"]] = detector
    for same in _by_basis(detectors.values()):
        for detector in same[1:]:
            detector.basis = same[0].basis
    calibrations = {}
    for name, rate in header["false_alarm_rates"].items():
        calibrations[name] = Calibration(rate)
        calibrations[name].load_state_dict(_below(tensors, f"calibrations.{name}."), assign=True)
    canary = Canary(
        CacheRows(*(tensors[f"canary.rows.{field}"] for field in CacheRows._fields)),
        _below(tensors, "canary.scores."),
    )
    return State(
        plan=TapPlan(**header["plan"]),
        head=HeadDigest(**header["head"]),
        agreement=Agreement(**header["agreement"]),
        image_shape=tuple(header["image_shape"]) if header["image_shape"] else None,
        positions=tuple(header["positions"]) if header["positions"] else None,
        detectors=detectors,
        calibrations=calibrations,
        fit_fingerprints=tensors["fit.fingerprints"],
        canary=canary,
        **{key: header[key] for key in _AS_THEY_ARE},
    )


_AS_THEY_ARE = ("rectify", "seed", "set_up", "calibrated_under", "unavailable", "tuning", "information")


def _tensors(state: State) -> dict[str, Tensor]:
    canary = state.canary
    tensors = {f"canary.rows.{field}": column for field, column in zip(CacheRows._fields, canary.rows, strict=True)}
    tensors |= {f"canary.scores.{name}": score for name, score in canary.scores.items()}
    tensors["fit.fingerprints"] = state.fit_fingerprints
    for group, modules in (("detectors", state.detectors), ("calibrations", state.calibrations)):
        for name, module in modules.items():
            tensors |= {f"{group}.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors


def _share(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(distinct tensors, contiguous on the CPU; duplicate key → key of the same tensor)."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    distinct = {}
    for key, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            distinct[key] = tensor.detach().cpu().contiguous().clone()
    return distinct, aliases


def _header(state: State) -> dict[str, Any]:
    calibrations = state.calibrations
    return {
        "format": FORMAT,
        "package": __version__,
        "torch": torch.__version__,
        "plan": asdict(state.plan),
        "image_shape": state.image_shape,
        "positions": state.positions,
        "agreement": state.agreement._asdict(),
        "head": state.head._asdict(),
        "detectors": [{"name": name, "settings": detector.settings} for name, detector in state.detectors.items()],
        "subspaces": [_subspace(detectors) for detectors in _by_basis(state.detectors.values())],
        "false_alarm_rates": {name: calibration.false_alarm_rate for name, calibration in calibrations.items()},
        "thresholds": {name: float(calibration.threshold) for name, calibration in calibrations.items()},
        "calibration_samples": next((len(one.fitted("scores")) for one in calibrations.values()), None),
        "fit_samples": len(state.fit_fingerprints),
        **{key: getattr(state, key) for key in _AS_THEY_ARE},
    }


def _by_basis(detectors: Iterable[Detector]) -> list[list[Any]]:
    """The detectors with a gradient subspace, grouped by shared tensors."""
    found: dict[int, list[Any]] = {}
    for detector in detectors:
        basis = getattr(detector, "basis", None)
        if isinstance(basis, Basis):
            found.setdefault(basis.fitted("constants").data_ptr(), []).append(detector)
    return list(found.values())


def _subspace(detectors: list[Any]) -> dict[str, Any]:
    """A subspace, its detectors, and the cost of its basis and the alternatives for a batch of 64."""
    basis: Basis = detectors[0].basis
    plan = basis.plan(samples=64)
    return {
        "form": type(basis).__name__,
        "components": basis.n_components,
        "detectors": [detector.name for detector in detectors],
        "samples": plan.samples,
        "cheapest": plan.choice,
        "costs": [cost._asdict() for cost in plan.costs],
    }


def _open(path: Path, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise StateError(f"{path}: no such state file; make one by engine.save(path) or `ood-engine fit`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"{path}: truncated, or not a safetensors file ({error}); copy it again or fit again"
        ) from error
    text = metadata.get(_KEY)
    if text is None:
        raise StateError(f"{path}: a safetensors file, but not an ood-engine state; pass a file written by engine.save")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("digest"):
        raise StateError(f"{path}: its header was altered since it was written; copy it again or fit again")
    header: dict[str, Any] = json.loads(text)
    if header.get("format") != FORMAT:
        raise StateError(
            f"{path}: format version {header.get('format')}, written by ood-engine {header.get('package')}: expected version"
            f" {FORMAT}; fit again with this version, or install the one that wrote it"
        )
    if with_tensors and _tensors_digest(tensors) != header["tensors_digest"]:
        raise StateError(f"{path}: its tensors were altered since it was written; copy it again or fit again")
    return header, tensors


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(_bytes(tensors[key]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
