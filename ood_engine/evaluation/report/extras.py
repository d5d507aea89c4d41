"""Import of the optional packages of the reports."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import OodEngineError

__all__ = ["require"]


def require(module: str) -> Any:
    """Import a module of the optional extra `cli`.

    Raises:
        OodEngineError: the import fails; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OodEngineError(
            f"reports need the package {module.partition('.')[0]!r}, which cannot be imported ({error}); "
            "pip install 'ood-engine[cli]'"
        ) from error
