"""Speed, memory and error of the kernels on a GPU, beside plain torch, torch.compile, autograd and the GPU's own limits.

Cases come most important first and are measured one by one until the time is over: within a case every subject is held to fp64
first and refused where it is wrong; then all are timed in turns. What is finished is in the results file at any moment.
A subject that puts the GPU out of order is refused as well, and the script starts itself anew without it.

    python benchmarks/gpu_kernels.py [--minutes 4] [--json FILE] [--resume]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

from benchmarks.gpu_problems import Case, Problem, all_cases  # noqa: E402
from benchmarks.gpu_results import OtherRunError, Results, gpu_facts, make_row  # noqa: E402
from benchmarks.gpu_roofline import annotate  # noqa: E402
from benchmarks.gpu_subjects import subjects_of  # noqa: E402
from benchmarks.gpu_timing import CudaInstrument, Instrument, Prepared, Subject, interleave, prepare  # noqa: E402
from ood_engine.bench.measure import default_results_path, print_table, timing_fields  # noqa: E402

NO_GPU, BROKEN = 2, 3
COLUMNS = {
    "subject": "subject",
    "provider": "provider",
    "precision": "precision",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "gb_per_s": "GB/s",
    "tflop_per_s": "Tflop/s",
    "times_roofline": "× roofline",
    "peak_extra_mib": "extra MiB",
    "max_error": "max error",
}
Subjects = Callable[[Problem], Iterable[Subject]]


class BrokenDeviceError(RuntimeError):
    """The device answers no longer: everything after it in this process would fail as well."""


def shape_of(case: Case) -> str:
    size = case.workload
    spatial = f"{size.height}x{size.width}"
    return f"N={case.samples} D={size.channels} H·W={spatial} C={size.classes} n={size.anchors} K={size.components}"


def row_of(case: Case, subject: Subject, **fields: Any) -> dict[str, Any]:
    """The row of a subject; with `p50_ms` among the fields also its rates."""
    samples = subject.samples or case.samples
    described: dict[str, Any] = {
        "case": str(case),
        "subject": subject.subject,
        "provider": subject.provider,
        "workload": case.workload.name,
        "samples": case.samples,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "precision": subject.precision,
        "shape": shape_of(case),
        "samples_run": samples,
        "bytes": subject.cost.bytes,
        "flops": subject.cost.flops,
        "product": None if subject.product is None else list(subject.product),
        "note": subject.note,
    }
    if fields.get("p50_ms"):
        seconds = fields["p50_ms"] / 1000
        described["ms_per_sample"] = fields["p50_ms"] / samples
        described["gb_per_s"] = subject.cost.bytes / seconds / 1e9
        described["tflop_per_s"] = subject.cost.flops / seconds / 1e12
    return make_row(**described, **fields)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def ready(
    subjects: Iterable[Subject], refused: set[tuple[str, str, str | None]], in_time: Callable[[], bool]
) -> Iterator[Subject]:
    """The subjects that have not failed before, for as long as there is time to prepare them."""
    for subject in subjects:
        if not in_time():
            return
        if (subject.subject, subject.provider, subject.precision) not in refused:
            yield subject


def measure(
    case: Case,
    results: Results,
    instrument: Instrument,
    device: torch.device,
    subjects: Subjects,
    in_time: Callable[[], bool],
    rounds: int,
    least_ms: float,
) -> list[dict[str, Any]]:
    """Measure one case and put its rows into the results.

    Raises:
        BrokenDeviceError: after a subject, or in the timing; what failed is in the results.
    """
    problem = Problem(case, device, instrument.cache_bytes)
    prepared: dict[int, Prepared] = {}
    known: list[Subject] = []
    for subject in ready(subjects(problem), results.refused(str(case)), in_time):
        try:
            prepared[len(known)] = prepare(subject, instrument, least_ms)
            instrument.synchronize()
            known.append(subject)
        except Exception as error:  # whatever one subject does, the others are measured
            prepared.pop(len(known), None)
            print(
                f"  refused {subject.subject}, {subject.provider}, {subject.precision}: {first_line(error)}", flush=True
            )
            results.add([row_of(case, subject, error=first_line(error))])
            check_device(instrument, error)
    try:
        rounds_ms = interleave(prepared, instrument, rounds)
    except Exception as error:
        results.add([case_row(case, error)])
        results.finish(str(case))
        check_device(instrument, error)
        raise
    rows = [
        row_of(case, known[index], **timing_fields(times), calls=ready_.calls * ready_.turns, **ready_.fields)
        for index, (times, ready_) in enumerate(zip(rounds_ms.values(), prepared.values(), strict=True))
    ]
    annotate(rows, case.workload, case.samples, case.dtype.itemsize, case.dtype.itemsize)
    results.add(rows)
    return rows


def check_device(instrument: Instrument, error: Exception) -> None:
    try:
        instrument.synchronize()
    except Exception:
        raise BrokenDeviceError(first_line(error)) from error


def measure_all(
    cases: Iterable[Case],
    results: Results,
    instrument: Instrument,
    device: torch.device,
    end: float,
    subjects: Subjects = subjects_of,
    rounds: int = 15,
    least_ms: float = 3.0,
) -> bool:
    """Measure the cases in turn until `end` (of `time.monotonic`); returns whether every subject was right.

    Raises:
        BrokenDeviceError: see `measure`; the rest has to be measured by a new process.
    """

    def in_time() -> bool:
        return time.monotonic() < end

    cases = list(cases)
    try:
        for case in cases:
            if str(case) in results.finished:
                continue
            if not in_time():
                break
            start = time.monotonic()
            print(f"\n{case}", flush=True)
            try:
                rows = measure(case, results, instrument, device, subjects, in_time, rounds, least_ms)
            except BrokenDeviceError:
                raise
            except Exception as error:  # such as too little memory for the operands
                print(f"  not measured: {first_line(error)}", flush=True)
                results.add([case_row(case, error)])
            else:
                print_table(rows, COLUMNS)
                print(f"{time.monotonic() - start:.1f} s", flush=True)
            if in_time():
                results.finish(str(case))
            if device.type == "cuda":
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    finally:
        results.left_out = [str(case) for case in cases if str(case) not in results.finished]
        results.write()
    return not any(row["error"] for row in results.rows)


def case_row(case: Case, error: Exception) -> dict[str, Any]:
    described = {"workload": case.workload.name, "samples": case.samples, "error": first_line(error)}
    return make_row(case=str(case), subject="the whole case", provider="", **described)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed, memory and error of the kernels on a GPU.")
    parser.add_argument("--minutes", type=float, default=4.0, help="when to stop; what is finished is kept (default 4)")
    parser.add_argument("--json", type=Path, default=default_results_path("gpu"), help="results file")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run of this commit measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a subject was refused or a file could not be taken up, or 2 without a GPU."""
    options = parse(argv)
    end = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available():
        print("gpu_kernels.py: no GPU here that torch can use", file=sys.stderr)
        return NO_GPU
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    try:
        results = Results(options.json, gpu_facts(), options.resume)
    except OtherRunError as error:
        print(f"gpu_kernels.py: {error}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        with torch.no_grad():
            is_right = measure_all(all_cases(), results, CudaInstrument(), device, end)
    except BrokenDeviceError as error:
        print(f"  the GPU is out of order, starting anew: {error}", flush=True)
        start_anew(options, (end - time.monotonic()) / 60)
    print(f"{len(results.finished)} cases measured, {len(results.left_out)} left out: {options.json}")
    return 0 if is_right else 1


def start_anew(options: argparse.Namespace, minutes: float) -> None:
    """Become a new process of this script, which takes up the results."""
    arguments = ["--minutes", str(minutes), "--json", str(options.json), "--resume"]
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


if __name__ == "__main__":
    raise SystemExit(main())
