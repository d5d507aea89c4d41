"""Unpacking and validation of loader batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..errors import InputError
from .cache import NO_LABEL

__all__ = ["Loader", "image_batches", "most_samples", "with_progress"]

Loader = Iterable[Any]
"""Yields images [n, C, H, W], (images, labels [n], ...), or a mapping with them; labels and further items are optional."""

_IMAGES = ("pixel_values", "image", "images", "img", "input", "inputs", "x")
_LABELS = ("label", "labels", "target", "targets", "y")


def image_batches(loader: Loader, what: str, progress: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, int64 labels) of every non-empty batch; labels are `NO_LABEL` if missing.

    Raises:
        InputError: a batch of another kind, or labels that are not one integer per image.
    """
    for number, batch in enumerate(with_progress(loader, what, progress)):
        images, labels = _unpacked(batch, number)
        if not isinstance(images, Tensor):
            raise InputError(
                f"batch {number} of the loader: expected images as a tensor, or (images, labels), got {type(batch).__name__}"
            )
        if images.shape[:1] == (0,):
            continue
        yield images, _checked_labels(labels, images.shape[0], number)


def _unpacked(batch: Any, number: int) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return _only(batch, _IMAGES, "images", number), _only(batch, _LABELS, "labels", number)
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch, None
    images, labels = (*batch, None)[:2]
    if isinstance(images, Tensor) and isinstance(labels, Tensor) and images.ndim == labels.ndim > 1:
        raise InputError(
            f"batch {number} of the loader: expected images as one tensor, or (images, labels), got several tensors"
            f" {list(images.shape)}, {list(labels.shape)}; stack images of one size by torch.stack(batch)"
        )
    return images, labels


def _only(batch: Mapping[Any, Any], names: tuple[str, ...], what: str, number: int) -> Any:
    """The one item of a batch under any of these names; None without labels."""
    found = [name for name in names if name in batch]
    if len(found) == 1 or (not found and what == "labels"):
        return batch[found[0]] if found else None
    came = ", ".join(map(repr, batch))
    raise InputError(
        f"batch {number} of the loader: expected its {what} under exactly one of {', '.join(names)}, got {came}; yield (images,"
        " labels)"
    )


def _checked_labels(labels: Any, count: int, number: int) -> Tensor:
    if labels is None:
        return torch.full((count,), NO_LABEL, dtype=torch.int64, device="cpu")
    try:
        labels = (labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels of batch {number}: expected whole numbers [{count}], one per image, got a {type(labels).__name__} that is no"
            " array of numbers"
        ) from error
    if labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1 and not labels.is_complex():
        raise InputError(
            f"labels of batch {number}: expected whole numbers [{count}], one per image, got {_per_class(labels)}"
        )
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"labels of batch {number}: expected whole numbers [{count}], one per image, got {labels.dtype} {list(labels.shape)}"
        )
    return labels.to(torch.int64)


def _per_class(labels: Tensor) -> str:
    if bool(((labels.double().sum(1) - 1).abs() < 1e-3).all()):
        return f"one-hot or soft labels {list(labels.shape)}; pass labels.argmax(1)"
    return (
        f"multi-hot labels {list(labels.shape)}, where most detectors assume exactly one class per image; choose those that do"
        " not, Engine(model, ['nap']), with a loader of images alone"
    )


def most_samples(loader: Loader) -> int | None:
    """An upper bound on the number of samples of a list of batches or a DataLoader; None for others, and for none at all."""
    if isinstance(loader, (list, tuple)):
        firsts = [batch[0] if isinstance(batch, (list, tuple)) and batch else batch for batch in loader]
        return sum(map(len, firsts)) or None if all(isinstance(one, Tensor) and one.ndim for one in firsts) else None
    # Without a batch size it has a batch sampler of its own; a collate_fn of its own may make several images of one.
    if not isinstance(loader, DataLoader) or loader.batch_size is None or loader.collate_fn is not default_collate:
        return None
    return len(loader.sampler) if isinstance(loader.sampler, Sized) else None


def with_progress(
    loader: Loader, what: str, progress: bool, total: int | None = None, unit: str = "batch"
) -> Iterable[Any]:
    """The loader with a progress bar of rate and remaining time; silent unless standard error is a terminal.

    Raises:
        InputError: `progress` without tqdm installed.
    """
    if not progress:
        return loader
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise InputError("progress=True needs tqdm: pip install 'ood-engine[cli]', or omit progress") from error
    if total is None and isinstance(loader, Sized):
        total = len(loader)
    bar: Iterable[Any] = tqdm(loader, desc=what, total=total, unit=unit, disable=None)
    return bar
