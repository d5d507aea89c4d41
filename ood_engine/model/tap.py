"""Capture of a classifier's feature map and head input during inference, without changing the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, NotFittedError, TapError, one_line
from .checks import require_batch, require_finite_weights, require_steady, rounding_of
from .discovery import discover
from .layouts import LAYOUTS
from .outputs import agrees_with_logits, describe, relative_difference, tensor_at
from .plan import TapPlan
from .record import first_argument, is_linear
from .seal import Seal
from .strangers import StrangerGuard

__all__ = ["Captured", "Tap", "TapPlan"]

_PROOF_SAMPLES = 32
_MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
# The oldest supported torch has no AcceleratorError.
_DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Captured(NamedTuple):
    """Activations captured in one forward pass.

    Attributes:
        feature_map: [N, D, H, W], a view of the model's tensor if verified; None if the plan has no map.
        head_input: [N, D] input of the head.
        logits: [N, C] output of the model, or its softmax; of a head that is not verified, that of the head.
        rounding: dtype to whose precision the head rounded, such as under autocast, whatever the model returns.
    """

    feature_map: Tensor | None
    head_input: Tensor
    logits: Tensor
    rounding: torch.dtype


class Tap:
    """Finds and verifies head and feature map of a model, and captures them in every forward pass.

    Hooks live on a shallow twin of the model with thread-local storage: the model stays unchanged, several taps on one model are
    independent, and concurrent calls are safe. Hooks already on the model also run on the twin, since features such as pruning
    depend on them.

    Attributes:
        modules: name → module of the twin.

    Args:
        model: the classifier; a compiled or data-parallel one is unwrapped.
        head: name of the head; None: found automatically. A head named by hand need not make the model's output.
        feature_map: name of the module that outputs the map; None: found automatically.

    Raises:
        TapError: a scripted model, an unknown name, no linear layer, or weights that are not loaded or not finite.
    """

    def __init__(self, model: nn.Module, *, head: str | None = None, feature_map: str | None = None) -> None:
        self._model = model
        self._wanted_head, self._wanted_map = head, feature_map
        self._caught = threading.local()
        self._copy_model()

    def __getstate__(self) -> dict[str, Any]:
        """The model and its plan: a copy or another process makes its own twin, of the model that was fitted."""
        self.require_unchanged(thorough=True)
        return {name: vars(self)[name] for name in ("_model", "_wanted_head", "_wanted_map", "_plan")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plan = state.pop("_plan")
        vars(self).update(state)
        self._caught = threading.local()
        self._copy_model()
        if plan is not None:
            self._capture(plan)

    def _copy_model(self) -> None:
        """Twin of the model as it is now, since modules may have been replaced, with the layers named by hand."""
        self._handles: list[Any] = []
        self._plan: TapPlan | None = None
        self._seal: Seal | None = None
        self._guard = StrangerGuard(self._model)
        self._watch: Callable[[], AbstractContextManager[None]] = self._guard.watch
        self._twin: nn.Module = self._guard.twin
        self.modules: dict[str, nn.Module] = dict(self._twin.named_modules(remove_duplicate=False))
        # A module registered twice goes by its first name.
        self._first_names = {module: name for name, module in self._twin.named_modules()}
        head, feature_map = self._wanted_head, self._wanted_map
        linears: list[Any] = [module for module in self.modules.values() if is_linear(module)]
        if not linears:
            raise TapError(
                f"{type(self._model).__name__} has no nn.Linear and no 1×1 convolution: expected a classifier whose logits come"
                " from one"
            )
        if feature_map is not None:
            self._known(feature_map, f"feature_map={feature_map!r}")
        self._head = linears[-1] if head is None else self._linear(head, f"head={head!r}")
        require_finite_weights(self._twin)

    def _known(self, name: str, what: str) -> str:
        if name not in self.modules:
            last = ", ".join([known for known in self.modules if known][-8:])
            raise TapError(f"{what}: the model has no module of that name; its last modules are {last}")
        return self._first_names[self.modules[name]]

    def _linear(self, name: str, what: str) -> Any:
        module = self.modules[self._known(name, what)]
        if not is_linear(module):
            raise TapError(
                f"{what}: expected an nn.Linear or a 1×1 convolution, got a {type(module).__name__}; name the layer that makes the"
                " logits"
            )
        return module

    @property
    def plan(self) -> TapPlan:
        """Head and map in use. Raises NotFittedError before `find` or `adopt`."""
        if self._plan is None:
            raise NotFittedError("head and feature map are not known yet: call fit(loader) first")
        return self._plan

    def tensors(self) -> Iterator[Tensor]:
        """All parameters and buffers of the model."""
        yield from self._twin.parameters()
        yield from self._twin.buffers()

    @property
    def device(self) -> torch.device:
        """Device of the head."""
        return self.weights[0].device

    @property
    def is_ready(self) -> bool:
        """Whether head and map are known."""
        return self._plan is not None

    @property
    def head(self) -> Any:
        """The twin's head, with weight and bias shared with the model; before `find` the last linear layer of the model."""
        return self._head

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Current weight [C, D] and bias [C] of the head, without gradients."""
        weight, bias = self._head.weight, self._head.bias
        return weight.detach().flatten(1), None if bias is None else bias.detach()

    def find(self, images: Tensor) -> TapPlan:
        """Find and verify head and map of the model as it is now on the first finite images of a batch, and start capturing.

        Raises:
            InputError: not a floating-point batch, or no finite image.
            TapError: no layer outputs the logits, a model with random outputs or outputs that depend on the batch, or recomputed
                logits that differ from the model's.
        """
        require_batch(images)
        finite = images[torch.isfinite(images).flatten(1).all(1)][:_PROOF_SAMPLES]
        if not len(finite):
            raise InputError(
                f"images {list(images.shape)}: none is free of NaN and infinite values; expected at least one finite image"
            )
        before = dict(vars(self))
        try:
            self._copy_model()
            self._discover(finite)
        except BaseException:
            vars(self).update(before)
            raise
        return self.plan

    def _discover(self, images: Tensor) -> None:
        head, feature_map = (name and self._known(name, name) for name in (self._wanted_head, self._wanted_map))
        names = {name: module for module, name in self._first_names.items()}
        plan, logits = discover(names, lambda: self._run(images), len(images), head, feature_map)
        self._capture(plan)
        # In another order and number, so that whatever depends on the batch differs.
        order = torch.arange(max(1, len(images) - 1), device="cpu").flip(0)
        images, logits = images[order.to(images.device)], logits[order.to(logits.device)]
        captured = self(images)
        source = captured.head_input if captured.feature_map is None else captured.feature_map
        # The model counts as its convolutions, in TF32 by default on a GPU.
        dtypes = captured.rounding, source.dtype, rounding_of(self._twin, captured.logits)
        require_steady(logits, captured.logits, lambda: self(images).logits, self.modules, *dtypes)
        self._require_explained(captured)

    def _require_explained(self, captured: Captured) -> None:
        features = source = captured.head_input
        if captured.feature_map is not None and self.plan.proven:
            source = captured.feature_map
            features = self.features(source.to(torch.promote_types(source.dtype, torch.float32)).mean((2, 3)))
        weight, bias = self.weights
        logits = F.linear(features.to(weight.dtype), weight, bias)
        if not agrees_with_logits(logits, captured.logits, source.dtype, captured.rounding):
            raise TapError(
                f"logits recomputed from {self.plan.feature_map or 'the input'!r} and head {self.plan.head!r} differ from the"
                f" model's own by up to {relative_difference(logits, captured.logits):.3g} relative to their size: expected equal"
                " logits; name the right layers by head=... and feature_map=..."
            )

    def adopt(self, plan: TapPlan) -> None:
        """Capture by an existing plan, such as that of a state file; its names may lack or have the prefix of a wrapper.

        Raises:
            TapError: a module of the plan missing from this model, or a head that is no linear layer with floating-point weights.
        """
        plan = plan.renamed_to([name for name, module in self.modules.items() if name or is_linear(module)])
        self._capture(plan)
        self._wanted_head = self._wanted_head or plan.head
        if not plan.proven:
            self._wanted_map = self._wanted_map or plan.feature_map

    def _capture(self, plan: TapPlan) -> None:
        head = self._linear(plan.head, f"{plan.head!r} was fitted as the head")
        if not head.weight.is_floating_point():
            raise TapError(
                f"the head {plan.head!r} has {head.weight.dtype} weights: expected floating point; exclude it from quantisation"
            )
        for name in (plan.feature_map, *(name for name, _ in plan.tail)):
            if name is not None:
                self._known(name, f"{name!r} was fitted")
        for handle in self._handles:
            handle.remove()
        self._handles = [head.register_forward_pre_hook(partial(self._catch_head_input, plan), with_kwargs=True)]
        self._handles.append(head.register_forward_hook(partial(self._catch_head_output, plan)))
        if plan.feature_map is not None:
            catch_map = partial(self._catch_map, plan)
            self._handles.append(self.modules[plan.feature_map].register_forward_hook(catch_map))
        self._plan, self._head = plan, head
        self._seal = Seal(self._model, self._guard.twins)

    def require_unchanged(self, *, thorough: bool = False) -> None:
        """Raise TapError if modules or weights of the model are not those of `find` or `adopt`; does not read the weights.

        Args:
            thorough: read the weights, and so notice assignments to their `.data` as well.
        """
        changed = None if self._seal is None else self._seal.change(thorough=thorough)
        if changed is not None:
            raise TapError(
                f"the model has changed since it was fitted or loaded: {changed!r} is another now; call fit(loader)"
                " again, or restore the weights"
            )

    def __call__(self, images: Tensor) -> Captured:
        """Run the model on a copy of images [N, ...] in its device and dtype, and return the captured activations.

        Raises:
            InputError: not a floating-point batch, or images the model rejects.
            TapError: the model did not call the modules of the plan, or did not return one row of logits per image.
        """
        plan = self.plan
        caught: dict[str, Tensor] = {}
        self._caught.tensors = caught
        self._caught.calls = {"head_input": 0, "head_output": 0, "feature_map": 0}
        try:
            output = self._run(images)
        finally:
            del self._caught.tensors, self._caught.calls
        if "head_input" not in caught or (plan.feature_map is not None and "feature_map" not in caught):
            raise TapError(
                f"the model bypassed its modules {plan.head!r} and {plan.feature_map!r}: expected both to be called in every"
                " forward pass; name others by head=... and feature_map=..."
            )
        logits = tensor_at(output, plan.output) if plan.head_proven else caught["head_output"]
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise TapError(f"the model returned {describe(output)}: expected logits [N, C] as in the fit")
        if len(logits) != len(images):
            raise TapError(
                f"the model returned {len(logits)} rows of logits for {len(images)} images: expected one row per image"
            )
        rounding = rounding_of(self._head, caught["head_output"])
        return Captured(caught.get("feature_map"), caught["head_input"], logits.detach(), rounding)

    def features(self, pooled: Tensor) -> Tensor:
        """Head input for the spatial mean `pooled` [N, D] of a verified map: the mean itself, or the tail's output."""
        vector = pooled
        with torch.no_grad():
            for name, shape in self.plan.tail:
                module = self.modules[name]
                weight = next(module.parameters(), self.weights[0])
                # A copy, because the module may work in place.
                vector = module(vector.reshape(len(pooled), *shape).to(weight.dtype, copy=True)).flatten(1)
        return vector

    def _run(self, images: Tensor) -> Any:
        require_batch(images)
        # The first weight, because stem and head may differ in dtype or device.
        stem = next(filter(Tensor.is_floating_point, self._twin.parameters()), self._head.weight)
        # A model may cache tensors between calls, which must not be inference tensors, and may modify its input in place.
        with torch.inference_mode(False), torch.no_grad(), self._watch():
            try:
                output = self._twin(images.detach().to(stem.device, stem.dtype, copy=True))
            except (TapError, *_DEVICE_ERRORS):
                raise
            except _MODEL_ERRORS as error:
                raise InputError(
                    f"images {list(images.shape)}: the model rejects them; expected the channels and size it was trained on"
                    f" ({one_line(error)})"
                ) from error
        self._watch = nullcontext
        return output

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
            self._caught.tensors["head_input"] = first_argument(args, kwargs).detach().clone().flatten(1)

    def _catch_head_output(self, plan: TapPlan, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._next_call("head_output") == plan.head_call:
            # Of a verified head only the dtype is read.
            self._caught.tensors["head_output"] = output if plan.head_proven else output.detach().clone().flatten(1)

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
