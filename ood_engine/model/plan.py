"""The plan of a tap: which modules give the head input and the feature map."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..errors import TapError
from .prefixes import prefixes_between

__all__ = ["TapPlan"]


@dataclass(frozen=True)
class TapPlan:
    """Head and feature map of a model, in serialisable names.

    Attributes:
        head: name of the layer that outputs the logits: an `nn.Linear`, or a 1×1 convolution called on a single position.
        feature_map: name of the module that outputs the map; None without a map.
        call: index of that module's call within one forward pass (a shared ReLU is called many times).
        layout: layout of that output, see `layouts.LAYOUTS`.
        relu: whether the map is the ReLU of that output, applied functionally by the model.
        tail: the modules between pooling and head, such as a norm, in order, each with the shape of what it receives per sample;
            empty if the head acts on the mean itself.
        proven: whether the map is verified: its spatial mean (through the tail) equals the head input.
        reason: how the map was verified, why it is unverified, or why there is none.
        head_call: index of the head call that outputs the logits within one forward pass.
        head_proven: whether the head is verified: the model returns its output, or the softmax of it.
        head_reason: how the head was verified, or why it is unverified.
        output: where the model's output holds the logits, see `outputs.tensors_of`; meaningless for an unverified head.
        sigmoid: whether the model returns sigmoids of this head, alone or mixed with those of others.
    """

    head: str
    feature_map: str | None
    call: int = 0
    layout: str = "NCHW"
    relu: bool = False
    tail: tuple[tuple[str, tuple[int, ...]], ...] = ()
    proven: bool = False
    reason: str = ""
    head_call: int = 0
    head_proven: bool = True
    head_reason: str = ""
    output: str = ""
    sigmoid: bool = False

    def __post_init__(self) -> None:
        # JSON has lists only.
        object.__setattr__(self, "tail", tuple((name, tuple(shape)) for name, shape in self.tail))

    def renamed_to(self, known: Collection[str]) -> TapPlan:
        """This plan for the same model inside or outside a wrapper, such as a LightningModule's `model.`.

        Raises:
            TapError: several parts of the model have all modules of the plan.
        """
        names = [name for name in (self.head, self.feature_map, *(name for name, _ in self.tail)) if name is not None]
        if all(name in known for name in names):
            return self
        prefixes = prefixes_between(names, known)
        if len(prefixes) > 1:
            parts = " and ".join(repr(one.added.removesuffix(".")) for one in prefixes)
            raise TapError(
                f"{self.head!r} was fitted as the head: {parts} of this model have one; pass that part of the model alone"
            )
        if not prefixes:
            return self
        new = {name: prefixes[0](name) or "" for name in names}
        feature_map = None if self.feature_map is None else new[self.feature_map]
        tail = tuple((new[name], shape) for name, shape in self.tail)
        return replace(self, head=new[self.head], feature_map=feature_map, tail=tail)
