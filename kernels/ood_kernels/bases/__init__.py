"""Basis kinds of a gradient subspace: one file per kind, one line of registration in `BASES`."""

from __future__ import annotations

from ..types import BasisTensors, HasBasisTensors
from .dual import DualTensors
from .explicit import ExplicitTensors
from .factored import FactoredTensors

__all__ = ["BASES", "DualTensors", "ExplicitTensors", "FactoredTensors", "basis_tensors"]

BASES: dict[str, type[BasisTensors]] = {
    "dual": DualTensors,
    "explicit": ExplicitTensors,
    "factored": FactoredTensors,
}
"""Basis types by `kind`."""


def basis_tensors(basis: BasisTensors | HasBasisTensors) -> BasisTensors:
    """The tensors of a basis, from the tuple itself or from a fitted object.

    Raises:
        ValueError: not an instance of a registered basis type.
    """
    tensors = basis.tensors() if hasattr(basis, "tensors") else basis
    if type(tensors) not in BASES.values():
        known = ", ".join(each.__name__ for each in BASES.values())
        raise ValueError(f"basis: expected {known} or an object with .tensors(), got {type(tensors).__name__}")
    return tensors
