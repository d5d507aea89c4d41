"""A file that one process holds at a time, and that names it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from ..errors import InputError

__all__ = ["Lock"]


class Lock:
    """Holds a lock file until `release`; the file names the host and the process.

    The kernel frees the lock of a process that ends, however it ends, so a file left on this host is taken over. The process of
    another host cannot be looked up, nor can any on a file system without locks: their file has to be deleted by hand.

    Args:
        path: of the lock file, in a folder that exists.
        what: what it guards, the subject of the messages.

    Raises:
        InputError: another process holds it, or may do so.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._handle = _take(path, what)
        self._is_held = True

    def release(self) -> None:
        """Remove the file, then free the lock."""
        if self._is_held:
            self._is_held = False
            self.path.unlink(missing_ok=True)
            if self._handle is not None:
                os.close(self._handle)


def _take(path: Path, what: str) -> int | None:
    """The descriptor that holds the kernel's lock; None where there are no locks."""
    while True:
        handle, is_new = _open(path)
        try:
            locked = _kernel_lock(handle)
            if locked and not _is_at(handle, path):  # released, and so deleted, since it was opened
                os.close(handle)
                continue
            host, process = _owner(handle)
            if locked is False:
                raise InputError(
                    f"{what}: process {process} on host {host!r} is writing it; wait for it, stop it, or give another name"
                )
            if not is_new and not (locked and host in ("", socket.gethostname())):
                raise InputError(
                    f"{what}: process {process} on host {host!r} was writing it, and cannot be looked up from here; if it has"
                    f" ended, delete {path} and repeat the command"
                )
            _name_this_process(handle, path)
        except BaseException:
            os.close(handle)
            raise
        if locked is None:
            os.close(handle)
        return handle if locked else None


def _name_this_process(handle: int, path: Path) -> None:
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
    except OSError:
        path.unlink()
        raise


def _open(path: Path) -> tuple[int, bool]:
    """(file descriptor, whether this call made the file)."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                return os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # deleted between the two calls
                continue


def _kernel_lock(handle: int) -> bool | None:
    """Whether this process got the lock; None if there are no locks here."""
    try:
        import fcntl  # of POSIX systems alone

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> tuple[str, str]:
    """(host, process) named in the file; empty while it is being written."""
    try:
        owner = json.loads(os.read(handle, 4096))
        return str(owner["host"]), str(owner["process"])
    except (ValueError, KeyError, TypeError):
        return "", "?"
