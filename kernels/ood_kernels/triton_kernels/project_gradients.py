"""Projection on a basis of any kind, dispatched to its own kernels."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from .. import reference
from ..types import BasisTensors

__all__ = ["project_gradients"]


def project_gradients(p: Tensor, h: Tensor, basis: BasisTensors, *, precision: str = "ieee") -> Tensor:
    """Centred coordinates [N, K] in fp32, by `project_<kind>` of that module; inputs in fp32, fp16 or bf16."""
    name = f"project_{basis.kind}"
    project = getattr(import_module(f".{name}", __package__), name)
    coordinates: Tensor = project(reference.cotangent(p, basis.cotangent), h, basis, precision)
    return coordinates
