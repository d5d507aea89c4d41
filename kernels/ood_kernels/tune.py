"""`python -m ood_kernels.tune`: time the configurations of every kernel family on this GPU and keep the fastest.

Configurations are keyed by shape without the batch size, see `launch.choose`. Each result is written to disk at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case, all_cases, operands, run, run_reference
from .triton_kernels.launch import CONFIGS, Choice, file_name, forced

__all__ = ["Measure", "Stopwatch", "Tuned", "candidates", "main", "merge", "tune"]

Setting = Mapping[str, int | str]
Measure = Callable[[Case, Mapping[str, Setting]], float]
"""Microseconds of a case under configurations by family; infinite for a failed run or a wrong result."""

_PACKAGE = f"{__package__}.triton_kernels"
TOLERANCES = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
_CALLS, _ROUNDS, _MOST_COPIES = 16, 5, 32


class Tuned(NamedTuple):
    """The fastest configuration of a family for a shape.

    Attributes:
        family: name in `launch.choose`.
        shape: key of the look-up.
        config: the full configuration.
        microseconds: of the whole timed call.
        default_microseconds: of the same call with the default.
    """

    family: str
    shape: dict[str, int | str]
    config: dict[str, int | str]
    microseconds: float
    default_microseconds: float


def candidates(choice: Choice) -> list[dict[str, Any]]:
    """Configurations to time, the default first.

    The family's own `candidates(shape)`, if defined, merged over the default. Otherwise variations that are valid for any
    kernel, since they leave every summation order unchanged: warps, pipeline stages, and GROUP, the order of the tiles.
    """
    family, shape, default = choice
    own = (
        getattr(import_module(f"{_PACKAGE}.{family}"), "candidates", None)
        if find_spec(f"{_PACKAGE}.{family}")
        else None
    )
    if own is not None:
        found = [dict(default) | dict(config) for config in own(shape)]
    else:
        steps: dict[str, list[int]] = {}
        for name in ("num_warps", "GROUP"):
            if name in default:
                value = int(default[name])
                steps[name] = [
                    size for size in (value, value // 2, 2 * value) if 1 <= size <= (16 if name == "num_warps" else 64)
                ]
        if "num_stages" in default:
            value = int(default["num_stages"])
            steps["num_stages"] = [stages for stages in (value, value - 1, value + 1) if 1 <= stages <= 5]
        found = [dict(default) | dict(zip(steps, values, strict=True)) for values in itertools.product(*steps.values())]
    return [dict(default)] + [config for config in found if config != default]


def tune(
    cases: Iterable[Case], measure: Measure, in_time: Callable[[], bool] = lambda: True, families: Sequence[str] = ()
) -> Iterator[Tuned]:
    """Yield the fastest configuration for every family and shape used by the cases.

    Args:
        cases: calls; their look-ups are recorded on "meta" tensors.
        measure: times a case.
        in_time: polled before every measurement; an unfinished search is discarded once it is False.
        families: restriction to these; empty for all.

    Raises:
        RuntimeError: a case fails, or is wrong, with the default configuration.
    """
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
        if case.forced:
            continue
        with forced({}) as choices:
            run(case, operands(case, torch.device("meta")))
        for choice in choices:
            key = (choice.family, json.dumps(choice.shape))
            if key in best or (families and choice.family not in families):
                continue
            others = {other.family: best.get((other.family, json.dumps(other.shape)), {}) for other in choices}
            times: list[tuple[float, dict[str, Any]]] = []
            for config in candidates(choice):
                if not in_time():
                    return
                times.append((measure(case, others | {choice.family: config}), config))
                if not math.isfinite(times[0][0]):
                    raise RuntimeError(
                        f"{case}: does not run, or is wrong, with the default {config} of {choice.family}"
                    )
            microseconds, best[key] = min(times, key=lambda pair: pair[0])
            yield Tuned(choice.family, choice.shape, best[key], microseconds, times[0][0])


class Stopwatch:
    """A `Measure` on a GPU.

    The result is first verified against the reference. Calls are then timed inside one CUDA graph, which excludes host time,
    and rotate through copies of the operands, which keeps them out of the L2 cache.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._case: Case | None = None
        self._copies: list[dict[str, Any]] = []
        self._truth: list[Tensor] = []

    def __call__(self, case: Case, configs: Mapping[str, Setting]) -> float:
        """Median microseconds per call; infinite for a failed run or a wrong result."""
        from triton.errors import TritonError

        if case != self._case:
            self._prepare(case)
        with torch.cuda.device(self.device), forced(configs):
            try:
                result = tensors_of(run(case, self._copies[0]))
            except TritonError:
                return math.inf
            return self._microseconds(case) if is_close(result, self._truth, TOLERANCES[case.precision]) else math.inf

    def _prepare(self, case: Case) -> None:
        self._case, self._copies, self._truth = None, [], []
        first = operands(case, self.device)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(first.values()))
        wanted = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        copies = min(_MOST_COPIES, math.ceil(wanted / size))
        self._copies = [first, *(operands(case, self.device) for _ in range(copies))]
        self._truth = tensors_of(run_reference(case, first))
        self._case = case

    def _microseconds(self, case: Case) -> float:
        graph = torch.cuda.CUDAGraph()
        turns = self._copies * math.ceil(_CALLS / len(self._copies))
        with torch.cuda.graph(graph):
            for values in turns:
                run(case, values)
        graph.replay()
        times = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * start.elapsed_time(end) / len(turns))
        return sorted(times)[_ROUNDS // 2]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    nested = isinstance(value, Iterable) and not isinstance(value, str)
    return [tensor for item in value for tensor in tensors_of(item)] if nested else []


def is_close(result: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> bool:
    """Whether every error is at most `tolerance` times the largest magnitude of its reference tensor."""
    pairs = list(zip(result, truth, strict=True))
    return all(
        bool((one - other).abs().max() <= tolerance * other.abs().max()) for one, other in pairs if other.numel()
    )


def merge(file: Path, facts: Mapping[str, str], tuned: Tuned) -> None:
    """Write one result to the file, replacing an earlier one for the same shape; the replacement is atomic."""
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"families": {}}
    rows = content["families"].setdefault(tuned.family, [])
    rows[:] = [row for row in rows if row["shape"] != tuned.shape]
    rows.append({"shape": tuned.shape, "config": tuned.config, "microseconds": round(tuned.microseconds, 3)})
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps({**facts, "families": content["families"]}, indent=1) + "\n")
    os.replace(whole, file)


def _facts(device: torch.device) -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": torch.version.hip or _first_line(query),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": _first_line(here),
    }


def _first_line(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a kernel is wrong with its default, 2 without GPU or Triton."""
    parser = argparse.ArgumentParser("python -m ood_kernels.tune", description=__doc__.partition(": ")[2])
    parser.add_argument("--minutes", type=float, default=5.0, help="time budget; finished results are kept (default 5)")
    parser.add_argument("--family", action="append", default=[], metavar="NAME", help="only this family; repeatable")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="output folder for <device>.json")
    options = parser.parse_args(arguments)
    if find_spec("triton") is None or not torch.cuda.is_available():
        missing = "no GPU" if find_spec("triton") else "no Triton"
        print(
            f"ood_kernels.tune: {missing} here: tuning times kernels, so run it on the target GPU",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = _facts(device)
    file = options.output / f"{file_name(facts['device'])}.json"
    end = time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    try:
        for tuned in tune(all_cases(), Stopwatch(device), lambda: time.monotonic() < end, options.family):
            merge(file, facts, tuned)
            gain = f"{tuned.default_microseconds:.1f} → {tuned.microseconds:.1f} µs"
            print(f"{tuned.family} {json.dumps(tuned.shape)}: {gain} with {json.dumps(tuned.config)}", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; finished results are in {file}", file=sys.stderr)
    except RuntimeError as error:
        print(f"ood_kernels.tune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
