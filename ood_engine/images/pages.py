"""What a file holds beside one gray or RGB image: pages, frames and bands, of which Pillow would take the first in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

__all__ = ["check_frames", "check_tiff"]

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUBFILE, WIDTHS, PHOTOMETRIC, BANDS, EXTRA_BANDS, FORMATS = 254, 258, 262, 277, 338, 339
NOT_A_PAGE = 1 | 4
"""Bits of NewSubfileType: a reduced copy of another page, and a mask."""
COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
"""Photometric interpretation → bands of colour, where not 1: RGB, CMYK, YCbCr, Lab."""
ALPHA = (1, 2)
NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}


def check_tiff(path: Path) -> None:
    """Refuse a TIFF file of several pages, or of other bands than gray, RGB or CMYK with alpha; other files pass.

    Raises:
        DataError: such a file.
        Exception: whatever Pillow raises on damaged data.
    """
    with path.open("rb") as file:
        if file.read(4) in TIFF_STARTS:
            pages = _pages(file)
            if len(pages) > 1:
                raise DataError(
                    f"a TIFF of {len(pages)} pages, and one score cannot be that of all; save each as a file"
                )
            if pages:
                _check_bands(pages[0])


def check_frames(image: Any) -> None:
    """Refuse an animation. A JPEG may hold a preview or a depth map behind the image, which is none.

    Raises:
        DataError: a GIF, PNG or WebP image of several frames.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ("GIF", "PNG", "WEBP"):
        raise DataError(f"an animation of {frames} frames, and one score cannot be that of all; save each as a file")


def _pages(file: BinaryIO) -> list[Any]:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file.seek(0)
    header = file.read(8)
    directory = ImageFileDirectory_v2(header + (file.read(8) if header[2:3] == b"+" or header[3:4] == b"+" else b""))
    pages, seen = [], {0}
    while directory.next not in seen:
        seen.add(directory.next)
        file.seek(directory.next)
        directory.load(file)
        if not directory.get(SUBFILE, 0) & NOT_A_PAGE:
            pages.append(dict(directory))
    return pages


def _check_bands(page: dict[int, Any]) -> None:
    bands, kind = page.get(BANDS, 1), page.get(PHOTOMETRIC, 1)
    alpha = sum(extra in ALPHA for extra in page.get(EXTRA_BANDS, ()))
    bits, number = page.get(WIDTHS, (1,))[0], page.get(FORMATS, (1,))[0]
    if bands - alpha != COLOURS.get(kind, 1) or bits > 32:
        raise DataError(
            f"a TIFF of {bands} {'band' if bands == 1 else 'bands'} of {bits}-bit {NUMBERS.get(number, 'numbers')}; expected"
            " 1 (gray) or 3 (RGB), and alpha, of at most 32 bits: save those that the model takes"
        )
