"""Unpacking and validation of loader batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .cache import NO_LABEL

__all__ = ["Loader", "image_batches", "with_progress"]

Loader = Iterable[Any]
"""Yields images [n, C, H, W], (images,), or (images, labels [n])."""


def image_batches(loader: Loader, what: str, progress: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, int64 labels) of every non-empty batch; labels are `NO_LABEL` if missing.

    Raises:
        InputError: a batch of another kind, or labels that are not one integer per image.
    """
    for number, batch in enumerate(with_progress(loader, what, progress)):
        images, labels = (
            (*batch, None)[:2] if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) else (batch, None)
        )
        if not isinstance(images, Tensor):
            raise InputError(
                f"batch {number} of the loader: expected images as a tensor, or (images, labels), got {type(batch).__name__}"
            )
        if images.shape[:1] == (0,):
            continue
        yield images, _checked_labels(labels, images.shape[0], number)


def _checked_labels(labels: Any, count: int, number: int) -> Tensor:
    if labels is None:
        return torch.full((count,), NO_LABEL, dtype=torch.int64)
    try:
        labels = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels of batch {number}: expected whole numbers [{count}], one per image, got a {type(labels).__name__} that is no"
            " array of numbers"
        ) from error
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"labels of batch {number}: expected whole numbers [{count}], one per image, got {labels.dtype} {list(labels.shape)}"
        )
    return labels.to(torch.int64)


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
