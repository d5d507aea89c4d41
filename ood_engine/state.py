"""State files: safetensors with a JSON header, without pickle.

The header holds the format and package versions, the tap plan, digests of the model, every detector's settings and a digest of
all tensors; the tensors are the detectors' buffers, the calibration scores, the fingerprints of the fit samples and the canary.
Tensors shared by several detectors are stored once.

The digests prove integrity, not authenticity: they find damage, and anyone can compute them for another state. Load states only
from whom you would take a model. What a state says is checked by `schema` all the same, and loading runs no code of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .calibration import Calibration
from .detectors import Detector, create_detector
from .errors import InputError, OodEngineError, StateError, one_line
from .features.agreement import Agreement
from .features.cache import CacheRows
from .features.canary import Canary
from .files import atomic_file
from .fitted import aligned
from .identity import HeadSize, ModelDigest, SyntheticInputs
from .model.discovery import TapPlan
from .schema import check_header, check_tensors, described, refuse_constant
from .subspace import Basis
from .version import __version__

__all__ = ["FORMAT", "State", "read", "read_header", "write"]

FORMAT = 5
_KEY = "ood_engine"
_WAY_OUT = "; copy the file again from where it was saved, or fit again"


@dataclass
class State:
    """The persistent state of an engine.

    Attributes:
        plan: the head and feature map found.
        head: sizes of the head.
        model: digest of all parameters and buffers of the model.
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
        canary: ID samples and synthetic inputs with their scores.
        unavailable: default detector → why this model does not support it.
        tuning: rows of the last tuning.
        information: user metadata; JSON values.
    """

    plan: TapPlan
    head: HeadSize
    model: ModelDigest
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
        InputError: metadata that JSON cannot hold.
        OodEngineError: a full disk, or a path that cannot be written.
    """
    tensors, aliases = _share(_tensors(state))
    header = _header(state) | {
        "aliases": aliases,
        "tensors": described(tensors),
        "tensors_digest": _tensors_digest(tensors),
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not written ({one_line(error)}): expected JSON values in engine.information, without NaN or infinities"
        ) from error
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
    try:
        check_tensors(header, tensors)
        return _state(header, tensors)
    except StateError as error:
        raise StateError(f"{path}: {error}{_WAY_OUT}") from error
    except Exception as error:  # whatever another writer's values raise in constructors and checks
        raise StateError(
            f"{path}: its fields contradict one another ({one_line(error, with_type=True)}){_WAY_OUT}"
        ) from error


def _state(header: dict[str, Any], tensors: dict[str, Tensor]) -> State:
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
        calibrations[name].check(name)
        if float(calibrations[name].threshold) != header["thresholds"][name]:
            raise StateError(
                f"the threshold of {name!r} is {float(calibrations[name].threshold)} by its calibration scores and"
                f" {header['thresholds'][name]} in the header: expected the same"
            )
    inputs = header["synthetic_inputs"]
    canary = Canary(
        CacheRows(*(tensors[f"canary.rows.{field}"] for field in CacheRows._fields)),
        _below(tensors, "canary.scores."),
        SyntheticInputs(**{**inputs, "shape": tuple(inputs["shape"])}),
        _below(tensors, "canary.synthetic."),
    )
    return State(
        plan=TapPlan(**header["plan"]),
        head=HeadSize(**header["head"]),
        model=ModelDigest(**header["model"]),
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
    tensors |= {f"canary.synthetic.{name}": score for name, score in canary.synthetic.items()}
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
        "model": state.model._asdict(),
        "synthetic_inputs": state.canary.inputs._asdict(),
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
    try:
        header = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: its header is no JSON ({one_line(error)}){_WAY_OUT}") from error
    found = header if isinstance(header, dict) else {}
    if type(found.get("format")) is not int or found["format"] != FORMAT:
        raise StateError(
            f"{path}: format version {found.get('format')}, written by ood-engine {found.get('package')}: expected version"
            f" {FORMAT}; fit again with this version, or install the one that wrote it"
        )
    try:
        check_header(found)
    except StateError as error:
        raise StateError(f"{path}: {error}{_WAY_OUT}") from error
    if with_tensors and _tensors_digest(tensors) != found["tensors_digest"]:
        raise StateError(f"{path}: its tensors were altered since it was written; copy it again or fit again")
    return found, tensors


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(_bytes(tensors[key]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
