"""The libraries that are measured beside this one, imported only when a benchmark asks for them.

pytorch-ood and oodeel come at pinned versions with the extra `[peers]`. oodeel 0.4.0 asks for NumPy below 2 and imports faiss,
which it does not ask for; it runs with NumPy 2 as well, so the benchmarks' own set-up installs both with --no-deps
(constraints/peers.txt). Looked at and left out: torch-uncertainty 0.13, which of these methods has energy, MSP and maximum logit
alone, of logits, and needs Lightning; frouros 0.9, which detects drift of data sets. OpenOOD is not on the package index.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import torch

from .cases import MissingProviderError

__all__ = ["OODEEL", "PYTORCH_OOD", "import_beside_torch", "import_peer"]

PYTORCH_OOD = "pytorch-ood"
OODEEL = "oodeel"

# oodeel's data handler is only imported when a detector is fitted, and refers to libraries of its own.
_MODULES = {
    PYTORCH_OOD: ("pytorch_ood", "pytorch_ood.detector", "pytorch_ood.metrics.functional"),
    OODEEL: ("oodeel", "oodeel.methods", "oodeel.eval.metrics", "oodeel.datasets.torch_data_handler"),
}
_EXTRA = "pip install 'ood-engine[peers]'"
_INSTALL = {
    PYTORCH_OOD: _EXTRA,
    # The extra leaves it out where there is no NumPy below 2.
    OODEEL: _EXTRA if sys.version_info < (3, 13) else f"{_EXTRA} && pip install --no-deps oodeel==0.4.0",
}
_OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_declared: list[torch.library.Library] = []


def import_peer(name: str) -> ModuleType:
    """The top module of `PYTORCH_OOD` or `OODEEL`, with the parts that the benchmarks use imported.

    Raises:
        MissingProviderError: it, or a library that it imports, is not installed or does not import here.
    """
    try:
        import_beside_torch("torchvision")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules = [importlib.import_module(module) for module in _MODULES[name]]
    except ModuleNotFoundError as error:
        raise MissingProviderError(name, f"{error.name} is not installed: {_INSTALL[name]}") from error
    except Exception as error:
        reason = (str(error).strip() or "without a message").splitlines()[0]
        raise MissingProviderError(
            name, f"does not import ({type(error).__name__}: {reason}); its own versions: {_INSTALL[name]}"
        ) from error
    return modules[0]


def import_beside_torch(name: str) -> ModuleType:
    """Import torchvision, or a library that imports it, beside a torch of another build.

    torchvision's C++ operators are missing there, and its own import ends where it refers to them. No classifier runs them, so
    that their names are declared is enough.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (RuntimeError, AttributeError, OSError):
            if not _declared:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in (*_OPERATORS, *(f"_{known}_backward" for known in _OPERATORS)):
                    library.define(f"{operator}(Tensor x) -> Tensor")
                _declared.append(library)
            return importlib.import_module(name)
