"""Capture of a classifier's feature map and head input during inference, without changing the model."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, NotFittedError, TapError, one_line
from .discovery import (
    LAYOUTS,
    TapPlan,
    agrees_with_logits,
    discover,
    first_argument,
    logits_of,
    relative_difference,
)
from .shallow_copy import shallow_twin

__all__ = ["Captured", "Tap", "TapPlan"]

_PROOF_SAMPLES = 32
# The oldest supported torch has no AcceleratorError.
_DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Captured(NamedTuple):
    """Activations captured in one forward pass.

    Attributes:
        feature_map: [N, D, H, W], a view of the model's tensor if verified; None if the plan has no map.
        head_input: [N, D] input of the head.
        logits: [N, C] output of the model.
    """

    feature_map: Tensor | None
    head_input: Tensor
    logits: Tensor


class Tap:
    """Finds and verifies head and feature map of a model, and captures them in every forward pass.

    Hooks live on a shallow twin of the model with thread-local storage: the model stays unchanged, several taps on one model are
    independent, and concurrent calls are safe. Hooks already on the model also run on the twin, since features such as pruning
    depend on them.

    Args:
        model: the classifier; a compiled or data-parallel one is unwrapped.
        head: name of the head; None: found automatically.
        feature_map: name of the module that outputs the map; None: found automatically.

    Raises:
        TapError: a scripted model, an unknown name, no `nn.Linear`, or weights that are not loaded or not finite.
    """

    def __init__(self, model: nn.Module, *, head: str | None = None, feature_map: str | None = None) -> None:
        self._twin: nn.Module = shallow_twin(model)
        self._modules: dict[str, nn.Module] = dict(self._twin.named_modules(remove_duplicate=False))
        # A module registered twice goes by its first name.
        self._first_names = {module: name for name, module in self._twin.named_modules()}
        self._caught = threading.local()
        self._handles: list[Any] = []
        self._plan: TapPlan | None = None
        self._wanted_head = None if head is None else self._known(head, f"head={head!r}")
        self._wanted_map = None if feature_map is None else self._known(feature_map, f"feature_map={feature_map!r}")
        linears = [module for module in self._modules.values() if isinstance(module, nn.Linear)]
        if not linears:
            raise TapError(
                f"{type(model).__name__} has no nn.Linear: expected a classifier whose logits come from one; a head that is a 1×1"
                " convolution can be replaced by the equivalent nn.Linear"
            )
        self._last_linear = linears[-1] if head is None else self._linear(head, f"head={head!r}")
        self._check_finite()

    def _known(self, name: str, what: str) -> str:
        if name not in self._modules:
            last = ", ".join([known for known in self._modules if known][-8:])
            raise TapError(f"{what}: the model has no module of that name; its last modules are {last}")
        return self._first_names[self._modules[name]]

    def _linear(self, name: str, what: str) -> nn.Linear:
        module = self._modules[self._known(name, what)]
        if not isinstance(module, nn.Linear):
            raise TapError(
                f"{what}: expected an nn.Linear, got a {type(module).__name__}; name the layer that makes the logits"
            )
        return module

    def _check_finite(self) -> None:
        buffers = dict(self._twin.named_buffers())
        for name, tensor in (*self._twin.named_parameters(), *buffers.items()):
            if tensor.is_meta or is_lazy(tensor):
                raise TapError(
                    f"the model's {name!r} has no values yet (lazy, or on the meta device): expected loaded weights; run the model"
                    " once, or load a checkpoint"
                )
            if not tensor.is_floating_point():
                continue
            bad = ~torch.isfinite(tensor)
            if name in buffers:
                # Attention masks contain -inf.
                bad &= ~torch.isneginf(tensor)
            if bad.any():
                raise TapError(
                    f"the model's {name!r} has {int(bad.sum())} NaN or infinite values of {tensor.numel()}: expected finite"
                    " weights; load an intact checkpoint"
                )

    @property
    def plan(self) -> TapPlan:
        """Head and map in use. Raises NotFittedError before `find` or `adopt`."""
        if self._plan is None:
            raise NotFittedError("head and feature map are not known yet: call fit(loader) first")
        return self._plan

    @property
    def device(self) -> torch.device:
        """Device of the head."""
        return next(self.head.parameters()).device

    @property
    def is_ready(self) -> bool:
        """Whether head and map are known."""
        return self._plan is not None

    @property
    def head(self) -> nn.Linear:
        """The twin's head, with weight and bias shared with the model; before `find` the last nn.Linear of the model."""
        module = self._last_linear if self._plan is None else self._modules[self._plan.head]
        assert isinstance(module, nn.Linear)
        return module

    def find(self, images: Tensor) -> TapPlan:
        """Find and verify head and map on the first finite samples of a batch, and start capturing.

        Raises:
            InputError: not a floating-point batch, or no finite image.
            TapError: no nn.Linear outputs the logits, or the logits recomputed from the map differ from the model's.
        """
        _check_images(images)
        finite = images[torch.isfinite(images).flatten(1).all(1)][:_PROOF_SAMPLES]
        if not len(finite):
            raise InputError(
                f"images {list(images.shape)}: none is free of NaN and infinite values; expected at least one finite image"
            )
        modules = {name: module for module, name in self._first_names.items()}
        self.adopt(discover(modules, lambda: self._run(finite), self._wanted_head, self._wanted_map))
        try:
            self._prove(finite)
        except TapError:
            self._release()
            raise
        return self.plan

    def _prove(self, images: Tensor) -> None:
        captured = self(images)
        features = source = captured.head_input
        if captured.feature_map is not None and self.plan.proven:
            source = captured.feature_map
            features = self.features(source.to(torch.promote_types(source.dtype, torch.float32)).mean((2, 3)))
        with torch.no_grad():
            logits = F.linear(features.to(self.head.weight.dtype), self.head.weight, self.head.bias)
        if not agrees_with_logits(logits, captured.logits, source.dtype):
            raise TapError(
                f"logits recomputed from {self.plan.feature_map or 'the input'!r} and head {self.plan.head!r} differ from the"
                f" model's own by up to {relative_difference(logits, captured.logits):.3g} relative to their size: expected equal"
                " logits; name the right layers by head=... and feature_map=..."
            )

    def adopt(self, plan: TapPlan) -> None:
        """Capture by an existing plan, such as that of a state file.

        Raises:
            TapError: a module of the plan missing from this model, or a head that is no nn.Linear with floating-point weights.
        """
        head = self._linear(plan.head, f"{plan.head!r} was fitted as the head")
        if not head.weight.is_floating_point():
            raise TapError(
                f"the head {plan.head!r} has {head.weight.dtype} weights: expected floating point; exclude it from quantisation"
            )
        for name in (plan.feature_map, plan.tail):
            if name is not None:
                self._known(name, f"{name!r} was fitted")
        self._release()
        catch_head_input = partial(self._catch_head_input, plan)
        self._handles = [head.register_forward_pre_hook(catch_head_input, with_kwargs=True)]
        if plan.feature_map is not None:
            catch_map = partial(self._catch_map, plan)
            self._handles.append(self._modules[plan.feature_map].register_forward_hook(catch_map))
        self._plan = plan

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._plan = [], None

    def __call__(self, images: Tensor) -> Captured:
        """Run the model on a copy of images [N, ...] in its device and dtype, and return the captured activations.

        Raises:
            InputError: not a floating-point batch, or images the model rejects.
            TapError: the model did not call the modules of the plan, or did not return one row of logits per image.
        """
        plan = self.plan
        caught: dict[str, Tensor] = {}
        self._caught.tensors = caught
        self._caught.calls = {"head_input": 0, "feature_map": 0}
        try:
            logits = self._run(images)
        finally:
            del self._caught.tensors, self._caught.calls
        if "head_input" not in caught or (plan.feature_map is not None and "feature_map" not in caught):
            raise TapError(
                f"the model bypassed its modules {plan.head!r} and {plan.feature_map!r}: expected both to be called in every"
                " forward pass; name others by head=... and feature_map=..."
            )
        return Captured(caught.get("feature_map"), caught["head_input"], logits)

    def features(self, pooled: Tensor) -> Tensor:
        """Head input for the spatial mean `pooled` [N, D] of a verified map: the mean itself, or the tail's output."""
        if self.plan.tail is None:
            return pooled
        tail = self._modules[self.plan.tail]
        with torch.no_grad():
            weight = next(tail.parameters(), self.head.weight)
            vector = pooled.reshape(pooled.shape[0], *self.plan.tail_shape).to(weight.dtype)
            output: Tensor = tail(vector).flatten(1)
        return output

    def _run(self, images: Tensor) -> Tensor:
        _check_images(images)
        # The first weight, because stem and head may differ in dtype or device.
        stem = next((weight for weight in self._twin.parameters() if weight.is_floating_point()), self.head.weight)
        # A model may cache tensors between calls, which must not be inference tensors, and may modify its input in place.
        with torch.inference_mode(False), torch.no_grad():
            try:
                output = self._twin(images.detach().to(stem.device, stem.dtype, copy=True))
            except _DEVICE_ERRORS:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
                raise InputError(
                    f"images {list(images.shape)}: the model rejects them; expected the channels and size it was trained on"
                    f" ({one_line(error)})"
                ) from error
            logits = logits_of(output).detach()
        if len(logits) != len(images):
            raise TapError(
                f"the model returned {len(logits)} rows of logits for {len(images)} images: expected one row per image"
            )
        return logits

    def _next_call(self, what: str) -> int | None:
        """Index of this call within the current thread's forward pass; None outside one."""
        if getattr(self._caught, "tensors", None) is None:
            return None
        call: int = self._caught.calls[what]
        self._caught.calls[what] = call + 1
        return call

    def _catch_head_input(self, plan: TapPlan, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._next_call("head_input") == plan.head_call:
            # A copy (small), because the model may modify its features in place afterwards.
            self._caught.tensors["head_input"] = first_argument(args, kwargs).detach().clone()

    def _catch_map(self, plan: TapPlan, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._next_call("feature_map") != plan.call:
            return
        feature_map = LAYOUTS[plan.layout](output.detach())
        if plan.relu:
            feature_map = feature_map.relu()
        elif not plan.proven:
            # An unverified map may be modified in place later, such as by a ReLU.
            feature_map = feature_map.clone()
        self._caught.tensors["feature_map"] = feature_map


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim < 2 or not images.is_floating_point():
        came = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        hint = "; convert as in training, such as images.float() / 255" if isinstance(images, Tensor) else ""
        raise InputError(f"images: expected a floating point batch [N, C, H, W], got {came}{hint}")
