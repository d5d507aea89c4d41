"""Discovery of the head and the feature map from the activations of one batch, independent of layer names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TapError

__all__ = ["LAYOUTS", "TapPlan", "agrees_with_logits", "discover", "first_argument", "logits_of", "relative_difference"]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda output: output,
    "NHWC": lambda output: output.permute(0, 3, 1, 2),
    "NTD": lambda output: output.transpose(1, 2).unsqueeze(3),
}
"""Module output → [N, D, H, W], always a view."""

# A mean is rounded once to the model's dtype; logits sum many rounded terms.
_MEAN_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_LOGITS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class TapPlan:
    """Head and feature map of a model, in serialisable names.

    Attributes:
        head: name of the `nn.Linear` that outputs the logits.
        feature_map: name of the module that outputs the map; None without a map.
        call: index of that module's call within one forward pass (a shared ReLU is called many times).
        layout: layout of that output: "NCHW", "NHWC" or "NTD" (tokens).
        relu: whether the map is the ReLU of that output, applied functionally by the model.
        tail: name of the single module between pooling and head, such as a norm; None if the head acts on the mean itself.
        tail_shape: per-sample input shape of the tail.
        proven: whether the map is verified: its spatial mean (through the tail) equals the head input.
        reason: how the map was verified, why it is unverified, or why there is none.
        head_call: index of the head call that outputs the logits within one forward pass.
    """

    head: str
    feature_map: str | None
    call: int = 0
    layout: str = "NCHW"
    relu: bool = False
    tail: str | None = None
    tail_shape: tuple[int, ...] = ()
    proven: bool = False
    reason: str = ""
    head_call: int = 0


class _Head(NamedTuple):
    """One call of an `nn.Linear` on [N, D]."""

    name: str
    call: int
    received: Tensor
    output: Tensor


class _Candidate(NamedTuple):
    """One reading of a module's output as a feature map, with its spatial mean [N, D]."""

    name: str
    call: int
    layout: str
    relu: bool
    mean: Tensor
    dtype: torch.dtype


class _Passage(NamedTuple):
    """A module from one vector per sample to another of the same length."""

    name: str
    before: Tensor
    after: Tensor
    shape: tuple[int, ...]


class _Recorder:
    """Record of one forward pass for `discover`, in order of module return."""

    def __init__(self) -> None:
        self.candidates: list[_Candidate] = []
        self.passages: list[_Passage] = []
        self.linears: list[_Head] = []
        self.shapes: dict[str, list[int]] = {}
        self._calls: dict[str, int] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            # Copies, because the model may modify the tensor in place afterwards.
            output = output.detach().clone()
            self.shapes[name] = list(output.shape)
            if output.ndim in (3, 4):
                self._add_candidates(name, call, output)
            received = first_argument(args, kwargs)
            if isinstance(received, Tensor):
                self._add_vectors(name, call, module, received.detach().clone(), output)

        return record

    def _add_candidates(self, name: str, call: int, output: Tensor) -> None:
        for layout in ("NHWC", "NCHW") if output.ndim == 4 else ("NTD",):
            feature_map = LAYOUTS[layout](output)
            # A single channel is a pooled [N, D, 1, 1] in the other layout.
            if feature_map.shape[1] > 1 and feature_map.shape[2] * feature_map.shape[3] > 1:
                dtype = torch.promote_types(feature_map.dtype, torch.float32)
                for relu in (True, False):
                    values = feature_map.relu() if relu else feature_map
                    mean = values.to(dtype).mean((2, 3))
                    self.candidates.append(_Candidate(name, call, layout, relu, mean, output.dtype))

    def _add_vectors(self, name: str, call: int, module: nn.Module, received: Tensor, output: Tensor) -> None:
        if isinstance(module, nn.Linear) and received.ndim == output.ndim == 2:
            self.linears.append(_Head(name, call, received, output))
        before, after = _as_vectors(received), _as_vectors(output)
        if before is not None and after is not None and before.shape == after.shape:
            self.passages.append(_Passage(name, before, after, tuple(received.shape[1:])))


def discover(
    modules: dict[str, nn.Module], run: Callable[[], Tensor], wanted_head: str | None, wanted_map: str | None
) -> TapPlan:
    """Find head and map in one forward pass `run` with hooks on all `modules`.

    Raises:
        TapError: no nn.Linear outputs the logits, a non-finite output, or an explicitly named map that is none.
    """
    recorder = _Recorder()
    handles = [module.register_forward_hook(recorder.hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    if not torch.isfinite(logits).all():
        raise TapError(
            f"the model's output has NaN or infinite values for finite images ({logits.dtype}): expected finite logits; check the"
            " preprocessing, or run the model in a wider dtype"
        )
    head = _find_head(recorder, logits, wanted_head)
    if wanted_map is None:
        return _find_map(recorder, head, recorder.candidates)
    if wanted_map not in recorder.shapes:
        raise TapError(
            f"feature_map={wanted_map!r}: the module was not called, or its output is not a floating point tensor"
        )
    candidates = [
        candidate
        for candidate in recorder.candidates
        if candidate.name == wanted_map and len(candidate.mean) == len(logits)
    ]
    if not candidates:
        raise TapError(
            f"feature_map={wanted_map!r}: expected an output of {len(logits)} samples with more than one position, such as"
            f" [N, D, H, W] with H·W > 1, got {recorder.shapes[wanted_map]}; name a layer before the pooling"
        )
    plan = _find_map(recorder, head, candidates)
    if plan.proven:
        return plan
    # Among the layouts of one output, prefer that with the head's number of channels.
    last = [candidate for candidate in candidates if candidate.mean.shape == head.received.shape] or candidates
    reason = f"named by hand, unverified: its spatial mean differs from the input of {head.name!r}"
    return _plan(head, last[-1], reason=reason, proven=False)


def _find_head(recorder: _Recorder, logits: Tensor, wanted: str | None) -> _Head:
    tried = [head for head in recorder.linears if wanted in (None, head.name)]
    for head in reversed(tried):
        if agrees_with_logits(head.output, logits):
            return head
    if not tried:
        what = (
            f"head={wanted!r} was not called on [N, D]"
            if wanted is not None
            else "no nn.Linear was called on [N, D] features"
        )
        raise TapError(f"{what}: expected the layer that makes the logits; name it by head=...")
    name, output = tried[-1].name, tried[-1].output
    raise TapError(
        f"the output of {name!r} is not the model's output (shapes {list(output.shape)} and {list(logits.shape)}, largest"
        f" relative difference {relative_difference(output, logits):.3g}): expected a model that ends in an nn.Linear, or in its"
        " softmax; wrap the model so that it returns the logits, or name the layer by head=..."
    )


def _find_map(recorder: _Recorder, head: _Head, candidates: list[_Candidate]) -> TapPlan:
    received = head.received
    if not received.any():
        return _plan(head, reason=f"{head.name!r} received only zeros, which prove nothing; fit on real images")
    for candidate in reversed(candidates):
        if _is_close(candidate.mean, received, candidate.dtype):
            return _plan(head, candidate, reason=f"verified: its spatial mean is the input of {head.name!r}")
    for passage in recorder.passages:
        if not _is_close(passage.after, received, passage.after.dtype):
            continue
        for candidate in reversed(candidates):
            if _is_close(candidate.mean, passage.before, candidate.dtype):
                reason = f"verified: its spatial mean through {passage.name!r} is the input of {head.name!r}"
                return _plan(head, candidate, passage, reason)
    differences = [(relative_difference(candidate.mean, received), candidate.name) for candidate in candidates]
    if not differences:
        return _plan(head, reason="no module of the model has an output with more than one position (H·W > 1)")
    closest, name = min(differences)
    near = f"; the closest, {name!r}, has a relative difference of {closest:.2g}" if closest < 1 else ""
    return _plan(head, reason=f"no module's output has the spatial mean that {head.name!r} received{near}")


def _plan(
    head: _Head, found: _Candidate | None = None, passage: _Passage | None = None, reason: str = "", proven: bool = True
) -> TapPlan:
    if found is None:
        return TapPlan(head.name, None, reason=reason, head_call=head.call)
    tail, shape = (passage.name, passage.shape) if passage else (None, ())
    return TapPlan(
        head.name, found.name, found.call, found.layout, found.relu and proven, tail, shape, proven, reason, head.call
    )


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a module call, positional or keyword; None without arguments."""
    return next(iter((*args, *kwargs.values())), None)


def _as_vectors(tensor: Tensor) -> Tensor | None:
    """One vector per sample, [N, D], [N, D, 1, 1] or [N, 1, 1, D], as [N, D]; None for any other shape."""
    is_vector = tensor.ndim == 2 or (tensor.ndim == 4 and sorted(tensor.shape[1:])[:2] == [1, 1])
    return tensor.flatten(1) if is_vector else None


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference relative to the largest expected magnitude; infinite if shapes differ."""
    if found.shape != expected.shape or expected.numel() == 0:
        return float("inf")
    difference = (found.double() - expected.double()).abs().max()
    # A zero-initialised head outputs all-zero logits, which only zeros match.
    return 0.0 if difference == 0 else float(difference / expected.abs().max().double())


def _is_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value computed from a tensor of this dtype matches the expected one within rounding."""
    tolerance = max(_MEAN_TOLERANCE.get(each, 1e-4) for each in (dtype, expected.dtype))
    return relative_difference(found, expected) <= tolerance


def agrees_with_logits(logits: Tensor, output: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a model's output equals these logits, their softmax or log-softmax within the rounding of all given dtypes."""
    tolerance = max(_LOGITS_TOLERANCE.get(each, 1e-4) for each in (logits.dtype, output.dtype, *dtypes))
    forms = (logits, logits.softmax(1), logits.log_softmax(1))
    return any(relative_difference(form, output) <= tolerance for form in forms)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, an object or dict with `logits`, or a tuple that starts with them.

    Raises:
        TapError: no [N, C] tensor in these places.
    """
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        came = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TapError(
            f"the model's output: expected logits [N, C], or .logits, or a tuple that starts with them, got {came}"
        )
    return output
