"""The command line `ood-engine`; its dependencies come with `pip install 'ood-engine[cli]'`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

EXTRA = ("click", "pyarrow", "rich", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    try:
        from .application import run

        return run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(f"ood-engine: the command line needs {error.name}: pip install 'ood-engine[cli]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ood-engine: stopped; nothing was written", file=sys.stderr)
        return 130
