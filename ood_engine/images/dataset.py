"""Image datasets on disk: a folder, a `.npy` or a `.npz` file as indexed samples of float32 [C, H, W].

An unreadable image is a sample with an error message, never an exception, so that one broken file does not end a run.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import DataError, InputError, OodEngineError, OodEngineWarning, one_line
from .preprocess import Preprocess, import_pillow
from .selection import ARRAY_ENDINGS, select_images
from .sources import IMAGE_ENDINGS, ImageSource, array_source, ending_counts, folder_source

__all__ = [
    "IMAGE_ENDINGS",
    "Batch",
    "ImageDataset",
    "ImageLoader",
    "Preprocess",
    "Sample",
    "open_dataset",
    "open_images",
]

PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class Sample:
    """One sample of a dataset.

    Attributes:
        index: position in the dataset.
        name: path relative to the folder, or `file.npy[17]`.
        image: float32 [C, H, W]; None if unreadable.
        label: class number; None without labels.
        error: one line with the reason why `image` is None; else None.
    """

    index: int
    name: str
    image: Tensor | None
    label: int | None
    error: str | None


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a dataset.

    Attributes:
        indices: [n] positions in the dataset.
        names: [n] names of the samples.
        images: float32 [g, C, H, W], the g readable images; None if g = 0.
        good: [g] positions of the readable images in the batch, in order.
        errors: position of each unreadable image in the batch → one line with the reason.
        labels: int64 [n]; None without labels.
    """

    indices: list[int]
    names: list[str]
    images: Tensor | None
    good: list[int]
    errors: dict[int, str]
    labels: Tensor | None


class ImageDataset:
    """Indexed images, made by `open_dataset`; without resizing, all must have the size of the first readable one.

    Attributes:
        names: paths relative to the folder (with `/`), or `file.npy[17]`.
        labels: int64 [N]; None without labels.
        class_names: names of the class folders; None without them.
        left_out: ending → number of files there that are no images.
        preprocess: the preprocessing applied to each image.
    """

    def __init__(self, source: ImageSource, preprocess: Preprocess) -> None:
        self.names = source.names
        self.labels = source.labels
        self.class_names = source.class_names
        self.left_out = dict(source.left_out)
        self.preprocess = preprocess
        self._read = source.read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            IndexError: an index out of range; nothing else raises.
        """
        index = range(len(self))[index]
        image, error = self._image_or_error(index)
        if image is not None and image.shape != self._first_shape:
            expected = "x".join(str(n) for n in self._first_shape[1:])
            came = "x".join(str(n) for n in image.shape[1:])
            image, error = None, f"height x width is {came}, the first image has {expected}; give a size to resize to"
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, self.names[index], image, label, error)

    def subset(self, indices: list[int]) -> ImageDataset:
        """A dataset of the samples at the given indices, in the given order."""
        labels = None if self.labels is None else self.labels[indices]
        names = [self.names[index] for index in indices]
        source = ImageSource(names, lambda position: self._read(indices[position]), labels, self.class_names)
        return ImageDataset(source, self.preprocess)

    def batches(self, batch_size: int, start: int = 0, workers: int = 4) -> Iterator[Batch]:
        """Iterate over the samples from `start` on in batches, prefetched by `workers` threads.

        Args:
            batch_size: samples per batch; the last batch may be smaller.
            start: first sample; batches are counted from it.
            workers: number of decoding threads.

        Raises:
            InputError: a batch size or number of workers below 1, or a start outside [0, N].
        """
        _check_count("batch_size", batch_size, 1)
        _check_count("workers", workers, 1)
        _check_count("start", start, 0, len(self))
        return self._batches(batch_size, start, workers)

    def loader(self, batch_size: int, workers: int = 4) -> ImageLoader:
        """A loader of the readable images, for fitting and calibration."""
        _check_count("batch_size", batch_size, 1)
        _check_count("workers", workers, 1)
        return ImageLoader(self, batch_size, workers)

    def _batches(self, batch_size: int, start: int, workers: int) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="ood-engine-images")
        waiting: deque[list[Future[Sample]]] = deque()
        try:
            for first in range(start, len(self), batch_size):
                indices = range(first, min(first + batch_size, len(self)))
                waiting.append([pool.submit(self.__getitem__, index) for index in indices])
                if len(waiting) > PREFETCHED_BATCHES:
                    yield self._batch(waiting.popleft())
            while waiting:
                yield self._batch(waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, futures: list[Future[Sample]]) -> Batch:
        samples = [future.result() for future in futures]
        images = {position: s.image for position, s in enumerate(samples) if s.image is not None}
        indices = [sample.index for sample in samples]
        return Batch(
            indices=indices,
            names=[sample.name for sample in samples],
            images=torch.stack(list(images.values())) if images else None,
            good=list(images),
            errors={position: s.error for position, s in enumerate(samples) if s.error is not None},
            labels=None if self.labels is None else self.labels[indices],
        )

    @cached_property
    def _first_shape(self) -> torch.Size:
        if self.preprocess.size is not None:
            return torch.Size((self.preprocess.channels, *self.preprocess.size))
        images = (self._image_or_error(index)[0] for index in range(len(self)))
        return next(image.shape for image in images if image is not None)

    def _image_or_error(self, index: int) -> tuple[Tensor | None, str | None]:
        try:
            return self.preprocess(self._read(index)), None
        except OodEngineError as error:
            return None, one_line(error)
        except FileNotFoundError:
            return None, "the file does not exist; was it moved, or is it a broken link?"
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, … on damaged files
            return None, f"cannot be read as an image ({one_line(error, with_type=True)})"


class ImageLoader:
    """Iterable over the readable images: yields images [n, C, H, W], or (images, labels [n]) if the dataset has labels.

    Its length is an upper bound of the number of batches.

    Attributes:
        dataset: the dataset.
        batch_size: images per batch, at most.
        workers: number of decoding threads.
        skipped: (name, error) of each image skipped so far in the latest pass.

    Raises:
        DataError: a pass that yields no image at all.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, workers: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        self.skipped = []
        for batch in self.dataset.batches(self.batch_size, workers=self.workers):
            self.skipped += [(batch.names[position], error) for position, error in batch.errors.items()]
            if batch.images is not None:
                yield batch.images if batch.labels is None else (batch.images, batch.labels[batch.good])
        if len(self.skipped) == len(self.dataset):
            name, error = self.skipped[0]
            raise DataError(f"none of the {len(self.dataset)} images can be used; the first, {name}: {error}")


def open_dataset(path: str | Path, preprocess: Preprocess) -> ImageDataset:
    """Open the images at `path`, with their labels if there are any.

    - A folder of image files (`IMAGE_ENDINGS`, case-insensitive): no labels. Other files are left out, with a warning that counts
      them; hidden ones are ignored.
    - A folder with one folder per class: class folders are numbered in sorted order; files may be nested at any depth. A class
      folder may be a link; links to folders below it are not followed.
    - `.npy`: [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, uint8, uint16 or float, memory-mapped.
    - `.npz`: such an array named `images`, or the only suitable one, and integers `labels` [N] if present.

    EXIF orientation is not applied. Nothing is unpickled. Single images that cannot be read, or that hold several pages, frames or
    other bands, appear later, as samples with an error.

    Args:
        path: a folder, a `.npy` or a `.npz` file.
        preprocess: preprocessing of each image.

    Raises:
        DataError: nothing at `path`, nothing suitable, or an ambiguous choice.
        OodEngineError: Pillow is needed and not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _opened(path, folder_source, preprocess)
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a folder of images, a .npy or a .npz file")
    if path.suffix.lower() not in ARRAY_ENDINGS:
        raise DataError(f"{path}: is a file ending in {path.suffix!r}; give a folder of images, a .npy or a .npz file")
    return _opened(path, array_source, preprocess)


def open_images(data: str, preprocess: Preprocess) -> ImageDataset:
    """Open images without labels, from wherever they are.

    - A folder: its images and those of all folders below, as one set; links are followed as in `open_dataset`.
    - An image file; a `.npy` or `.npz` file as in `open_dataset`, without labels.
    - A pattern such as `photos/**/*.png`, where `**` is any depth; other files that it matches are left out.
    - A `.txt` or `.list` file with one path a line, relative to the folder of that file; `-` reads such a list from standard
      input, relative to the working directory. Every path of a list is a sample, with an error if there is no image.

    Args:
        data: one of these.
        preprocess: preprocessing of each image.

    Raises:
        DataError: nothing there, no image, or an ambiguous array.
        OodEngineError: Pillow is needed and not installed.
    """
    return _opened(data, select_images, preprocess)


Place = TypeVar("Place", str, Path)


def _opened(place: Place, source_of: Callable[[Place], ImageSource], preprocess: Preprocess) -> ImageDataset:
    if preprocess.size is not None or Path(place).suffix.lower() not in ARRAY_ENDINGS:
        import_pillow()
    try:
        source = source_of(place)
    except OSError as error:
        raise DataError(
            f"{place}: cannot be read ({error.strerror or one_line(error)}); check the path and its access"
        ) from error
    if source.left_out:
        warnings.warn(
            f"{place}: files left out, as their ending is not that of an image: {ending_counts(source.left_out)}",
            OodEngineWarning,
            stacklevel=3,
        )
    return ImageDataset(source, preprocess)


def _check_count(name: str, value: int, low: int, high: float = math.inf) -> None:
    if type(value) is not int or not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise InputError(f"{name} = {value!r}: expected an integer {wanted}")
