"""`ood-engine inspect`: contents of a state file, without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import safe_open

from ..evaluation.report.evaluation import printable
from ..state import read_header
from .common import echo_json, json_option, print_table

__all__ = ["inspect"]

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@click.command()
@click.argument("state", type=click.Path(path_type=Path))
@json_option
def inspect(state: Path, as_json: bool) -> None:
    """Show the contents of a state file: versions, head and feature map, detectors, thresholds, tuning, tensors.

    No model is needed.

    \b
    Examples:
      ood-engine inspect state.safetensors
      ood-engine inspect state.safetensors --json
    """
    header = read_header(state)
    tensors = _tensors(state)
    if as_json:
        echo_json({"path": str(state), "bytes": state.stat().st_size, **header, "tensors": tensors})
        return
    console = Console()
    console.print(_grid(_facts(state, header)))
    _print_detectors(header)
    if any(row["chosen"] for row in header["tuning"]):
        console.print(_grid({f"tuned {row['detector']}": _tuned(row) for row in header["tuning"] if row["chosen"]}))
    if header["subspaces"]:
        _print_subspaces(header["subspaces"])
    _print_tensors(tensors)


def _tensors(state: Path) -> list[dict[str, Any]]:
    rows = []
    with safe_open(state, framework="pt") as file:
        for name in sorted(file.keys()):
            entry = file.get_slice(name)
            shape, dtype = list(entry.get_shape()), entry.get_dtype()
            rows.append({"name": name, "shape": shape, "dtype": dtype, "bytes": math.prod(shape) * BYTES.get(dtype, 0)})
    return rows


def _facts(state: Path, header: dict[str, Any]) -> dict[str, str]:
    plan, head = header["plan"], header["head"]
    map_words = "none" if plan["feature_map"] is None else f"{plan['feature_map']}, {_verified(plan)}"
    facts = {
        "file": f"{state} ({_size(state.stat().st_size)}, format {header['format']})",
        "written by": f"ood-engine {header['package']}, torch {header['torch']}",
        "head": f"{plan['head']}: {head['classes']} classes × {head['features']} features,"
        f" {'with' if head['bias'] else 'without'} bias" + ("" if plan["head_proven"] else f"; {plan['head_reason']}"),
        "model": f"{header['model']['dtype']}, digest {header['model']['own'][:12]}",
        "feature map": map_words + (", rectified" if header["rectify"] else ""),
        "reason": plan["reason"],
        "fitted on": f"{header['fit_samples']} images, seed {header['seed']}",
        "calibrated on": _calibration(header),
        "labels": _labels(header["set_up"]),
    }
    facts |= {f"overruled {number}": text for number, text in enumerate(header["set_up"]["overruled"], 1)}
    facts |= {f"no {name}": reason for name, reason in header["unavailable"].items()}
    return facts | {str(key): _short(value) for key, value in header["information"].items()}


def _verified(plan: dict[str, Any]) -> str:
    return "verified" if plan["proven"] else "unverified"


def _calibration(header: dict[str, Any]) -> str:
    if not header["thresholds"]:
        return "nothing; p-values and decisions need engine.calibrate"
    rates = ", ".join(f"{100 * rate:g} %" for rate in sorted(set(header["false_alarm_rates"].values())))
    count = header["calibration_samples"]
    return f"{'an unknown number of' if count is None else count} images, false-alarm rate {rates}"


def _labels(set_up: dict[str, Any]) -> str:
    share = set_up["label_agreement"]
    return f"{set_up['labels']}, " + ("none checked" if share is None else f"{100 * share:.1f} % of them predicted")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(entry)}" for key, entry in value.items())
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _tuned(row: dict[str, Any]) -> str:
    return f"{_short(row['settings'])} (AUROC {100 * row['auroc']:.2f} % on pseudo-OOD)"


def _grid(facts: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(printable(name)), Text(printable(value)))
    return grid


def _print_detectors(header: dict[str, Any]) -> None:
    rows = []
    for entry in header["detectors"]:
        threshold = header["thresholds"].get(entry["name"])
        settings = printable(_short(entry["settings"]) or "–")
        rows.append([printable(entry["name"]), settings, "–" if threshold is None else f"{threshold:.6g}"])
    print_table(["Detector", "Settings"], ["Threshold"], rows, "Detectors")


def _print_subspaces(subspaces: list[dict[str, Any]]) -> None:
    rows = []
    for subspace in subspaces:
        in_use = subspace["form"].removesuffix("Basis").lower()
        names = [printable(_short(subspace["detectors"])), str(subspace["components"])]
        for cost in subspace["costs"]:
            used = "*" if cost["form"] == in_use or len(subspace["costs"]) == 1 else ""
            sizes = [_size(cost["bytes"]), _size(cost["workspace"])]
            figures = [f"{cost['flops'] / 1e6:.1f}", *sizes, f"{cost['seconds'] * 1e3:.3g} ms"]
            rows.append([*names, cost["form"] + used, *figures])
            names = ["", ""]
    title = f"Gradient subspaces, a batch of {subspaces[0]['samples']}; * = basis in use"
    print_table(["Subspace", "K", "Basis"], ["MFLOP", "size", "workspace", "estimate"], rows, title)


def _print_tensors(tensors: list[dict[str, Any]]) -> None:
    shapes = [str(row["shape"]).replace(",", " ×")[1:-1] or "one" for row in tensors]
    rows = [
        [printable(row["name"]), shape, row["dtype"], _size(row["bytes"])]
        for row, shape in zip(tensors, shapes, strict=True)
    ]
    total = _size(sum(row["bytes"] for row in tensors))
    print_table(["Tensor", "Shape", "Type"], ["Size"], rows, f"{len(tensors)} tensors, {total}")


def _size(count: int) -> str:
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
