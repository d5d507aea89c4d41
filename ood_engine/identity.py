"""Identity of a model: digests of its tensors, and synthetic inputs for models that were quantised or merged since.

The digests cover every parameter and buffer in the order of registration, without names: prefixes of wrappers, devices, strides
and views leave them alone. A chunk of at most 16 MiB is on the host at a time. ResNet-50 (25.6 M values) costs 408 MiB of
SHA-256 for its digests, below a second on one core.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["HeadSize", "ModelDigest", "SyntheticInputs", "strided"]

_CHUNK = 2**21
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Names of dtypes, from wide to narrow."""
_SYNTHETIC = 4


class HeadSize(NamedTuple):
    """Sizes of a head."""

    classes: int
    features: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.classes} classes × {self.features} features {'with' if self.bias else 'without'} bias"


class ModelDigest(NamedTuple):
    """SHA-256 of tensors as they are, and with every floating-point value rounded to each dtype a model is cast to.

    Attributes:
        dtype: the narrowest floating-point dtype among the tensors.
        own: digest of the tensors as they are.
        rounded: dtype → digest of the tensors rounded to it.
    """

    dtype: str
    own: str
    rounded: dict[str, str]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> ModelDigest:
        """The digest of tensors, in their order."""
        present = {"float64"}
        digests = {name: hashlib.sha256() for name in ("own", *_DTYPES)}
        for tensor in tensors:
            own = str(tensor.dtype).removeprefix("torch.")
            present |= {own} & set(_DTYPES)
            for name, digest in digests.items():
                digest.update(f"{own if name == 'own' else name} {tuple(tensor.shape)}".encode())
            for chunk in (chunk for part in strided(tensor) for chunk in part.flatten().split(_CHUNK)):
                on_host = chunk.cpu()
                for name, digest in digests.items():
                    rounds = name in _DTYPES and on_host.is_floating_point()
                    digest.update(_bytes(on_host.to(_DTYPES[name]) if rounds else on_host))
        own = digests.pop("own").hexdigest()
        narrowest = max(present, key=list(_DTYPES).index)
        return cls(narrowest, own, {name: digest.hexdigest() for name, digest in digests.items()})

    def matches(self, other: ModelDigest) -> bool:
        """Whether both are of the same model, or one of a cast of the other."""
        narrowest = max(self.dtype, other.dtype, key=list(_DTYPES).index)
        return self.own == other.own or (
            self.dtype != other.dtype and self.rounded[narrowest] == other.rounded[narrowest]
        )


class SyntheticInputs(NamedTuple):
    """Four inputs by an integer formula, equal on every machine and related to no data but its shape and range.

    Value i of input j is low + (high - low) · (((⌊i / 4^j⌋ + 97 j + 1) · 2654435761) mod 2^32) / 2^32: noise, and stripes of
    growing width.

    Attributes:
        shape: of one input.
        low: smallest value.
        high: largest value.

    Example:
        >>> SyntheticInputs((2,), 0.0, 1.0).images()[0]
        tensor([0.6180, 0.2361])
    """

    shape: tuple[int, ...]
    low: float
    high: float

    @classmethod
    def like(cls, images: Tensor) -> SyntheticInputs:
        """Inputs of the shape and range of a batch of images."""
        finite = images[torch.isfinite(images)].float()
        return cls(tuple(images.shape[1:]), float(finite.min()), float(finite.max()))

    def images(self) -> Tensor:
        """The inputs, fp32 [4, *shape]."""
        index = torch.arange(math.prod(self.shape), dtype=torch.int64, device="cpu")
        rows = []
        for row in range(_SYNTHETIC):
            hashed = (((index // 4**row) + 97 * row + 1) * 2654435761) % 2**32
            rows.append(self.low + (self.high - self.low) * hashed.double() / 2**32)
        return torch.stack(rows).float().view(_SYNTHETIC, *self.shape)


def strided(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the values of a tensor, without gradient: of a sparse one its indices and values, of another itself."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.resolve_conj().resolve_neg()]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
