"""`ood-engine evaluate --sweep`: bases × components × heads, from features extracted once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from ..detectors.low_dim_gradient import HEADS
from ..engine import Engine
from ..errors import OodEngineError
from ..evaluation.report.sweep import print_sweep, write_sweep_figures, write_sweep_json, write_sweep_table
from ..evaluation.sweep import COMPONENTS, NORMALISATIONS, sweep
from ..images.dataset import ImageDataset
from ..subspace import BASES
from .common import Interrupted, check_errors, echo_json, echo_skipped, path_option, together

__all__ = ["FIT_NAME", "SWEEP_SETTINGS", "check_sweep", "run_sweep", "sweep_options"]


FIT_NAME = "fit"


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def names(value: str) -> tuple[str, ...]:
        parts = tuple(part.strip() for part in value.split(","))
        unknown = [part for part in parts if part not in known]
        if unknown:
            choice = ", ".join(known)
            raise click.BadParameter(f"{unknown[0]!r} is not known: expected a comma-separated choice of {choice}")
        return parts

    return names


def _counts(value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        problem = f"{value!r}: expected whole numbers of at least 1, comma-separated, such as 8,32,128"
        raise click.BadParameter(problem)
    return tuple(int(part) for part in parts)


sweep_options = together(
    click.option("--sweep", "is_sweep", is_flag=True, help="Compare bases x K x heads of low_dim_gradient instead."),
    path_option("--fit", "fit_path", metavar="DATA", help="Sweep: ID images to fit on."),
    click.option("--bases", metavar="NAMES", type=_names(BASES), help=f"Sweep: bases.  [{','.join(BASES)}]"),
    click.option(
        "--components",
        metavar="NUMBERS",
        type=_counts,
        help=f"Sweep: values of K.  [{','.join(map(str, COMPONENTS))}, up to what the data span]",
    ),
    click.option("--heads", metavar="NAMES", type=_names(HEADS), help="Sweep: heads, such as knn,vim.  [all]"),
    click.option(
        "--normalisations", metavar="NAMES", type=_names(NORMALISATIONS), help="Sweep: normalisations.  [none]"
    ),
    click.option("--basis-limit", type=click.IntRange(1), help="Sweep: maximum MiB of a basis.  [2048]"),
)
SWEEP_SETTINGS = ("bases", "components", "heads", "normalisations", "basis_limit")


def check_sweep(is_sweep: bool, fit_path: Path | None, options: Mapping[str, Any]) -> None:
    """Refuse a sweep without fit images, and sweep options without a sweep."""
    if is_sweep and fit_path is None:
        raise click.UsageError(
            "--sweep needs ID images to fit on, which a state file does not contain: give --fit DATA."
        )
    given = [name for name, value in {"fit": fit_path, **options}.items() if value is not None]
    if given and not is_sweep:
        raise click.UsageError(
            f"--{given[0].replace('_', '-')} belongs to a sweep: give --sweep as well, or leave it out."
        )


def run_sweep(
    engine: Engine,
    fit_data: ImageDataset,
    id_data: ImageDataset,
    ood_data: Mapping[str, ImageDataset],
    output: Path,
    options: Mapping[str, Any],
    *,
    batch_size: int,
    as_json: bool,
    id_name: str,
    max_errors: float,
) -> None:
    """Run the model once over each set, sweep over the features, and write the files; sweep.json is updated after each row."""
    path = output / "sweep.json"
    kept = 0
    sets = {FIT_NAME: fit_data, id_name: id_data, **ood_data}
    try:
        skipped, caches = {}, []
        for name, data in sets.items():
            loader = data.loader(batch_size)
            caches.append(engine.scorer.extract(loader, f"{name} features", progress=True))
            skipped[name] = echo_skipped(loader.skipped, name)
        fit_cache, id_cache, *ood_caches = caches
        facts = {
            "fit_samples": len(fit_cache),
            "id_samples": len(id_cache),
            "ood_samples": {name: len(cache) for name, cache in zip(ood_data, ood_caches, strict=True)},
        }

        def keep(rows: list[dict[str, Any]]) -> None:
            nonlocal kept
            write_sweep_json(rows, facts, path, complete=False)
            kept = len(rows)

        chosen = {name: value for name, value in options.items() if value is not None}
        limit = chosen.pop("basis_limit", 2048)
        rows = sweep(
            engine.head,
            engine.scorer.kernels,
            fit_cache,
            id_cache,
            dict(zip(ood_data, ood_caches, strict=True)),
            **chosen,
            max_bytes=limit * 2**20,
            seed=engine.seed,
            progress=True,
            on_rows=keep,
        )
    except KeyboardInterrupt as error:
        if not kept:
            raise
        raise Interrupted(f"stopped; {kept} finished rows are kept in {path}") from error
    files = [write_sweep_json(rows, facts, path), write_sweep_table(rows, output / "sweep.csv")]
    files += write_sweep_figures(rows, output)
    if all(row["refused"] is not None for row in rows):
        raise OodEngineError(f"no combination could be fitted; reasons in {path}, the first: {rows[0]['refused']}")
    if as_json:
        document = json.loads(path.read_text(encoding="utf-8"))
        echo_json(document | {"skipped": skipped, "files": [str(file) for file in files]})
    else:
        print_sweep(rows, click.echo)
        click.echo(f"wrote {', '.join(str(file) for file in files)}")
    for name, data in sets.items():
        problem = f"of {name!r} cannot be used"
        check_errors(len(skipped[name]), len(data), max_errors, problem, f"{output} has the results of the others")
