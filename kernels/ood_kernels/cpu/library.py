"""C++ functions from a shared library, compiled once per machine and cached.

The cache folder is `OOD_ENGINE_CACHE`, or else `ood-engine` in XDG_CACHE_HOME or `~/.cache`. Cached code runs as the user, so a
folder accessible to others is rejected. A file name holds a key of the library's inputs and a digest of its bytes: a damaged
file is recompiled, an intact one is loaded without starting the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

if sys.platform != "win32":
    import fcntl

__all__ = ["load"]

_OPTIONS = ("-std=c++17", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC")
_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FIELDS = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
    *("cpu", "isa", "uarch"),
}
_SCRATCH = "compiling-"
_lock_files: list[TextIO] = []
_log = logging.getLogger("ood_kernels")


def load(source: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """Functions of a C++ file by name, compiled on first use on this machine.

    Args:
        source: C++ file.
        names: exported functions.

    Returns:
        Function by name. None on Windows, under `OOD_ENGINE_COMPILE=0`, and, with the reason logged to `ood_kernels`, without a
        compiler (`CXX`, else c++), a writable cache, or a cache private to the user.
    """
    if sys.platform == "win32" or os.environ.get("OOD_ENGINE_COMPILE") == "0":
        return None
    try:
        library = _library(source)
        return {name: getattr(library, name) for name in names}
    except (OSError, ValueError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        _log.warning(
            "%s is unavailable, falling back to slower plain torch: %s; or set OOD_ENGINE_COMPILE=0 to silence this warning",
            source.name,
            _reason(error),
        )
        return None


def _library(source: Path) -> ctypes.CDLL:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    folder = _private_folder()
    stem = f"{source.stem}-{_key(source, command)}"
    library = _cached(folder, stem)
    if library is None:
        with _locked(folder) as is_alone:
            if is_alone:
                _remove_remains(folder)
            library = _cached(folder, stem) or _compiled(source, command, folder, stem)
    return library


def _private_folder() -> Path:
    """The cache folder, created if missing.

    Raises:
        PermissionError: accessible to others, or owned by another user.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    chosen = os.environ.get("OOD_ENGINE_CACHE")
    folder = (
        Path(chosen).absolute() if chosen else (base if base.is_absolute() else Path.home() / ".cache") / "ood-engine"
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or mode & 0o077:
        raise PermissionError(
            f"cache {folder}: expected mode 0700 and owner {os.geteuid()}, found {mode:04o} and {status.st_uid}; set"
            " OOD_ENGINE_CACHE to a private folder"
        )
    return folder


def _key(source: Path, command: Sequence[str]) -> str:
    """Hash of source, compiler, options and CPU; compiler file stats replace its version, which would take a process to query."""
    if not shutil.which(command[0]):
        raise FileNotFoundError(f"no C++ compiler: expected a command in CXX, or c++ in PATH, found no {command[0]!r}")
    programs = [(os.path.realpath(program), os.stat(program)) for program in map(shutil.which, command) if program]
    compiler = [(path, status.st_size, status.st_mtime_ns) for path, status in programs]
    parts = (source.read_bytes(), tuple(command), compiler, _OPTIONS, _cpu())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cpu() -> list[str]:
    """The first processor's inputs to `-march=native`; without /proc/cpuinfo, the system's name and version."""
    with suppress(OSError), _CPU_INFO.open() as lines:
        processor = itertools.takewhile(str.strip, lines)
        if found := [line for line in processor if line.partition(":")[0].strip() in _CPU_FIELDS]:
            return found
    return list(os.uname())


def _cached(folder: Path, stem: str) -> ctypes.CDLL | None:
    """An intact library of that key; the digest is verified first, since loading a damaged file can crash the process."""
    for file in folder.glob(f"{stem}-*.so"):
        with suppress(OSError):
            if file.stem == f"{stem}-{_digest(file)}":
                return ctypes.CDLL(str(file))
    return None


def _compiled(source: Path, command: Sequence[str], folder: Path, stem: str) -> ctypes.CDLL:
    """Compile into a temporary folder inside the cache, then rename atomically."""
    # No TemporaryDirectory, which a child forked meanwhile would remove at its own exit.
    scratch = tempfile.mkdtemp(prefix=_SCRATCH, dir=folder)
    try:
        made = Path(scratch) / "library.so"
        arguments = [*command, *_OPTIONS, "-o", str(made), str(source)]
        subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60)
        file = folder / f"{stem}-{_digest(made)}.so"
        _sync(made)
        os.replace(made, file)
        _sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ctypes.CDLL(str(file))


def _remove_remains(folder: Path) -> None:
    """Remove what killed compilations left, while no other runs."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write a file or folder through to the disk, where system and file system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Exclusive file lock, so that concurrent processes compile once; False on file systems without locks."""
    with (folder / "lock").open("a") as file:
        is_alone = False
        _lock_files.append(file)
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                is_alone = True
            yield is_alone
        finally:
            _lock_files.remove(file)
            with suppress(OSError):
                # Closing alone would leave it locked by children forked meanwhile.
                fcntl.flock(file, fcntl.LOCK_UN)


def _close_inherited() -> None:
    """Close the lock files of threads that a forked child does not have."""
    while _lock_files:
        _lock_files.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _reason(error: Exception) -> str:
    """The error as one line."""
    text = str(error)
    if isinstance(error, subprocess.CalledProcessError):
        text = f"{error.cmd[0]} failed: " + (error.stderr.strip() or f"exit status {error.returncode}")
    return text.partition("\n")[0]
