"""`ood-engine detectors`: every detector, in a sentence, with its settings."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..detectors import available_detectors, default_settings, summary
from .common import echo_json, json_option

__all__ = ["detectors"]


@click.command()
@json_option
def detectors(as_json: bool) -> None:
    """List every detector: its score, in a sentence, and its settings with their defaults.

    \b
    Examples:
      ood-engine detectors
      ood-engine detectors --json
    """
    known = {name: (summary(name), default_settings(name)) for name in available_detectors()}
    if as_json:
        echo_json({name: {"summary": text, "settings": settings} for name, (text, settings) in known.items()})
        return
    table = Table(Column("detector", no_wrap=True), "score", "settings", show_lines=True)
    for name, (text, settings) in known.items():
        table.add_row(name, Text(text), Text("\n".join(f"{key}={value!r}" for key, value in settings.items())))
    Console().print(table)
