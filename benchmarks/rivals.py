"""Who computes what the kernels do: torch.compile, plain products, and per-sample autograd as the paper writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import ood_kernels as ok
from ood_kernels.workloads import Basis

from .cases import COMPILED, MissingProviderError, Provider, first_line

__all__ = ["Recipe", "compiled", "plain_products"]

_OUTER_ELEMENTS = 2**24


def compiled(function: Callable[..., Any], *arguments: Any) -> Provider:
    """Provider: torch.compile of a function, compiled here for the shapes of these arguments.

    Raises:
        MissingProviderError: it cannot be compiled, such as without a C++ compiler on a CPU.
    """
    # What was compiled for other shapes counts towards a limit beyond which torch runs eagerly and says nothing.
    torch.compiler.reset()
    program = torch.compile(function, dynamic=False)
    try:
        program(*arguments)
    except Exception as error:
        raise MissingProviderError(COMPILED, first_line(error)) from error
    return Provider(COMPILED, lambda: program(*arguments))


def as_vectors(basis: Basis) -> Tensor:
    """The vectors of a basis [K, C·D̃] in fp32."""
    if isinstance(basis, ok.ExplicitTensors):
        return basis.components.float().flatten(1)
    if isinstance(basis, ok.FactoredTensors):
        left, right, core = (part.float() for part in basis[:3])
        return (left @ core @ right.T).flatten(1)
    cotangents, features, coefficients = (part.float() for part in basis[:3])
    extended = F.pad(features, (0, 1), value=1.0)
    return torch.stack([((cotangents * column[:, None]).T @ extended).flatten() for column in coefficients.T])


def plain_products(p: Tensor, h: Tensor, basis: Basis) -> Callable[[], Tensor]:
    """What a user would write, in the dtype of the basis: two products and what lies between, or gradients times vectors."""
    dtype, constants = basis[0].dtype, basis.constants
    if isinstance(basis, ok.DualTensors):
        cotangents, features, coefficients = basis[:3]

        def dual() -> Tensor:
            gram = (p.to(dtype) @ cotangents.T) * (h.to(dtype) @ features.T + 1)
            return (gram @ coefficients).float() - constants

        return dual
    factored = isinstance(basis, ok.FactoredTensors)
    vectors = (basis.core if isinstance(basis, ok.FactoredTensors) else basis.components).flatten(1).T

    def gradients() -> Tensor:
        left, right = p.to(dtype), F.pad(h, (0, 1), value=1.0).to(dtype)
        if factored:
            left, right = left @ basis[0], right @ basis[1]
        rows = max(1, _OUTER_ELEMENTS // len(vectors))
        pairs = zip(left.split(rows), right.split(rows), strict=True)
        return torch.cat([(a[:, :, None] * b[:, None, :]).flatten(1) @ vectors for a, b in pairs]).float() - constants

    return gradients


class Recipe:
    """Coordinates as arXiv 2310.17163 computes them: the gradient of the energy by weight and bias, times the vectors, centred."""

    def __init__(self, head: ok.Head, basis: Basis) -> None:
        assert head.bias is not None
        self._head = torch.cat([head.weight.float(), head.bias.float()[:, None]], 1).requires_grad_()
        self._vectors, self._constants = as_vectors(basis), basis.constants.float()

    def one_by_one(self, h: Tensor) -> Tensor:
        """[N, K], one forward and one backward a sample."""
        found = []
        for h_tilde in F.pad(h, (0, 1), value=1.0):
            with torch.enable_grad():
                energy = _energy(self._head, h_tilde)
            found.append(self._vectors @ torch.autograd.grad(energy, self._head)[0].flatten() - self._constants)
        return torch.stack(found)

    def by_vmap(self, h: Tensor) -> Tensor:
        """[N, K], all gradients at once."""
        gradients = vmap(grad(_energy), in_dims=(None, 0))(self._head.detach(), F.pad(h, (0, 1), value=1.0))
        return gradients.flatten(1) @ self._vectors.T - self._constants


def _energy(head: Tensor, h_tilde: Tensor) -> Tensor:
    return (head @ h_tilde).logsumexp(0)
