"""Detectors, one file per paper. All modules here are imported: a file with `@register("name")` adds a detector."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Detector, available_detectors, changed_settings, create_detector, default_settings, register, summary

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Detector",
    "available_detectors",
    "changed_settings",
    "create_detector",
    "default_settings",
    "register",
    "summary",
]
