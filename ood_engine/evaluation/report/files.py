"""Whole files or none, and the optional packages that a report is made with."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from pathlib import Path
from typing import Any

from ...errors import OodEngineError

__all__ = ["require", "write_atomically"]


def require(module: str) -> Any:
    """Import a module of the optional extra `cli`.

    Raises:
        OodEngineError: It cannot be imported; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OodEngineError(
            f"reports need the package {module.partition('.')[0]!r}, which cannot be imported ({error}); "
            "pip install 'ood-engine[cli]'"
        ) from error


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write the file at its path, all of it or nothing; missing folders are made, an older file is replaced.

    Raises:
        OodEngineError: The path cannot be written, or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OodEngineError(
            f"cannot write {str(target)!r} ({error.strerror}), expected a writable file path with free space; "
            "choose another path"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target
