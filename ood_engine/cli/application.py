"""The command group, and the end of every command: an exit code, and one line per error."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import click
import torch

from ..errors import OodEngineError, OodEngineWarning, one_of
from ..version import __version__
from .common import Interrupted

__all__ = ["COMMANDS", "application", "run"]

COMMANDS = {
    "demo": "Run all detectors on a small classifier of scanned digits.",
    "fit": "Fit detectors to a model and its ID images.",
    "score": "Score images into a Parquet or CSV table.",
    "evaluate": "Evaluate detectors on ID and OOD sets and write a report.",
    "explain": "Explain the score of one image.",
    "detectors": "List every detector and its settings.",
    "inspect": "Show the contents of a state file, without a model.",
    "bench": "Measure the overhead of scoring over a model's forward pass.",
}
"""Command, also the name of its module and function → its line in the overview."""


class _LazyGroup(click.Group):
    """A group that imports the module of a command only when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{cmd_name}", __package__), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}: {one_of(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="ood-engine")
@click.pass_context
def application(context: click.Context) -> None:
    """Out-of-distribution scores for a PyTorch classifier, from its last feature map and its last layer.

    Scores: HIGHER = MORE IN-DISTRIBUTION.

    \b
    ood-engine demo                     train a small classifier, fit all detectors, write a report
    ood-engine fit --help               fit detectors to your own model and images
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; see `ood_engine.cli.main`."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", OodEngineWarning)
        warnings.showwarning = _show_warning
        try:
            code = application.main(arguments, prog_name="ood-engine", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except Interrupted as error:
            return _fail(str(error), error.code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("stopped; nothing was written", 130)
        except click.UsageError as error:
            place = error.ctx.command_path if error.ctx else "ood-engine"
            return _fail(f"{error.format_message().rstrip('.')}; see `{place} --help`", 2)
        except (click.ClickException, OodEngineError) as error:
            return _fail(str(error), 2)
        except torch.OutOfMemoryError as error:
            return _fail(f"the device is out of memory ({error}); use a smaller --batch-size", 2)
        except OSError as error:
            if error.errno == errno.EPIPE:
                return _reader_left()
            return _fail(
                f"{error.filename or 'file'}: {error.strerror or error}; check the path, its permissions and free space",
                2,
            )


def _fail(message: str, code: int) -> int:
    click.echo(f"ood-engine: {' '.join(message.split())}", err=True)
    return code


def _reader_left() -> int:
    """End silently when the reader of a pipe has closed it, as under `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    place = "" if issubclass(category, OodEngineWarning) else f"{category.__name__}: "
    click.echo(f"warning: {place}{' '.join(str(message).split())}", err=True)
