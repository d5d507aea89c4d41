"""Images to score, chosen by a path, a pattern, a list or standard input; their classes mean nothing."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from pathlib import Path

from ..errors import DataError
from .sources import IMAGE_ENDINGS, ImageSource, array_source, files_source, is_image, printable, tree_source

__all__ = ["ARRAY_ENDINGS", "select_images"]

ARRAY_ENDINGS = (".npy", ".npz")
LIST_ENDINGS = (".txt", ".list")
STANDARD_INPUT = "-"
EXPECTED = (
    "an image, a folder of images at any depth, a pattern in quotes such as 'photos/**/*.png', a .npy or .npz file, a list of"
    f" paths ({', '.join(LIST_ENDINGS)}), or - for a list on standard input"
)


def select_images(data: str) -> ImageSource:
    """The images that `data` names, see `open_images`.

    Raises:
        DataError: nothing there, or no image.
        OSError: it cannot be read.
    """
    path, ending = Path(data), Path(data).suffix.lower()
    if data == STANDARD_INPUT:
        return _listed(sys.stdin.buffer.read(), Path(), "standard input")
    if path.is_dir():
        return tree_source(path)
    if path.is_file() and ending in ARRAY_ENDINGS:
        return array_source(path, labelled=False)
    if path.is_file() and ending in LIST_ENDINGS:
        return _listed(path.read_bytes(), path.parent, data)
    if path.is_file() and ending in IMAGE_ENDINGS:
        return files_source([path], path.parent, Counter())
    if path.exists():
        raise DataError(f"{data}: is a file ending in {ending!r}; expected {EXPECTED}")
    if any(sign in data for sign in "*?["):
        return _matched(data)
    raise DataError(f"{data}: does not exist; expected {EXPECTED}")


def _listed(content: bytes, folder: Path, what: str) -> ImageSource:
    """The paths of a list, one a line, as they are written there."""
    lines = [os.fsdecode(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise DataError(f"{what}: lists no image; expected one path a line")
    source = files_source([folder / name for name in names], None, Counter())
    return source._replace(names=[printable(name) for name in names])


def _matched(pattern: str) -> ImageSource:
    left_out: Counter[str] = Counter()
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(name)]
    images = [file for file in files if is_image(file.name, left_out)]
    if not images:
        raise DataError(f"{pattern}: matches no image; expected files ending in {' '.join(IMAGE_ENDINGS)}")
    return files_source(images, None, left_out)
