"""Discovery of the head and the feature map from the activations of one batch, independent of layer names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TapError
from .outputs import agrees_with_logits, combination, describe, explain, relative_difference, tensors_of
from .plan import TapPlan
from .record import Candidate, Head, Passage, Recorder

__all__ = ["TapPlan", "discover"]

# A mean is rounded once to the model's dtype.
_MEAN_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_LONGEST_TAIL = 8


def discover(
    modules: dict[str, nn.Module],
    run: Callable[[], Any],
    samples: int,
    wanted_head: str | None = None,
    wanted_map: str | None = None,
) -> tuple[TapPlan, Tensor]:
    """Find head and map in one forward pass `run` of `samples` images with hooks on all `modules`.

    Returns:
        The plan, and the logits [N, C]: the model's own, or the output of an unverified head.

    Raises:
        TapError: no layer outputs the logits, several outputs that may be them, a non-finite output, or an explicitly named layer
            that is no head or no map.
    """
    recorder = Recorder()
    with recorder.on(modules):
        output = run()
    plan, head, logits = _find_head(recorder, output, samples, wanted_head)
    if not torch.isfinite(logits).all():
        raise TapError(_not_finite(logits))
    candidates = [one for one in recorder.candidates if len(one.mean) == samples]
    if wanted_map is None:
        return _find_map(recorder, plan, head, candidates), logits
    if wanted_map not in recorder.shapes:
        raise TapError(
            f"feature_map={wanted_map!r}: the module was not called, or its output is not a floating point tensor"
        )
    candidates = [one for one in candidates if one.name == wanted_map]
    if not candidates:
        raise TapError(
            f"feature_map={wanted_map!r}: expected an output of {samples} samples with more than one channel and position, such as"
            f" [N, D, H, W] with H·W > 1, got {recorder.shapes[wanted_map]}; name a layer before the pooling"
        )
    found = _find_map(recorder, plan, head, candidates)
    return (found if found.proven else _by_hand(plan, head, candidates)), logits


def _find_head(recorder: Recorder, output: Any, samples: int, wanted: str | None) -> tuple[TapPlan, Head, Tensor]:
    heads = [head for head in recorder.heads if wanted in (None, head.name) and len(head.received) == samples]
    if not heads:
        raise TapError(_no_head(recorder, samples, wanted))
    tensors = {path: one for path, one in tensors_of(output).items() if _may_be_logits(one)}
    if not tensors and wanted is None:
        by_position = any(sum(size > 1 for size in one.shape[1:]) > 1 for one in tensors_of(output).values())
        raise TapError(
            f"the model's output: expected logits [N, C], alone or in a tuple, dict or object, got {describe(output)}; return one"
            " row of them per image"
            + ("" if by_position else f", or name the layer that makes them by head={heads[-1].name!r}")
        )
    # A key of this name is the model's own word for it.
    named = {path: one for path, one in tensors.items() if path.rpartition("/")[2] == "logits"}
    tensors = named or tensors
    rows = [len(one) for one in tensors.values()]
    tensors = {path: one.detach() for path, one in tensors.items() if len(one) == samples}
    if not tensors and wanted is None:
        raise TapError(f"the model returned {rows[0]} rows of logits for {samples} images: expected one row per image")
    if wanted is None and not any(torch.isfinite(one).all() for one in tensors.values()):
        raise TapError(_not_finite(next(iter(tensors.values()))))
    made = {
        path: head
        for path, one in tensors.items()
        if (head := next((head for head in reversed(heads) if agrees_with_logits(head.output, one)), None))
    }
    if made and (wanted is not None or len({head.name for head in made.values()}) == 1):
        path, head = next(iter(made.items()))
        others = [one for path, one in tensors.items() if path not in made]
        if wanted is not None or all(_is_known(recorder, one) for one in others):
            where = f" at {path!r}" if path else ""
            reason = f"verified: the model's output{where} is that of {head.name!r}, or its softmax"
            sigmoid = _is_squashed(head, recorder.heads, others)
            return _plan(head, path, reason, sigmoid=sigmoid), head, tensors[path]
    seen = _seen(recorder.heads, heads[-1], tensors, made)
    if wanted is None:
        raise TapError(_ask(heads, seen))
    head = heads[-1]
    sigmoid = _is_squashed(head, recorder.heads, list(tensors.values()))
    return _plan(head, "", f"named by hand, unverified: {seen}", proven=False, sigmoid=sigmoid), head, head.output


def _may_be_logits(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.is_floating_point() and tensor.layout is torch.strided


def _not_finite(logits: Tensor) -> str:
    return (
        f"the model's output has NaN or infinite values for finite images ({logits.dtype}): expected finite logits; check the"
        " preprocessing, or run the model in a wider dtype"
    )


def _no_head(recorder: Recorder, samples: int, wanted: str | None) -> str:
    expected = f"expected the nn.Linear or 1×1 convolution that makes the logits, called on [{samples}, D], not on every position"
    if wanted is None:
        came = "; ".join(f"{name!r} on {shape}" for name, shape in list(recorder.received.items())[-4:])
        way_out = (
            "if nothing but a mean follows the layer of the logits, take the mean of its input instead, which gives the same logits"
            if came
            else "call it as a module, self.fc(h), not by its weight"
        )
        came = came or "no linear layer was called"
        return f"no layer was called on one vector per image ({came}): {expected}; {way_out}"
    came = f"was called on {recorder.received[wanted]}" if wanted in recorder.received else "was not called"
    others = ", ".join(repr(name) for name in dict.fromkeys(head.name for head in recorder.heads))
    return f"head={wanted!r} {came}: {expected}; those that were are {others or 'none'}"


def _is_known(recorder: Recorder, tensor: Tensor) -> bool:
    """Whether a further output is no candidate for the logits: the input of a head, or a vector on the way to it."""
    vectors = [head.received for head in recorder.heads] + [one.before for one in recorder.passages]
    return any(relative_difference(tensor, vector) == 0 for vector in vectors)


def _is_squashed(head: Head, heads: list[Head], tensors: list[Tensor]) -> bool:
    """Whether any of the model's outputs are sigmoids of this head, alone or mixed with those of others."""
    outputs = [(one.name, one.output) for one in heads]
    found = [combination(one, outputs) for one in tensors]
    return any(one is not None and one[0] == "sigmoid" and head.name in one[1] for one in found)


def _seen(heads: list[Head], last: Head, tensors: dict[str, Tensor], made: dict[str, Head]) -> str:
    """What the model's output is, in words; where it is nothing known, how far from the output of the `last` head."""
    outputs = [(head.name, head.output) for head in heads]
    words = []
    for path, tensor in tensors.items():
        came = f"the output of {made[path].name!r}" if path in made else explain(tensor, outputs)
        if came is None:
            came = f"not the output of {last.name!r}"
            if last.output.shape == tensor.shape:
                came += f" (largest relative difference {relative_difference(last.output, tensor):.3g})"
            else:
                came += f" (shapes {list(last.output.shape)} and {list(tensor.shape)})"
        words.append(f"at {path!r} {came}" if len(tensors) > 1 else came)
    return f"the model's output is {', '.join(words)}" if words else "the model returns no [N, C]"


def _ask(heads: list[Head], seen: str) -> str:
    names = [name for name in dict.fromkeys(head.name for head in heads) if repr(name) in seen]
    choice = " or ".join(f"head={name!r}" for name in names)
    return (
        f"{seen}: expected the output of one nn.Linear or 1×1 convolution, or its softmax; choose the layer to score by"
        f" {choice}, or return its output alone"
    )


def _find_map(recorder: Recorder, plan: TapPlan, head: Head, candidates: list[Candidate]) -> TapPlan:
    if not head.received.any():
        return _with_map(plan, reason=f"{head.name!r} received only zeros, which prove nothing; fit on real images")
    found, tail = _proof(candidates, recorder.passages[: head.passages], head.received)
    if found:
        through = f" through {', '.join(repr(one.name) for one in tail)}" if tail else ""
        reason = f"verified: its spatial mean{through} is the input of {head.name!r}{_others(found)}"
        return _with_map(plan, found[0], tail, reason, proven=True)
    differences = [(relative_difference(candidate.mean, head.received), candidate.name) for candidate in candidates]
    if not differences:
        return _with_map(plan, reason="no module of the model has an output with more than one position (H·W > 1)")
    closest, name = min(differences)
    near = f"; the closest, {name!r}, has a relative difference of {closest:.2g}" if closest < 1 else ""
    return _with_map(plan, reason=f"no module's output has the spatial mean that {head.name!r} received{near}")


def _proof(
    candidates: list[Candidate], passages: list[Passage], vector: Tensor
) -> tuple[list[Candidate], list[Passage]]:
    """The candidates, last first, whose mean becomes `vector` [N, D] through some of the passages in their order, and these."""
    tried: set[int] = set()

    def search(vector: Tensor, end: int, length: int) -> tuple[list[Candidate], list[Passage]]:
        # Vectors of zeros prove nothing.
        found = [one for one in reversed(candidates) if vector.any() and _is_close(one.mean, vector, one.dtype)]
        if found or length == _LONGEST_TAIL:
            return found, []
        for number in reversed(range(end)):
            passage = passages[number]
            if number not in tried and _is_close(passage.after, vector, passage.after.dtype):
                tried.add(number)
                found, tail = search(passage.before, number, length + 1)
                if found:
                    return found, [*tail, passage]
        return [], []

    return search(vector, len(passages), 0)


def _others(found: list[Candidate]) -> str:
    """Modules that prove as well, with another map."""
    taken = found[0]
    different = [one.name for one in found if not one.relu and not _is_close(one.peak, taken.peak, one.dtype)]
    others = [name for name in dict.fromkeys(different) if name != taken.name]
    if not others:
        return ""
    names = ", ".join(repr(name) for name in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return f"; so is that of {names}, with other maxima: the last is taken, name another by feature_map=..."


def _by_hand(plan: TapPlan, head: Head, candidates: list[Candidate]) -> TapPlan:
    """The reading of one output, named by hand, with the head's channels; else the one that the kind of its module says."""
    last = [one for one in candidates if one.call == candidates[-1].call and not one.relu]
    fitting = [one for one in last if one.mean.shape == head.received.shape]
    said = [one for one in last if (one.layout[1] in "CD") == one.channels_first]
    choice = fitting if len(fitting) == 1 else said or (last if len(last) == 1 or last[-1].layout != "NDL" else [])
    if not choice:
        raise TapError(
            f"feature_map={last[-1].name!r}: its output can be read as [N, T, D] and as [N, D, L], and not exactly one has the"
            f" {head.received.shape[1]} channels of the head {head.name!r}; name a convolution, norm or pooling layer, which have a"
            " known layout"
        )
    return _with_map(
        plan,
        choice[-1],
        reason=f"named by hand, unverified: its spatial mean differs from the input of {head.name!r}",
    )


def _plan(head: Head, output: str, reason: str, *, proven: bool = True, sigmoid: bool) -> TapPlan:
    return TapPlan(
        head.name,
        None,
        head_call=head.call,
        head_proven=proven,
        head_reason=reason,
        output=output,
        sigmoid=sigmoid,
    )


def _with_map(
    plan: TapPlan,
    found: Candidate | None = None,
    tail: list[Passage] | None = None,
    reason: str = "",
    *,
    proven: bool = False,
) -> TapPlan:
    if found is None:
        return replace(plan, reason=reason)
    steps = tuple((passage.name, passage.shape) for passage in tail or [])
    return replace(
        plan,
        feature_map=found.name,
        call=found.call,
        layout=found.layout,
        relu=found.relu and proven,
        tail=steps,
        proven=proven,
        reason=reason,
    )


def _is_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value computed from a tensor of this dtype matches the expected one within rounding."""
    tolerance = max(_MEAN_TOLERANCE.get(each, 1e-4) for each in (dtype, expected.dtype))
    return relative_difference(found, expected) <= tolerance
