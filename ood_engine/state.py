"""State files: safetensors with a JSON header; nothing is ever unpickled.

The header holds the format and package versions, what was tapped, a digest of the head, every detector's settings and a digest
of all tensors; the tensors are the detectors' buffers, the calibration scores, the fingerprints of the fitted samples and the
canary. Tensors that several detectors share are stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import ood_kernels as ok

from .calibration import Calibration
from .detectors import create_detector
from .errors import OodEngineError, StateError
from .features.cache import CacheRows, FeatureCache
from .features.canary import Canary
from .fitted import aligned
from .model.discovery import TapPlan
from .subspace import Basis
from .version import __version__

if TYPE_CHECKING:
    from .engine import Engine
    from .runtime import Runtime

__all__ = ["FORMAT", "head_digests", "load", "read_header", "save"]

FORMAT = 2
_KEY = "ood_engine"
_DIGEST_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save(engine: Engine, path: Path) -> None:
    """Write the fitted state of `engine`, whole or not at all.

    Raises:
        OodEngineError: the disk is full, or the place cannot be written.
    """
    tensors, aliases = _share(_collect(engine))
    header = _describe(engine) | {"aliases": aliases, "tensors_digest": _tensors_digest(tensors)}
    text = json.dumps(header, sort_keys=True)
    metadata = {_KEY: text, "digest": hashlib.sha256(text.encode()).hexdigest()}
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors' own writer makes files that only their owner may read.
        temporary.write_bytes(to_bytes(tensors, metadata))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise OodEngineError(
            f"{path}: could not be written ({error}); {size / 2**20:.1f} MiB are needed; free some space or name another place"
        ) from error


def read_header(path: Path) -> dict[str, Any]:
    """The header of a state file, without its tensors and without a model.

    Raises:
        StateError: no such file, not a state file, damaged, altered, or of another format version.
    """
    return _open(path, with_tensors=False)[0]


def load(path: Path, model: nn.Module, runtime: Runtime | None = None) -> Engine:
    """See `Engine.load`."""
    from .engine import Engine

    header, tensors = _open(path, with_tensors=True)
    plan = TapPlan(**{**header["plan"], "tail_shape": tuple(header["plan"]["tail_shape"])})
    names = [entry["name"] for entry in header["detectors"]]
    named_map = None if plan.proven else plan.feature_map
    engine = Engine(
        model, names, feature_map=named_map, rectify=header["rectify"], seed=header["seed"], runtime=runtime
    )
    engine.tap.adopt(plan)
    engine.image_shape = tuple(header["image_shape"]) if header["image_shape"] else None
    _check_head(engine.head, header["head"], path)
    device = engine.tap.device
    tensors = {key: aligned(tensor.to(device)) for key, tensor in tensors.items()}
    tensors |= {key: tensors[original] for key, original in header["aliases"].items()}
    for entry in header["detectors"]:
        detector = create_detector(entry["name"], **entry["settings"]).to(device)
        detector.load_state_dict(_below(tensors, f"detectors.{entry['name']}."), assign=True)
        engine.detectors[entry["name"]] = detector
    for name, rate in header["false_alarm_rates"].items():
        engine.calibrations[name] = Calibration(rate).to(device)
        engine.calibrations[name].load_state_dict(_below(tensors, f"calibrations.{name}."), assign=True)
    engine.fit_fingerprints = tensors["fit.fingerprints"].cpu()
    engine.unavailable, engine.tuning, engine.information = (
        header[key] for key in ("unavailable", "tuning", "information")
    )
    rows = CacheRows(*(tensors[f"canary.rows.{field}"].cpu() for field in CacheRows._fields))
    engine.canary = Canary(rows, {name: score.cpu() for name, score in _below(tensors, "canary.scores.").items()})
    engine.canary.replay(engine, engine.calibrations)
    return engine


def head_digests(head: ok.Head) -> dict[str, str]:
    """SHA-256 of weight and bias, as they are in each dtype that the model may be cast to."""
    digests = {}
    for dtype in _DIGEST_DTYPES:
        digest = hashlib.sha256(repr(tuple(head.weight.shape)).encode())
        for tensor in (head.weight, head.bias):
            if tensor is not None:
                digest.update(_bytes(tensor.to(dtype)))
        digests[str(dtype).removeprefix("torch.")] = digest.hexdigest()
    return digests


def _collect(engine: Engine) -> dict[str, Tensor]:
    # Not from the calibration features: one of them is each threshold itself, where the last bit changes the decision.
    cache = engine.cache
    if cache is None:
        assert engine.canary is not None
        # Settings may have been tuned since it was loaded.
        cache = FeatureCache(engine.canary.rows)
    canary = Canary.take(engine, cache)
    assert engine.fit_fingerprints is not None
    tensors = {f"canary.rows.{field}": column for field, column in zip(CacheRows._fields, canary.rows, strict=True)}
    tensors |= {f"canary.scores.{name}": score for name, score in canary.scores.items()}
    tensors["fit.fingerprints"] = engine.fit_fingerprints
    for group, modules in (("detectors", engine.detectors), ("calibrations", engine.calibrations)):
        for name, module in modules.items():
            tensors |= {f"{group}.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors


def _share(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(each distinct tensor once, contiguous on the CPU; key → key that holds the same tensor)."""
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


def _describe(engine: Engine) -> dict[str, Any]:
    head = engine.head
    return {
        "format": FORMAT,
        "package": __version__,
        "torch": torch.__version__,
        "plan": asdict(engine.plan),
        "rectify": engine.rectify,
        "image_shape": engine.image_shape,
        "seed": engine.seed,
        "head": {
            "classes": head.weight.shape[0],
            "features": head.weight.shape[1],
            "bias": head.bias is not None,
            "dtype": str(head.weight.dtype).removeprefix("torch."),
            "digests": head_digests(head),
        },
        "detectors": [{"name": name, "settings": detector.settings} for name, detector in engine.detectors.items()],
        "subspaces": _subspaces(engine),
        "false_alarm_rates": {name: calibration.false_alarm_rate for name, calibration in engine.calibrations.items()},
        "thresholds": {name: float(calibration.threshold) for name, calibration in engine.calibrations.items()},
        "calibration_samples": next((len(c.fitted("scores")) for c in engine.calibrations.values()), None),
        "fit_samples": 0 if engine.fit_fingerprints is None else len(engine.fit_fingerprints),
        "unavailable": engine.unavailable,
        "tuning": engine.tuning,
        "information": engine.information,
    }


def _subspaces(engine: Engine) -> list[dict[str, Any]]:
    """Every subspace of gradient space, which detectors read it, and what its form and the others cost for a batch of 64."""
    found: dict[int, dict[str, Any]] = {}
    for name, detector in engine.detectors.items():
        basis = getattr(detector, "basis", None)
        if not isinstance(basis, Basis):
            continue
        # Detectors loaded from one state hold bases of their own over the same tensors.
        key = basis.fitted("constants").data_ptr()
        if key not in found:
            plan = basis.plan(samples=64)
            found[key] = {
                "form": type(basis).__name__,
                "components": basis.n_components,
                "detectors": [],
                "samples": plan.samples,
                "cheapest": plan.choice,
                "costs": [cost._asdict() for cost in plan.costs],
            }
        found[key]["detectors"].append(name)
    return list(found.values())


def _open(path: Path, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise StateError(f"{path}: no such state file; make one by engine.save(path) or `ood-engine fit`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"{path}: truncated, or not a safetensors file ({error}); copy it again or fit anew"
        ) from error
    text = metadata.get(_KEY)
    if text is None:
        raise StateError(
            f"{path}: a safetensors file, but not an ood-engine state; give the file that engine.save wrote"
        )
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("digest"):
        raise StateError(f"{path}: its header was altered since it was written; copy it again or fit anew")
    header: dict[str, Any] = json.loads(text)
    if header.get("format") != FORMAT:
        raise StateError(
            f"{path}: format version {header.get('format')}, written by ood-engine {header.get('package')}: expected version"
            f" {FORMAT}; fit again with this version, or install the one that wrote it"
        )
    if with_tensors and _tensors_digest(tensors) != header["tensors_digest"]:
        raise StateError(f"{path}: its tensors were altered since it was written; copy it again or fit anew")
    return header, tensors


def _check_head(head: ok.Head, fitted: dict[str, Any], path: Path) -> None:
    shape = (fitted["classes"], fitted["features"], fitted["bias"])
    came = (*head.weight.shape, head.bias is not None)
    if shape != came:
        raise StateError(
            f"{path}: fitted to a head of {_words(*shape)}, this model's has {_words(*came)}; load the model that was fitted, or"
            " fit again"
        )
    dtype = str(head.weight.dtype).removeprefix("torch.")
    if head_digests(head)[dtype] != fitted["digests"][dtype]:
        raise StateError(
            f"{path}: fitted to another head: shapes agree, weights do not; load the checkpoint that was fitted, or fit again"
        )


def _words(classes: int, features: int, bias: bool) -> str:
    return f"{classes} classes × {features} features {'with' if bias else 'without'} bias"


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
