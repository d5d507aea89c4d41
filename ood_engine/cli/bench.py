"""`ood-engine bench`: overhead of scoring over a model's forward pass on this machine."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..demo import SmallCNN
from ..engine import Engine
from ..errors import InputError
from ..features.loader import with_progress
from ..files import write_atomically
from ..model.loading import load_model
from .common import check_output, echo_json, force_option, path_option, print_table, run_options, weights_option
from .timing import interleave, peak_mib, summary_ms

__all__ = ["bench"]

BATCHES = (1, 8, 64)
QUICK, FULL = (1.0, 5), (10.0, 20)
"""Seconds per batch size, and minimum number of rounds."""

BUILT_IN = "built-in SmallCNN"
BUILT_IN_IMAGES, BUILT_IN_SHAPE = 512, (1, 32, 32)


@click.command()
@click.option(
    "--model",
    metavar="SPEC",
    help="package.module:factory or file.py:factory, whose code is run.  [a small CNN, untrained]",
)
@weights_option
@path_option("--state", help="State file of this model, from `ood-engine fit`.")
@force_option
@click.option("--quick", is_flag=True, help="A tenth of the time, with fewer rounds.")
@path_option("--output", default=Path("bench-output"), help="Output folder for bench.json.")
@run_options
def bench(
    model: str | None,
    weights: Path | None,
    state: Path | None,
    force: bool,
    quick: bool,
    output: Path,
    device: torch.device,
    as_json: bool,
) -> None:
    """Measure the overhead of scoring over a model's forward pass: latency, throughput and peak memory for 1, 8 and 64 images.

    The forward pass alone and with scoring run in turns on random images of the size in the state, already on the device: loading
    and preprocessing are not measured. Without a model, a small CNN is fitted to noise with the default detectors; its forward
    pass is cheap, so the relative overhead exceeds that of a real model. Run on an idle machine.

    \b
    Examples:
      ood-engine bench --quick
      ood-engine bench --model net.py:make --weights net.pt --state state.safetensors --output before/
    """
    if (model is None) != (state is None) or (model is None and weights is not None):
        raise click.UsageError(
            "--model and --state belong together, and --weights requires both: give both, or none of them."
        )
    check_output(output, folder=True)
    if model is None or state is None:
        network, engine = _built_in(device)
    else:
        network, engine = _from_files(model, weights, state, device, force)
    document = {
        "machine": _machine(device),
        "model": model or BUILT_IN,
        "detectors": list(engine.detectors),
        "image_shape": engine.image_shape,
        "rows": _measure(network, engine, *(QUICK if quick else FULL)),
    }
    path = write_atomically(output / "bench.json", (json.dumps(document, indent=2) + "\n").encode())
    if as_json:
        echo_json(document | {"files": [str(path)]})
    else:
        _print(document)
        click.echo(f"wrote {path}")


def _from_files(
    spec: str, weights: Path | None, state: Path, device: torch.device, force: bool
) -> tuple[nn.Module, Engine]:
    network = load_model(spec, weights).to(device)
    engine = Engine.load(state, network, force=force)
    if engine.image_shape is None:
        raise InputError(f"{state}: fitted on images of several sizes: expected one; run `ood-engine fit` with --size")
    return network, engine


def _built_in(device: torch.device) -> tuple[nn.Module, Engine]:
    network = SmallCNN().eval().to(device)
    images = torch.rand((BUILT_IN_IMAGES, *BUILT_IN_SHAPE), device="cpu", generator=torch.Generator().manual_seed(0))
    return network, Engine(network).fit(images.split(64), labels="predicted")


def _measure(network: nn.Module, engine: Engine, seconds: float, least_rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in with_progress(BATCHES, "measuring", True, unit="batch size"):
        try:
            rows.append(_row(network, engine, batch, seconds, least_rounds))
        except torch.OutOfMemoryError:
            if not rows:
                raise
            click.echo(f"warning: {batch} images do not fit into the device's memory and are left out", err=True)
    return rows


def _row(network: nn.Module, engine: Engine, batch: int, seconds: float, least_rounds: int) -> dict[str, Any]:
    weight = next(network.parameters(), engine.head.weight)
    assert engine.image_shape is not None
    images = torch.rand((batch, *engine.image_shape), device="cpu", generator=torch.Generator().manual_seed(batch))
    images = images.to(weight.device, weight.dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(images)
        return logits

    # The engine runs first, because it reports in one line why a model rejects the images.
    calls = {"with_scores": lambda: engine.score(images), "forward": forward}
    rounds = interleave(calls, weight.device, seconds=seconds, least_rounds=least_rounds)
    row: dict[str, Any] = {"batch": batch, "rounds": len(rounds["forward"])}
    for name in ("forward", "with_scores"):
        row[name] = summary_ms(rounds[name]) | {"peak_mib": peak_mib(calls[name], weight.device)}
        row[name]["images_per_second"] = 1000 * batch / row[name]["median_ms"]
    added = summary_ms([both - alone for both, alone in zip(rounds["with_scores"], rounds["forward"], strict=True)])
    # The smallest difference within a round comes from a disturbed forward pass.
    added["min_ms"] = row["with_scores"]["min_ms"] - row["forward"]["min_ms"]
    row["added"] = added | {"share_of_forward": added["median_ms"] / row["forward"]["median_ms"]}
    return row


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _print(document: dict[str, Any]) -> None:
    machine, shape = document["machine"], "×".join(map(str, document["image_shape"]))
    click.echo(f"{document['model']}, images of {shape}: {', '.join(document['detectors'])}")
    click.echo(f"{machine['device']}, {machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}")
    rows = []
    for row in document["rows"]:
        for count, label, figures in (
            (str(row["batch"]), "forward", row["forward"]),
            ("", "with scores", row["with_scores"]),
            ("", f"scores add {100 * row['added']['share_of_forward']:.1f} %", row["added"]),
        ):
            spread = f"{figures['p5_ms']:.3g} to {figures['p95_ms']:.3g}"
            rate, peak = (figures.get(name) for name in ("images_per_second", "peak_mib"))
            last = ["" if rate is None else f"{rate:,.0f}", "" if peak is None else f"{peak:.2f}"]
            rows.append([count, label, f"{figures['median_ms']:.3g}", f"{figures['min_ms']:.3g}", spread, *last])
    print_table(["Images", ""], ["Median ms", "Min ms", "p5–p95 ms", "Images/s", "Peak MiB"], rows)
