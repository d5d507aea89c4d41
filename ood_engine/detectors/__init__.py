"""One file a paper. Every module here is imported, so a new file with `@register("name")` is a new detector."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Detector, available_detectors, changed_settings, create_detector, default_settings, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Detector", "available_detectors", "changed_settings", "create_detector", "default_settings", "register"]
