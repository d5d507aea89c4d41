"""Forms of a gradient subspace: a file a form, and the table in which a new one takes a line."""

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
"""The forms by their `kind`."""


def basis_tensors(basis: BasisTensors | HasBasisTensors) -> BasisTensors:
    """The tensors of a basis, given as they are or as something fitted that holds them."""
    tensors = basis.tensors() if hasattr(basis, "tensors") else basis
    if type(tensors) not in BASES.values():
        known = ", ".join(form.__name__ for form in BASES.values())
        raise ValueError(f"basis: expected {known} or an object with .tensors(), got {type(tensors).__name__}")
    return tensors
