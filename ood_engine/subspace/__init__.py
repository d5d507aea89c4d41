"""Low-dimensional subspaces of last-layer gradient space (arXiv 2310.17163), fitted without forming any gradient.

The gradient of a scalar of the logits is G = a ⊗ h̃ (h̃ = [h; 1]), so every inner product of two gradients is
⟨G_i, G_j⟩ = (a_i·a_j)(h̃_i·h̃_j), and PCA of n anchor gradients is the eigenproblem of their centred n × n Gram matrix.
"""

from .base import Basis, extend
from .class_average import ClassAverageBasis
from .dual import DualBasis
from .explicit import ExplicitBasis
from .factored import FactoredBasis
from .plan import Plan, plan
from .samples import check_n_components

__all__ = [
    "BASES",
    "Basis",
    "ClassAverageBasis",
    "DualBasis",
    "ExplicitBasis",
    "FactoredBasis",
    "Plan",
    "check_n_components",
    "extend",
    "plan",
]

BASES: dict[str, type[DualBasis | ExplicitBasis | FactoredBasis | ClassAverageBasis]] = {
    "dual": DualBasis,
    "explicit": ExplicitBasis,
    "factored": FactoredBasis,
    "class_average": ClassAverageBasis,
}
"""The bases by their names in detector settings."""
