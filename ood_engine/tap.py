"""Runs a classifier and hands over its feature map and what its head received; the model itself is not touched."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .discovery import LAYOUTS, TapPlan, agrees_with_logits, discover, logits_of
from .errors import InputError, NotFittedError, TapError
from .twin import shallow_twin

__all__ = ["Captured", "Tap", "TapPlan"]

_PROOF_SAMPLES = 32


class Captured(NamedTuple):
    """What one forward pass left behind.

    Attributes:
        feature_map: [N, D, H, W] view of the model's own tensor; None where the plan has no map.
        head_input: [N, D] what the head received.
        logits: [N, C] the model's own output.
    """

    feature_map: Tensor | None
    head_input: Tensor
    logits: Tensor


class Tap:
    """Finds head and feature map of a model by proof and captures both while the model runs.

    Hooks live on a shallow twin of the model and catch per thread, so the user's model stays as it was, several taps on one
    model do not meet, and threads may call at the same time.

    Args:
        model: the classifier; a compiled or data-parallel one is unwrapped.
        head: name of the head where it is to be given by hand.
        feature_map: name of the module whose output is the map, where it is to be given by hand.

    Raises:
        TapError: a scripted model, a name that is not in it, no `nn.Linear`, or weights that are not finite.
    """

    def __init__(self, model: nn.Module, *, head: str | None = None, feature_map: str | None = None) -> None:
        self._twin: nn.Module = shallow_twin(model).eval()
        self._modules: dict[str, nn.Module] = dict(self._twin.named_modules())
        self._wanted_head, self._wanted_map = head, feature_map
        self._caught = threading.local()
        self._handles: list[Any] = []
        self._plan: TapPlan | None = None
        for argument, name in (("head", head), ("feature_map", feature_map)):
            if name is not None:
                self._module(name, f"{argument}={name!r}")
        self._last_linear = self._check_linear(type(model).__name__, head)
        self._check_finite()

    def _module(self, name: str, what: str) -> nn.Module:
        if name not in self._modules:
            last = ", ".join([known for known in self._modules if known][-8:])
            raise TapError(f"{what}: the model has no module of that name; its last modules are {last}")
        return self._modules[name]

    def _check_linear(self, model_name: str, head: str | None) -> nn.Linear:
        linears = [module for module in self._modules.values() if isinstance(module, nn.Linear)]
        if not linears:
            raise TapError(
                f"{model_name} has no nn.Linear: expected a classifier whose logits come from one; a head that is a 1×1"
                " convolution can be replaced by the equal nn.Linear"
            )
        if head is None:
            return linears[-1]
        named = self._modules[head]
        if not isinstance(named, nn.Linear):
            raise TapError(
                f"head={head!r}: expected an nn.Linear, got a {type(named).__name__}; name the layer that makes the logits"
            )
        return named

    def _check_finite(self) -> None:
        for name, tensor in (*self._twin.named_parameters(), *self._twin.named_buffers()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise TapError(
                    f"the model's {name!r} has {bad} NaN or infinite values of {tensor.numel()}: expected finite weights;"
                    " load a sound checkpoint"
                )

    @property
    def plan(self) -> TapPlan:
        """What was found. Raises NotFittedError before `find` or `adopt`."""
        if self._plan is None:
            raise NotFittedError("head and feature map are not known yet: call fit(loader) first")
        return self._plan

    @property
    def device(self) -> torch.device:
        """Where the head is, and images are sent."""
        return self.head.weight.device

    @property
    def is_ready(self) -> bool:
        """Whether head and map are known."""
        return self._plan is not None

    @property
    def head(self) -> nn.Linear:
        """The twin's head, which shares weight and bias with the model's; before `find` the last nn.Linear of the model."""
        module = self._last_linear if self._plan is None else self._modules[self._plan.head]
        assert isinstance(module, nn.Linear)
        return module

    def find(self, images: Tensor) -> TapPlan:
        """Find head and map by running the first samples of a batch, prove them, and start capturing.

        Raises:
            TapError: no nn.Linear makes the model's output, or the logits recomputed from the map differ from the model's.
        """
        images = images[:_PROOF_SAMPLES]
        hooked = {name: module for name, module in self._modules.items() if name}
        self.adopt(discover(hooked, lambda: self._run(images), self._wanted_head, self._wanted_map))
        captured = self(images)
        features = captured.head_input
        if captured.feature_map is not None and self.plan.proven:
            dtype = torch.promote_types(captured.feature_map.dtype, torch.float32)
            features = self.features(captured.feature_map.to(dtype).mean((2, 3)))
        logits = F.linear(features.to(self.head.weight.dtype), self.head.weight, self.head.bias).detach()
        if not agrees_with_logits(logits, captured.logits):
            worst = float((logits.double() - captured.logits.double()).abs().max())
            raise TapError(
                f"logits recomputed from {self.plan.feature_map or 'the input'!r} and head {self.plan.head!r} differ from the"
                f" model's own by up to {worst:.3g}: expected them equal; name the right layers by head=... and feature_map=..."
            )
        return self.plan

    def adopt(self, plan: TapPlan) -> None:
        """Capture by a plan that is already known, such as that of a state file.

        Raises:
            TapError: a module of the plan is not in this model, or its head is not an nn.Linear.
        """
        for name in (plan.head, plan.feature_map, plan.tail):
            if name is not None:
                self._module(name, f"{name!r} was fitted")
        head = self._modules[plan.head]
        if not isinstance(head, nn.Linear):
            raise TapError(f"{plan.head!r} was fitted as the head: expected an nn.Linear, got a {type(head).__name__}")
        for handle in self._handles:
            handle.remove()
        self._handles = [head.register_forward_pre_hook(self._catch_head_input, with_kwargs=True)]
        if plan.feature_map is not None:
            self._handles.append(self._modules[plan.feature_map].register_forward_hook(self._catch_map))
        self._plan = plan

    def __call__(self, images: Tensor) -> Captured:
        """Run the model on images [N, ...], sent to its device and dtype, and return what was caught.

        Raises:
            InputError: not a batch of floating point images, or images that the model rejects.
        """
        plan = self.plan
        caught: dict[str, Tensor] = {}
        self._caught.tensors = caught
        self._caught.calls = 0
        try:
            logits = self._run(images)
        finally:
            del self._caught.tensors, self._caught.calls
        if "head_input" not in caught or (plan.feature_map is not None and "feature_map" not in caught):
            raise TapError(
                f"the model ran past its modules {plan.head!r} and {plan.feature_map!r}: expected both to be called on every"
                " forward; name others by head=... and feature_map=..."
            )
        return Captured(caught.get("feature_map"), caught["head_input"], logits)

    def features(self, pooled: Tensor) -> Tensor:
        """What the head receives for the spatial mean `pooled` [N, D] of a proven map: the mean itself, or the tail's output."""
        if self.plan.tail is None:
            return pooled
        tail = self._modules[self.plan.tail]
        with torch.no_grad():
            vector = pooled.reshape(pooled.shape[0], *self.plan.tail_shape).to(self.head.weight.dtype)
            output: Tensor = tail(vector).flatten(1)
        return output

    def _run(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim < 2 or not images.is_floating_point():
            came = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            hint = "; convert as in training, such as images.float() / 255" if isinstance(images, Tensor) else ""
            raise InputError(f"images: expected a floating point batch [N, C, H, W], got {came}{hint}")
        weight = self.head.weight
        with torch.no_grad():
            try:
                return logits_of(self._twin(images.to(weight.device, weight.dtype))).detach()
            except (RuntimeError, TypeError, IndexError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(
                    f"images {list(images.shape)}: the model rejects them; expected the channels and size it was trained on"
                    f" ({first})"
                ) from error

    def _catch_head_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught = getattr(self._caught, "tensors", None)
        if caught is not None:
            caught["head_input"] = (args[0] if args else kwargs["input"]).detach()

    def _catch_map(self, module: nn.Module, args: Any, output: Tensor) -> None:
        caught = getattr(self._caught, "tensors", None)
        if caught is None:
            return
        if self._caught.calls == self.plan.call:
            feature_map = LAYOUTS[self.plan.layout](output.detach())
            caught["feature_map"] = feature_map.relu() if self.plan.relu else feature_map
        self._caught.calls += 1
