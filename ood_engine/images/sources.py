"""Image sources on disk: a folder or a NumPy file, as names and a function that reads one image."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.lib.npyio import NpzFile
from torch import Tensor

from ..errors import DataError, one_line
from .pages import check_frames, check_tiff
from .preprocess import SIGNED, import_pillow, pillow_pixels

__all__ = [
    "IMAGE_ENDINGS",
    "ImageSource",
    "array_source",
    "ending_counts",
    "files_source",
    "folder_source",
    "is_image",
    "printable",
    "tree_source",
]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Explicit, because Pillow would otherwise go by content and pass a PostScript file named x.png to an interpreter.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


class ImageSource(NamedTuple):
    """Indexed images: `read(index)` returns pixels [H, W] or [H, W, C], and raises if they cannot be read.

    `left_out` counts by ending the files that are no images.
    """

    names: list[str]
    read: Callable[[int], np.ndarray]
    labels: Tensor | None = None
    class_names: list[str] | None = None
    left_out: tuple[tuple[str, int], ...] = ()


def folder_source(root: Path) -> ImageSource:
    """The images of a flat folder, or of one folder per class.

    Raises:
        DataError: a folder of neither kind.
    """
    files, below, left_out = _listing(root)
    filled = [name for name, paths in below.items() if paths]
    if files and filled:
        raise DataError(
            f"{root}: holds image files (such as {printable(files[0].name)}) beside class folders (such as "
            f"{printable(filled[0])}); keep only the files, or only one folder per class"
        )
    if files or not filled:
        return files_source(files, root, left_out)
    if len(filled) < len(below):
        empty = next(name for name, paths in below.items() if not paths)
        raise DataError(f"{root / printable(empty)}: the class folder holds no image; add images to it, or remove it")
    return files_source([path for name in filled for path in below[name]], root, left_out)._replace(
        labels=torch.tensor([label for label, name in enumerate(filled) for _ in below[name]], device="cpu"),
        class_names=[printable(name) for name in filled],
    )


def tree_source(root: Path) -> ImageSource:
    """All images of a folder and of those below it, whatever the folders mean.

    Raises:
        DataError: there is none.
    """
    files, below, left_out = _listing(root)
    return files_source(sorted([*files, *(path for paths in below.values() for path in paths)]), root, left_out)


def files_source(paths: list[Path], root: Path | None, left_out: Counter[str]) -> ImageSource:
    """Image files, named relative to a folder, or as they are.

    Raises:
        DataError: there is none.
    """
    if not paths:
        others = f"; it holds {ending_counts(left_out.items())}" if left_out else ""
        raise DataError(
            f"{root}: holds no image; expected files ending in {' '.join(IMAGE_ENDINGS)}, or one folder per class{others}"
        )
    names = [printable((path.relative_to(root) if root else path).as_posix()) for path in paths]
    return ImageSource(names, partial(_read_file, paths), left_out=tuple(left_out.items()))


def ending_counts(left_out: Iterable[tuple[str, int]]) -> str:
    """The files left out in words, the most frequent ending first."""
    return ", ".join(f"{count} {ending}" for ending, count in sorted(left_out, key=lambda item: (-item[1], item[0])))


def _listing(root: Path) -> tuple[list[Path], dict[str, list[Path]], Counter[str]]:
    """(image files in a folder, folder in it → image files below, ending → number of other files)."""
    left_out: Counter[str] = Counter()
    entries = list(root.iterdir())
    folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    files = sorted(root / entry.name for entry in entries if not entry.is_dir() and is_image(entry.name, left_out))
    # A link to one of these would make the whole folder a class.
    own_parents = {root.resolve(), *root.resolve().parents}
    below = {
        name: _images_below(root / name, left_out) for name in folders if (root / name).resolve() not in own_parents
    }
    return files, below, left_out


def _images_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    paths = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if is_image(name, left_out)]
    return sorted(paths, key=lambda path: path.as_posix())


def is_image(name: str, left_out: Counter[str]) -> bool:
    """Whether a file is an image by its ending; others that are not hidden are counted."""
    if name.startswith("."):
        return False
    if name.lower().endswith(IMAGE_ENDINGS):
        return True
    left_out[printable(Path(name).suffix.lower()) or "without an ending"] += 1
    return False


def _read_file(paths: list[Path], index: int) -> np.ndarray:
    image_module, path = import_pillow(), paths[index]
    if path.exists() and not path.is_file():
        raise DataError("is not a regular file; put the image itself here")
    try:
        check_tiff(path)
        with image_module.open(path, formats=PILLOW_FORMATS) as image:
            check_frames(image)
            limit = image_module.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise DataError(
                    f"{image.height}x{image.width} pixels exceed the limit of {limit} that Pillow considers safe"
                )
            return pillow_pixels(image)
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"not a readable image; expected one of {', '.join(PILLOW_FORMATS)}") from error


def array_source(path: Path, *, labelled: bool = True) -> ImageSource:
    """The images of a `.npy` or `.npz` file, with the labels of the latter if they are wanted.

    Raises:
        DataError: a file without images.
    """
    labels = None
    try:
        if path.suffix.lower() == ".npy":
            images: np.ndarray = open_memmap(path, mode="r")
        else:
            images, labels = _from_archive(path, labelled)
    except DataError:
        raise
    except Exception as error:  # NumPy raises ValueError, EOFError, BadZipFile, zlib.error, … on damaged files
        raise DataError(
            f"{path}: cannot be read as a NumPy file without pickles ({one_line(error)}); "
            "save a plain uint8, uint16 or float array"
        ) from error
    channels_first = _checked_layout(images, path)
    names = [f"{printable(path.name)}[{index}]" for index in range(len(images))]
    label_tensor = None if labels is None else _checked_labels(labels, len(images), path)
    return ImageSource(names, partial(_read_row, images, channels_first), label_tensor)


def _from_archive(path: Path, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
    with open(path, "rb") as file, NpzFile(file, allow_pickle=False) as archive:
        labels = _member(archive, "labels") if labelled and "labels" in archive.files else None
        if "images" in archive.files:
            return _member(archive, "images"), labels
        fitting = []
        for name in archive.files:
            with contextlib.suppress(ValueError):  # object arrays or other files, which cannot be the images
                array = _member(archive, name)
                if array.ndim in (3, 4) and _is_pixels(array.dtype):
                    fitting.append(array)
        if len(fitting) != 1:
            raise DataError(
                f"{path}: holds the arrays {archive.files}, {len(fitting)} of which could be the images; "
                "save the right one, uint8, uint16 or float, as 'images'"
            )
        return fitting[0], labels


def _member(archive: NpzFile, name: str) -> np.ndarray:
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name!r} is not an array")
    return array


def _is_pixels(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2)


def _checked_layout(images: np.ndarray, path: Path) -> bool:
    """Whether the channels come before height and width; raises DataError if the array is not a stack of images."""
    if not _is_pixels(images.dtype):
        raise DataError(
            f"{path}: images of dtype {images.dtype}, whose range is not known{SIGNED if images.dtype.kind == 'i' else ''}; save"
            " them as uint8, uint16, or as float in [0, 1]"
        )
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: images of shape {list(images.shape)}; save [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if images.size == 0:
        raise DataError(f"{path}: images of shape {list(images.shape)} are empty; save at least one image")
    if images.ndim == 3:
        return False
    first, last = (images.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        problem = "are ambiguous" if first else "have neither 1 nor 3 channels (of more bands, keep those of the model)"
        raise DataError(
            f"{path}: images of shape {list(images.shape)} {problem}; save [N, H, W], or [N, H, W, C] or [N, C, H, W] "
            "with C = 1 or 3 and other heights and widths"
        )
    return first


def _checked_labels(labels: np.ndarray, count: int, path: Path) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{path}: labels of dtype {labels.dtype} and shape {list(labels.shape)}; save integers of shape [{count}]"
        )
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise DataError(f"{path}: the smallest label is {labels.min()}; labels count classes from 0")
    return torch.from_numpy(labels)


def _read_row(images: np.ndarray, channels_first: bool, index: int) -> np.ndarray:
    image = np.asarray(images[index])
    return image.transpose(1, 2, 0) if channels_first else image


def printable(name: str) -> str:
    """The name as encodable text, whatever bytes the file system returns."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
