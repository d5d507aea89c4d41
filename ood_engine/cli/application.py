"""The group of commands, and how every command ends: an exit code, and one line where something is wrong."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import click
import torch

from ..errors import OodEngineError, OodEngineWarning
from ..version import __version__
from .bench import bench
from .common import Interrupted
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .fit import fit
from .inspect import inspect
from .score import score

__all__ = ["application", "run"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="ood-engine")
@click.pass_context
def application(context: click.Context) -> None:
    """Out-of-distribution scores for a PyTorch classifier, from its last feature map and its last layer.

    Scores: HIGHER = MORE IN-DISTRIBUTION.

    \b
    ood-engine demo                     trains a small classifier, fits all detectors, writes a report
    ood-engine fit --help               fit detectors to your own model and images
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (demo, fit, score, evaluate, explain, inspect, bench):
    application.add_command(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; see `ood_engine.cli.main`."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", OodEngineWarning)
        warnings.showwarning = _show_warning
        try:
            code = application.main(arguments, prog_name="ood-engine", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except Interrupted as error:
            return _fail(str(error), 130)
        except (click.Abort, KeyboardInterrupt):
            return _fail("stopped; nothing was written", 130)
        except click.UsageError as error:
            place = error.ctx.command_path if error.ctx else "ood-engine"
            return _fail(f"{error.format_message().rstrip('.')}; see `{place} --help`", 2)
        except (click.ClickException, OodEngineError) as error:
            return _fail(str(error), 2)
        except torch.OutOfMemoryError as error:
            return _fail(f"the device is out of memory ({error}); give a smaller --batch-size", 2)
        except OSError as error:
            if error.errno == errno.EPIPE:
                return _reader_left()
            return _fail(
                f"{error.filename or 'file'}: {error.strerror or error}; check the path, its access and free space", 2
            )


def _fail(message: str, code: int) -> int:
    click.echo(f"ood-engine: {' '.join(message.split())}", err=True)
    return code


def _reader_left() -> int:
    """End as quietly as other tools do under `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    place = "" if issubclass(category, OodEngineWarning) else f"{category.__name__}: "
    click.echo(f"warning: {place}{' '.join(str(message).split())}", err=True)
