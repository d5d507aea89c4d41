"""`ood-engine bench`: what scoring costs here, beside what else could do it and what the machine can do at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from ..bench.cases import Effort, Plan
from ..bench.compare import Comparison, compare
from ..bench.growth import print_growth
from ..bench.rows import read_document, write_csv
from ..bench.suite import DEFAULT_MINUTES, SUBJECTS, Recorder, Schedule, effort_for, environment, measure
from ..bench.table import print_comparison, print_left_out, print_rows
from ..errors import OodEngineError
from .common import Interrupted, check_output, device_option, echo_json, json_option
from .sweep import _Names

__all__ = ["bench"]

DOCUMENT, TABLE = "bench.json", "bench.csv"
SLOWER = 1


@click.command()
@click.option("--quick", is_flag=True, help="Fewer and smaller cases: under three minutes.")
@click.option(
    "--output",
    default=Path("bench-output"),
    type=click.Path(path_type=Path),
    help=f"Folder for {DOCUMENT}, {TABLE} and pictures.",
)
@click.option("--compare", "old_path", metavar="OLD.json", type=click.Path(path_type=Path), help="An earlier run.")
@click.option(
    "--with",
    "new_path",
    metavar="NEW.json",
    type=click.Path(path_type=Path),
    help="What to compare with it, instead of measuring.",
)
@click.option("--only", metavar="NAMES", type=_Names(SUBJECTS), help=f"Some of {', '.join(SUBJECTS)}; with commas.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="After these no new case is started.  [{full:g}, quick {quick:g}]".format(**DEFAULT_MINUTES),
)
@click.option("--threads", type=click.IntRange(1), help="Of torch.  [its own choice]")
@device_option
@json_option
def bench(
    quick: bool,
    output: Path,
    old_path: Path | None,
    new_path: Path | None,
    only: tuple[str, ...] | None,
    minutes: float | None,
    threads: int | None,
    device: torch.device,
    as_json: bool,
) -> int:
    """Measure this machine: every subject at several sizes, all providers of a case in turns.

    It takes under ten minutes, --quick under three, best on an otherwise idle machine. A provider whose result is not right is
    not timed. Rows are in bench.json after every case, so that an interrupted run keeps what it measured. Peers come with
    pip install 'ood-engine[peers]'.

    With --compare the exit code is 1 if anything is slower beyond noise.

    \b
    Examples:
      ood-engine bench --quick
      ood-engine bench --only head,projection --output before
      ood-engine bench --output after --compare before/bench.json
      ood-engine bench --compare before/bench.json --with after/bench.json
    """
    if new_path is not None and old_path is None:
        raise click.UsageError("--with is compared to an earlier run: give --compare OLD.json as well.")
    old = None if old_path is None else read_document(old_path)
    if new_path is not None:
        assert old is not None
        return _report_comparison(compare(old, read_document(new_path)), as_json)
    if device.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device {device.type}: only cpu and cuda are measured.")
    path = output / DOCUMENT
    if old_path is not None and path.exists() and path.samefile(old_path):
        raise click.UsageError(f"--compare {old_path} is what this run would replace: give another --output.")
    check_output(output, folder=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        document = _measure(path, effort_for(quick, device), only or SUBJECTS, minutes, as_json)
    finally:
        torch.set_num_threads(threads_before)
    files = _write_files(document, output)
    comparison = None if old is None else compare(old, document)
    if as_json:
        compared = {} if comparison is None else {"comparison": comparison._asdict()}
        echo_json(document | compared | {"files": [str(file) for file in files]})
        return _exit_code(comparison)
    print_rows(document["rows"])
    print_growth(document["growth"])
    click.echo("")
    print_left_out(document)
    click.echo(f"wrote {', '.join(str(file) for file in files)}")
    if comparison is not None:
        click.echo(f"\ncompared to {old_path}")
        print_comparison(comparison)
    return _exit_code(comparison)


def _measure(
    path: Path, effort: Effort, subjects: tuple[str, ...], minutes: float | None, as_json: bool
) -> dict[str, Any]:
    machine = environment(effort.device)
    if not as_json:
        click.echo(
            f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, load"
            f" {(machine['load_average'] or ['unknown'])[0]}: {effort.name} run"
        )
    started = time.monotonic()
    schedule = Schedule(subjects, effort, 60 * (minutes or DEFAULT_MINUTES[effort.name]))
    recorder = Recorder(path, machine, effort)
    try:
        measure(schedule, effort, recorder, _with_progress)
    except KeyboardInterrupt as error:
        if not recorder.document["rows"]:
            raise
        raise Interrupted(
            f"stopped; the {len(recorder.document['rows'])} rows measured so far are kept in {path}"
        ) from error
    if not any(row["p50_ms"] is not None for row in recorder.document["rows"]):
        reasons = [entry["reason"] for entry in recorder.document["missing"]]
        reasons += [row["refused"] for row in recorder.document["rows"]]
        raise OodEngineError(f"nothing could be measured; the first reason: {(reasons or ['no cases'])[0]}")
    if not as_json:
        click.echo(f"{len(recorder.document['rows'])} rows in {time.monotonic() - started:.0f} s")
    return recorder.document


def _with_progress(schedule: Schedule) -> Iterator[Plan]:
    from tqdm import tqdm

    with tqdm(total=schedule.total, desc="measuring", unit="case", disable=None) as bar:
        for plan in schedule:
            bar.set_postfix_str(str(plan))
            yield plan
            bar.update()


def _write_files(document: dict[str, Any], output: Path) -> list[Path]:
    from ..bench.figures import write_figures

    write_csv(output / TABLE, document["rows"])
    try:
        written, left_out = write_figures(document, output)
    except OodEngineError as error:
        written, left_out = [], {"pictures": str(error)}
    for name, reason in left_out.items():
        click.echo(f"no {name}: {reason}", err=True)
    return [output / DOCUMENT, output / TABLE, *written]


def _report_comparison(comparison: Comparison, as_json: bool) -> int:
    if as_json:
        echo_json(comparison._asdict())
    else:
        print_comparison(comparison)
    return _exit_code(comparison)


def _exit_code(comparison: Comparison | None) -> int:
    return SLOWER if comparison is not None and comparison.is_slower else 0
