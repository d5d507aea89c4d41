"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OodEngineError, one_line

if sys.platform != "win32":
    import fcntl

__all__ = ["RUN_BY_SPREADSHEETS", "TEMPORARY", "atomic_file", "write_atomically"]

RUN_BY_SPREADSHEETS = r"\A([=+\-@\t\r\n＝＋－＠])"
"""The first character of a CSV cell that spreadsheets take for a formula, or skip before one."""
TEMPORARY = ".tmp"
"""Ending of an unfinished file; those of killed processes are removed by the next that writes the same path."""
_HEX = "[0-9a-f]" * 8


@contextlib.contextmanager
def atomic_file(path: Path, folder: Path | None = None, *, exclusive: bool = False) -> Iterator[BinaryIO]:
    """A binary file to fill; on exit it is flushed to the disk and takes the name `path`, on an error nothing of it stays.

    Missing folders are made. The file has the permissions of any new file, and an older one is replaced.

    Args:
        path: of the finished file.
        folder: where the unfinished file lies, on the same file system; None takes the folder of `path`.
        exclusive: the file must be new, and nobody else may be writing it.

    Raises:
        FileExistsError: `exclusive`, and there is such a file, finished or not.
        OSError: the path cannot be written, or the disk is full.
    """
    folder = path.parent if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    file: BinaryIO
    if exclusive:
        # Of two exclusive writers the later finds either the unfinished file, whose name they share, or the finished one.
        temporary = folder / f".{path.name}{TEMPORARY}"
        file = temporary.open("xb")
    else:
        _remove_unowned(folder, path.name)
        file = _new_file(folder, path.name)
        temporary = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive and path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write the file at its path, whole or not at all; missing folders are made, an older file is replaced.

    Raises:
        OodEngineError: the path cannot be written, or the disk is full.
    """
    target = Path(path)
    try:
        with atomic_file(target) as file:
            file.write(content)
    except OSError as error:
        raise OodEngineError(
            f"cannot write {str(target)!r} ({error.strerror or one_line(error)}), expected a writable file path with free"
            " space; choose another path"
        ) from error
    return target


def _new_file(folder: Path, name: str) -> BinaryIO:
    """A new file, locked for as long as its process lives and writes."""
    while True:
        file = (folder / f".{name}.{secrets.token_hex(4)}{TEMPORARY}").open("xb")
        with contextlib.suppress(OSError):
            _lock(file)
        # Another process may have removed it before it was locked.
        if sys.platform == "win32" or os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _remove_unowned(folder: Path, name: str) -> None:
    """Remove unfinished files that no process holds, where the file system has locks."""
    if sys.platform == "win32":
        return
    for leftover in folder.glob(f".{glob.escape(name)}.{_HEX}{TEMPORARY}"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            _lock(file, wait=False)
            leftover.unlink()


def _lock(file: BinaryIO, *, wait: bool = True) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where system and file system let folders be synced."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
