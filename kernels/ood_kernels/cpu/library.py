"""C++ functions from a shared library that is compiled once a machine and kept in a cache.

`OOD_ENGINE_CACHE` names the folder, else it is `ood-engine` in XDG_CACHE_HOME or `~/.cache`. What is loaded from it runs as the
user, so a folder that anybody else can enter is not used. A file's name holds a key of all that the library depends on and a
digest of its bytes: a damaged one is compiled again, and an intact one is loaded without starting the compiler.
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
from typing import Any

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
_log = logging.getLogger("ood_kernels")


def load(source: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """The functions of these names from a C++ file, compiled if this machine has not done so before.

    None on Windows, under `OOD_ENGINE_COMPILE=0`, and, with the reason in the log `ood_kernels`, where the file cannot be
    compiled or kept: no compiler (`CXX`, else c++), no cache to write to, or a cache that is not the user's alone.
    """
    if sys.platform == "win32" or os.environ.get("OOD_ENGINE_COMPILE") == "0":
        return None
    try:
        library = _library(source)
        return {name: getattr(library, name) for name in names}
    except (OSError, ValueError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        _log.warning(
            "%s is not in use, plain torch does its work, slower: %s; or set OOD_ENGINE_COMPILE=0 to accept this",
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
        with _locked(folder):
            library = _cached(folder, stem) or _compiled(source, command, folder, stem)
    return library


def _private_folder() -> Path:
    """The cache, made where it is missing.

    Raises:
        PermissionError: others may write to it or read from it, or it is another user's.
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
            f"cache {folder}: expected mode 0700 and owner {os.geteuid()}, found {mode:04o} and {status.st_uid}; name a folder of"
            " your own in OOD_ENGINE_CACHE"
        )
    return folder


def _key(source: Path, command: Sequence[str]) -> str:
    """Hash of source, compiler, options and CPU; a compiler's file stands for its version, since asking starts a process."""
    if not shutil.which(command[0]):
        raise FileNotFoundError(f"no C++ compiler: expected a command in CXX, or c++ in PATH, found no {command[0]!r}")
    programs = [(os.path.realpath(program), os.stat(program)) for program in map(shutil.which, command) if program]
    compiler = [(path, status.st_size, status.st_mtime_ns) for path, status in programs]
    parts = (source.read_bytes(), tuple(command), compiler, _OPTIONS, _cpu())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cpu() -> list[str]:
    """What `-march=native` looks at, of the first processor; where the system does not say, its own name and version."""
    with suppress(OSError), _CPU_INFO.open() as lines:
        processor = itertools.takewhile(str.strip, lines)
        if found := [line for line in processor if line.partition(":")[0].strip() in _CPU_FIELDS]:
            return found
    return list(os.uname())


def _cached(folder: Path, stem: str) -> ctypes.CDLL | None:
    """An intact library of that key; its bytes are read first, since loading damaged ones may end the process."""
    for file in folder.glob(f"{stem}-*.so"):
        with suppress(OSError):
            if file.stem == f"{stem}-{_digest(file)}":
                return ctypes.CDLL(str(file))
    return None


def _compiled(source: Path, command: Sequence[str], folder: Path, stem: str) -> ctypes.CDLL:
    """Compile beside the cached libraries and rename, so that no process finds half a file."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "library.so"
        arguments = [*command, *_OPTIONS, "-o", str(made), str(source)]
        subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60)
        file = folder / f"{stem}-{_digest(made)}.so"
        os.replace(made, file)
    return ctypes.CDLL(str(file))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, so that those which start together compile once; not every file system has locks."""
    with (folder / "lock").open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: Exception) -> str:
    """The error in one line."""
    text = str(error)
    if isinstance(error, subprocess.CalledProcessError):
        text = f"{error.cmd[0]} failed: " + (error.stderr.strip() or f"exit status {error.returncode}")
    return text.partition("\n")[0]
