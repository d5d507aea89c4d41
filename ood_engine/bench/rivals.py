"""The providers that several subjects are measured beside: torch.compile, and the papers' recipe of autograd and projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import ood_kernels as ok

from .cases import MissingProviderError, Provider

__all__ = ["AUTOGRAD", "COMPILED", "LIBRARY", "REFERENCE", "VMAP", "GradientRecipe", "compiled"]

REFERENCE = "reference"
COMPILED = "torch.compile"
LIBRARY = "matmul and reduce"
AUTOGRAD = "autograd, a sample at a time"
VMAP = "autograd, vmap"


def compiled(function: Callable[..., Any], *arguments: Any) -> Provider:
    """Provider: torch.compile of a function for the shapes of these arguments, compiled here.

    Raises:
        MissingProviderError: it cannot be compiled, such as without a C++ compiler on a CPU.
    """
    # What was compiled for other shapes counts towards a limit beyond which torch runs eagerly and says nothing.
    torch.compiler.reset()
    program = torch.compile(function, dynamic=False)
    try:
        program(*arguments)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingProviderError(COMPILED, f"torch.compile failed: {reason}") from error
    return Provider(COMPILED, lambda: program(*arguments), captures=True)


class GradientRecipe:
    """Low-dimensional gradients as arXiv 2310.17163 computes them: the gradient of the energy by autograd, then its projection.

    Args:
        head: differentiated with respect to weight and bias.
        vectors: [K, C·D̃] in fp32.
        constants: [K], the coordinates of the mean gradient.
    """

    def __init__(self, head: ok.Head, vectors: Tensor, constants: Tensor) -> None:
        assert head.bias is not None
        self._head = torch.cat([head.weight.float(), head.bias.float()[:, None]], 1).requires_grad_()
        self._vectors, self._constants = vectors, constants.float()

    def one_by_one(self, h: Tensor) -> Tensor:
        """Coordinates [N, K] of features [N, D], one forward and one backward a sample."""
        return torch.stack([self._coordinates(self._gradient(one)) for one in F.pad(h, (0, 1), value=1.0)])

    def by_vmap(self, h: Tensor) -> Tensor:
        """Coordinates [N, K] of features [N, D], all gradients at once."""
        gradients = vmap(grad(_energy), in_dims=(None, 0))(self._head.detach(), F.pad(h, (0, 1), value=1.0))
        return gradients.flatten(1) @ self._vectors.T - self._constants

    def _gradient(self, h_tilde: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = _energy(self._head, h_tilde)
        return torch.autograd.grad(energy, self._head)[0]

    def _coordinates(self, gradient: Tensor) -> Tensor:
        return self._vectors @ gradient.flatten() - self._constants


def _energy(head: Tensor, h_tilde: Tensor) -> Tensor:
    return (head @ h_tilde).logsumexp(0)
