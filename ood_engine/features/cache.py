"""The feature cache: the result of one pass over the ID data, and the only input of fitting.

In memory up to a configurable size, beyond it in memory-mapped raw files.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, OodEngineError

__all__ = ["NO_LABEL", "CacheRows", "CacheWriter", "FeatureCache", "fingerprint"]

NO_LABEL = -1
"""Label of an unlabelled sample."""

_FIRST_BLOCK = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CacheRows(NamedTuple):
    """Rows of the cache: some samples, or all.

    Attributes:
        features: [n, D] penultimate features, fp32 (fp64 for an fp64 model) or the configured cache dtype.
        fingerprints: int64 [n] content hash of each input image, see `fingerprint`.
        labels: int64 [n], `NO_LABEL` if unlabelled.
        maximum: [n, D] per-channel maximum of the feature map; [n, 0] for a model without a map.
        nap_mean: [n, D] per-channel mean of NAP's map if it differs from `features`; else [n, 0].
    """

    features: Tensor
    fingerprints: Tensor
    labels: Tensor
    maximum: Tensor
    nap_mean: Tensor

    def select(self, index: Tensor | slice) -> CacheRows:
        """The rows at `index`, in that order."""
        return CacheRows(*(column[index] for column in self))


class FeatureCache:
    """The finished cache: columns as CPU tensors, in memory or memory-mapped.

    Attributes:
        rows: all columns.
        directory: folder of memory-mapped files; None if everything is in memory.

    Example:
        >>> import torch
        >>> cache = FeatureCache.from_features(torch.rand(100, 64), labels=torch.arange(100) % 8)
        >>> len(cache), cache.has_map, cache.nbytes
        (100, False, 27200)
    """

    def __init__(self, rows: CacheRows, directory: Path | None = None, _keep: Any = None) -> None:
        self.rows = rows
        self.directory = directory
        # Ties the lifetime of the writer's folder to the cache mapped from it.
        self._keep = _keep

    def __len__(self) -> int:
        return self.rows.features.shape[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        # A finished cache never changes, and may be larger than memory.
        return self

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        maximum: Tensor | None = None,
        fingerprints: Tensor | None = None,
        directory: str | Path | None = None,
    ) -> FeatureCache:
        """A cache of precomputed features, without copies.

        To memory-map a file: `torch.from_numpy(np.load("features.npy", mmap_mode="c"))`.

        Args:
            features: [n, D] penultimate features of ID samples, fp16, bf16, fp32 or fp64.
            labels: [n] integers, if any.
            maximum: [n, D] per-channel maximum of the feature map, required by NAP.
            fingerprints: int64 [n] hashes of the images, see `fingerprint`. By default those of the features, with which
                `Engine.calibrate` cannot detect images used in the fit.
            directory: folder for intermediate results of fitting, in unnamed files; None keeps them in memory.

        Raises:
            InputError: other shapes or dtypes, or no sample.
        """
        if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
            raise InputError(
                f"features: expected floating point [n, D] with n and D of at least 1, got {features.dtype} {list(features.shape)}"
            )
        count = len(features)
        if maximum is not None and (maximum.shape != features.shape or not maximum.is_floating_point()):
            raise InputError(
                f"maximum: expected floating point {list(features.shape)}, as the features, got {maximum.dtype}"
                f" {list(maximum.shape)}"
            )
        if labels is not None and (
            labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool
        ):
            raise InputError(f"labels: expected whole numbers [{count}], got {labels.dtype} {list(labels.shape)}")
        if fingerprints is None:
            fingerprints = torch.cat([fingerprint(part) for part in features.split(4096)])
        if fingerprints.shape != (count,) or fingerprints.dtype != torch.int64:
            raise InputError(
                f"fingerprints: expected int64 [{count}], got {fingerprints.dtype} {list(fingerprints.shape)}"
            )
        nothing = torch.empty((count, 0), dtype=features.dtype, device="cpu")
        labels = torch.full((count,), NO_LABEL, device="cpu") if labels is None else labels.to(torch.int64)
        rows = CacheRows(features, fingerprints, labels, nothing if maximum is None else maximum, nothing)
        return cls(rows, None if directory is None else Path(directory))

    def empty(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """An uninitialised tensor of like's dtype, mapped from a file if the cache has a folder, else on like's device."""
        if self.directory is None or 0 in shape:
            return like.new_empty(shape)
        with tempfile.NamedTemporaryFile(dir=self.directory) as file:
            # Closing unlinks the file; its space is freed with the last tensor mapped from it.
            file.truncate(shape[0] * shape[1] * like.element_size())
            mapped = torch.from_file(file.name, shared=True, size=shape[0] * shape[1], dtype=like.dtype)
        return mapped.view(shape)

    @property
    def has_map(self) -> bool:
        """Whether the per-channel maximum, required by NAP, is available."""
        return self.rows.maximum.shape[1] > 0

    def without_nap_mean(self) -> FeatureCache:
        """The same cache, where NAP's means are the features."""
        nothing = self.rows.nap_mean.new_empty((len(self), 0))
        return FeatureCache(self.rows._replace(nap_mean=nothing), self.directory, self._keep)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.numel() * column.element_size() for column in self.rows)

    def batches(self, index: Tensor | None = None, size: int = 4096) -> Iterator[CacheRows]:
        """The rows at `index` (default: all) in chunks of `size`, so that a mapped cache is never loaded whole."""
        count = len(self) if index is None else index.shape[0]
        for start in range(0, count, size):
            here = slice(start, min(start + size, count))
            yield self.rows.select(here if index is None else index[here])


class CacheWriter:
    """Appends an unknown number of batches; spills to disk beyond `limit_bytes`.

    Batches are copied into blocks of doubling size: kept one by one between the image batches that a loader allocates and frees,
    they would fragment the heap by about the size of every image (0.6 MiB per image of 224 × 224).

    Args:
        limit_bytes: largest size in memory.
        directory: parent of the spill folder, which is removed with the cache; None: the system's temporary directory.
        dtype: dtype of features and maxima, such as float16 for half the size; None keeps theirs.

    Raises:
        InputError: a dtype that is not floating point.
    """

    def __init__(
        self,
        limit_bytes: int = 4 * 2**30,
        directory: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise InputError(f"cache dtype {dtype}: expected one of {', '.join(map(str, _DTYPES))}, or None")
        self._dtype = dtype
        self._limit = limit_bytes
        self._parent = Path(directory) if directory is not None else Path(tempfile.gettempdir())
        self._directory: Path | None = None
        self._blocks: list[CacheRows] = []
        self._filled = 0
        self._bytes = 0
        self._count = 0

    def append(self, rows: CacheRows) -> None:
        """Append a batch, moved to the CPU.

        Raises:
            InputError: finite values beyond the range of the dtype.
            OodEngineError: a full disk.
        """
        rows = CacheRows(*(self._kept(column.detach()).cpu() for column in rows))
        self._bytes += sum(column.numel() * column.element_size() for column in rows)
        self._store(rows)
        self._count += len(rows.features)
        if self._bytes > self._limit:
            self._spill()

    def _store(self, rows: CacheRows) -> None:
        count = len(rows.features)
        if not self._blocks or self._filled + count > len(self._blocks[-1].features):
            self._trim()
            size = count if self._directory is not None else max(count, self._count, _FIRST_BLOCK)
            self._blocks.append(CacheRows(*(column.new_empty((size, *column.shape[1:])) for column in rows)))
            self._filled = 0
        for block, column in zip(self._blocks[-1], rows, strict=True):
            block[self._filled : self._filled + count] = column
        self._filled += count

    def _trim(self) -> None:
        """Cut the last block to its filled rows."""
        if self._blocks:
            self._blocks[-1] = self._blocks[-1].select(slice(self._filled))

    def _kept(self, column: Tensor) -> Tensor:
        if self._dtype is None or not column.is_floating_point():
            return column
        largest = column.abs().nan_to_num(0, 0).max() if column.numel() else torch.zeros((), device="cpu")
        if largest > torch.finfo(self._dtype).max:
            raise InputError(
                f"features up to {float(largest):.3g} do not fit {self._dtype}: expected at most"
                f" {torch.finfo(self._dtype).max:.3g}; use float32 or bfloat16 for the cache"
            )
        return column.to(self._dtype)

    def finish(self) -> FeatureCache:
        """The cache of all appended batches.

        Raises:
            InputError: no batch was appended.
        """
        if self._count == 0:
            raise InputError("the loader gave no images: expected at least one batch; check its path and filters")
        self._trim()
        if self._directory is None:
            return FeatureCache(CacheRows(*(torch.cat(columns) for columns in zip(*self._blocks, strict=True))))
        columns = []
        for name, column in self._template._asdict().items():
            shape = (self._count, *column.shape[1:])
            if 0 in shape:
                columns.append(column.new_empty(shape))
                continue
            # NumPy has no bfloat16: map bytes, and reinterpret them in torch.
            size = column.element_size()
            array = np.memmap(self._file(name), dtype=np.uint8, mode="r+", shape=(*shape[:-1], shape[-1] * size))
            columns.append(torch.from_numpy(array).view(column.dtype))
        return FeatureCache(CacheRows(*columns), self._directory, self)

    def _spill(self) -> None:
        self._trim()
        try:
            if self._directory is None:
                self._make_directory()
            for name, parts in zip(CacheRows._fields, zip(*self._blocks, strict=True), strict=True):
                with open(self._file(name), "ab") as file:
                    for column in parts:
                        file.write(column.contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
            if error.errno != errno.ENOSPC:
                raise
            raise OodEngineError(
                f"no space left in {self._parent} for the feature cache ({self._bytes / 2**20:.0f} MiB so far): expected"
                " room for n · 2D numbers; free some space, or choose another folder by cache_directory=..."
            ) from error
        self._template = CacheRows(*(column[:0] for column in self._blocks[-1]))
        self._blocks = []

    def _make_directory(self) -> None:
        # A new folder, so that files mapped by another cache are never overwritten.
        self._parent.mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="ood-engine-cache-", dir=self._parent))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)

    def _file(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{name}.bin"


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit content hash per row of [N, ...], int64 [N], identical on every device and in every batch.

    h = mix(Σ_i mix(bits_i + (i + 1)·φ)) in wrapping 64-bit integers, independent of summation order and batch. The anchors of a
    gradient basis are the samples with the smallest fingerprints, a choice independent of the order of the data.
    """
    rows = tensor.detach().flatten(1)
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[rows.element_size()]
    bits = rows.contiguous().view(kind)
    total = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    width = 2**13
    for start in range(0, bits.shape[1], width):
        part = bits[:, start : start + width].to(torch.int64)
        position = torch.arange(start + 1, start + 1 + part.shape[1], device=rows.device) * _GOLDEN
        total += _mix(part + position).sum(1)
    return _mix(total)


_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed 64-bit integer


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 on signed integers, with logical shifts."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value ^ ((value >> 31) & ((1 << 33) - 1))
