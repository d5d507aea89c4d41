"""`ood-engine demo`: training, fitting, scoring and a report on scanned digits, in under a minute."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch

from ..demo.run import run_demo
from ..evaluation.report import print_table
from .common import Interrupted, check_output, echo_json, path_option, run_options, seed_option

__all__ = ["demo"]


@click.command()
@path_option("--output", default=Path("demo-output"), help="Output folder for images, model, state and report.")
@click.option("--quick", is_flag=True, help="Smoke test with fewer images and epochs; the numbers mean little.")
@seed_option
@run_options
def demo(output: Path, quick: bool, seed: int, device: torch.device, as_json: bool) -> None:
    """Train a small classifier on scanned digits, fit all detectors, and write a report.

    In-distribution: the digits 0 to 7 of scikit-learn's scans. OOD: its digits 8 and 9, patches of its two photographs, and noise.
    Nothing is downloaded. The images, weights and state remain for the other commands.

    \b
    Examples:
      ood-engine demo
      ood-engine demo --output my-demo --seed 1
    """
    check_output(output, folder=True)
    started = time.perf_counter()
    try:
        result = run_demo(output, seed=seed, quick=quick, device=device, progress=True)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; {output} is incomplete: run the demo again to recreate it") from error
    seconds = time.perf_counter() - started
    if as_json:
        document = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
        files = [str(file) for file in result.files]
        echo_json(document | {"files": files, "commands": result.commands(), "seconds": round(seconds, 3)})
        return
    print_table(result.evaluation)
    click.echo(f"accuracy on {result.evaluation.id_name}: {100 * (result.evaluation.accuracy or 0):.2f} %")
    click.echo(f"\n{output}/report.html holds the full report; finished in {seconds:.1f} s. Try next:\n")
    for command in result.commands():
        click.echo(f"  {command}\n")
