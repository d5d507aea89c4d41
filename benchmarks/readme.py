"""Writes the README's section on cost from the result files: every figure in it is one that was measured and committed.

python -m benchmarks.readme FILE            # take FILE into benchmarks/results/, draw its pictures, rewrite the section
python -m benchmarks.readme                 # rewrite the section
python -m benchmarks.readme --check         # exits with 1 where it is not what the files say
python -m benchmarks.readme --targets FILE  # print the targets of FILE; exits with 1 where one is missed
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ood_kernels.workloads import BASES

from .common import AUTOGRAD, COMPILED, COPY, OURS, PLAIN, REFERENCE
from .engine import ALL, ALONE, FORWARD
from .fitting import CHOSEN
from .methods import MAKERS
from .peers import OODEEL, PYTORCH_OOD
from .plot import draw
from .results import FOLDER, RESULTS, name_of, read, write

README = FOLDER.parent / "README.md"
BEGIN = "<!-- performance: written by benchmarks/readme.py from benchmarks/results/ -->\n"
END = "<!-- performance: end -->\n"
NO_GPU = "Not measured yet: `bash benchmarks/gpu.sh`, see [benchmarks/](benchmarks/README.md#on-a-gpu)."

Row = Mapping[str, Any]
Figure = Callable[[Row, Sequence[Row]], float | None]


Target = tuple[str, float, Mapping[str, Any], Figure]
"""What is asked, the limit of the worst figure, values that a row has to have (the provider is ours if not named), its figure.
What should be large is negated, limit and figure."""


def of(name: str, sign: int = 1) -> Figure:
    return lambda row, _: sign * row[name] if name in row else None


def copies(row: Row, _: Sequence[Row]) -> float | None:
    """Time in copies of the same bytes."""
    return 1 / row["share_of_copy"] if "share_of_copy" in row else None


def rooflines(row: Row, _: Sequence[Row]) -> float | None:
    return row["median_ms"] / row["limit_ms"] if "limit_ms" in row else None


def gain(provider: str) -> Figure:
    """Time a sample of another provider of the case by ours, both by the ratio to the reference row."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        rivals = [one for one in rows if (one["case"], one["provider"]) == (row["case"], provider)]
        return -rivals[0]["ratio"] / row["ratio"] if rivals else None

    return figure


def growth(row: Row, rows: Sequence[Row]) -> float | None:
    """The exponent of time along the samples, from the first case of a workload to its last."""
    alike = [one for one in rows if all(one[name] == row[name] for name in ("subject", "workload", "provider"))]
    few, many = (int(one["shape"].split()[0].partition("=")[2]) for one in (alike[0], alike[-1]))
    return math.log(alike[-1]["median_ms"] / alike[0]["median_ms"]) / math.log(many / few) if many > few else None


_POOL, _DUAL = {"subject": "pool_nap"}, {"subject": "project dual", "workload": "R50"}
_MAIN = {"subject": "score", "workload": "R50", "samples": 256}
_FORWARD = {"layout": "channels_last", "provider": ALONE}
_NCHW = {"dtype": "bfloat16", "layout": "rows"}
ON_A_CPU: Sequence[Target] = (
    ("pooling in fp32: at most 2 copies of the same bytes", 2, _POOL | {"dtype": "float32"}, copies),
    ("pooling channels_last: at most 2 copies", 2, _POOL | {"layout": "channels_last"}, copies),
    ("pooling NCHW in bf16: at most 3 copies", 3, _POOL | _NCHW, copies),
    ("scores, N=32: at most 0.02 of a ResNet-50 forward", 0.02, _FORWARD | {"samples": 32}, of("ratio")),
    ("dual: at least 500 times as fast a sample as autograd", -500, _DUAL, gain(AUTOGRAD)),
    ("scores of 1024 samples: at most 200 MiB", 200, {"samples": 1024, "provider": ALL}, of("peak_mib")),
    ("chosen form: at most 2 times the other's time", 2, {"provider": CHOSEN}, of("ratio")),
    ("fitting: grows at most with samples^1.1", 1.1, {"subject": "fit engine"}, growth),
)
ON_A_GPU: Sequence[Target] = (
    ("pool_nap, N=256: at least 0.9 of the copy bandwidth", -0.9, _POOL | {"samples": 256}, of("share_of_copy", -1)),
    ("score, N=256: at most 1.25 times its roofline", 1.25, _MAIN, rooflines),
    ("score, N=256: at least 10 times as fast as eager", -10, _MAIN, gain(REFERENCE)),
    ("score, N=256: at least 1.5 times as fast as torch.compile", -1.5, _MAIN, gain(COMPILED)),
    ("dual: at least 1000 times as fast a sample as autograd", -1000, _DUAL, gain(AUTOGRAD)),
    ("scores, N=256: at most 0.01 of a ResNet-50 forward", 0.01, _FORWARD | {"samples": 256}, of("ratio")),
    ("score, N=1: at most 0.03 ms", 0.03, _MAIN | {"samples": 1}, of("median_ms")),
    ("memory of a call, results included: at most 64 MiB", 64, {"workload": "R50"}, of("peak_mib")),
)


def words(row: Row) -> str:
    return " ".join(row[name] for name in ("workload", "shape", "dtype", "layout") if name in row)


def verdicts(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Target, the worst figure and where it was measured, and "met", "missed" or "not measured"."""
    timed = [row for row in document["rows"] if "median_ms" in row]
    for text, limit, wanted, figure_of in ON_A_GPU if "gpu" in document["machine"] else ON_A_CPU:
        rows = [row for row in timed if row.items() >= {"provider": OURS, **wanted}.items()]
        known = [(value, row) for row in rows if (value := figure_of(row, timed)) is not None]
        if not known:
            yield text, "–", "not measured"
            continue
        value, row = max(known, key=lambda pair: pair[0])
        yield text, f"{abs(value):,.3g} ({row['provider']} {words(row)})", "met" if value <= limit else "missed"


def newest(is_gpu: bool, folder: Path = RESULTS) -> tuple[Path, dict[str, Any]] | None:
    """The newest result file of a machine with or without a GPU."""
    found = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    right = [(path, document) for path, document in found if ("gpu" in document["machine"]) is is_gpu]
    return max(right, key=lambda pair: str(pair[1]["machine"]["date"])) if right else None


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, in plain notation."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}"
    return format(Decimal(f"{value:.{digits}g}"), ",f")


def made(path: Path, machine: Mapping[str, Any]) -> str:
    """Machine, versions, day and commit in a few words, and where the rows are."""
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    commit = (machine["commit"] or "unknown").rstrip("+")[:7]
    facts = f"{where}, torch {machine['torch']}, {machine['date'][:10]}, commit {commit}"
    return f"({facts}; [all rows](benchmarks/results/{path.name}))"


def table(rows: Sequence[Row], providers: Sequence[str], cell: Callable[[Row], str], *subjects: str) -> Iterator[str]:
    """A line a case of these subjects, a column a provider; a dash where it has no time."""
    yield from ("", f"| | {' | '.join(providers)} |", f"|---|{'---:|' * len(providers)}")
    timed = [row for row in rows if "median_ms" in row and row["provider"] in providers]
    for subject in subjects:
        for case in dict.fromkeys(row["case"] for row in timed if row["subject"] == subject):
            by = {row["provider"]: row for row in timed if row["case"] == case}
            first = next(iter(by.values()))
            cells = [cell(by[name]) if name in by else "–" for name in providers]
            yield f"| {f'{subject}: ' * (len(subjects) > 1)}{words(first)} | {' | '.join(cells)} |"


def time(row: Row) -> str:
    return f"{figure(row['median_ms'])} ± {figure(row['spread_ms'] / 2, 1)}"


def time_and_memory(row: Row) -> str:
    return f"{figure(row['median_ms'])} ({figure(row['peak_mib'], 2)})"


def targets(document: Mapping[str, Any]) -> list[str]:
    lines = [f"| {' | '.join(line)} |" for line in verdicts(document)]
    return ["", "| target | measured, at worst | |", "|---|---|---|", *lines]


def sections(path: Path, document: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a CPU's section."""
    rows, projections = document["rows"], [f"project {kind}" for kind in BASES]
    yield f"Measured by `make bench` {made(path, document['machine'])}:"
    yield "every row is compared with fp64 first, then all are timed in turns. Milliseconds a call, median ± half the interquartile"
    yield "range. All three methods for a batch, from the feature map on:"
    yield from table(rows, (OURS, REFERENCE, COMPILED, COPY), time, "score")
    yield from ("", "Methods that peers have too; in brackets MiB beyond the operands. A dash: not available.")
    yield from table(rows, (OURS, PLAIN, PYTORCH_OOD, OODEEL), time_and_memory, *MAKERS)
    yield from ("", "What scoring adds to a forward of torchvision's ResNet-50:")
    yield from table(rows, (FORWARD, OURS, ALONE, ALL), time, "engine around a forward")
    yield from ("", "Coordinates of last-layer gradients, milliseconds a sample:")
    yield from table(
        rows, (OURS, REFERENCE, PLAIN, AUTOGRAD), lambda row: figure(row["median_ms"] / row["samples"], 2), *projections
    )
    yield from ("", "Fitting from features:")
    yield from table(rows, (OURS, PLAIN), time_and_memory, "fit dual basis", "fit engine")
    yield from ("", "Targets:", *targets(document))
    for picture in sorted(path.parent.glob(f"{path.stem}-*.png")):
        name = picture.stem.removeprefix(path.stem + "-").capitalize()
        yield from ("", f"![{name}](benchmarks/results/{picture.name})")


def render(folder: Path = RESULTS) -> str:
    """The section, between its two marks."""
    cpu, gpu = newest(False, folder), newest(True, folder)
    lines = list(sections(*cpu)) if cpu else ["Not measured yet: `make bench`."]
    lines += ["", "### Speed on a GPU", ""]
    if gpu:
        lines += [f"Measured by `bash benchmarks/gpu.sh` {made(gpu[0], gpu[1]['machine'])}:", *targets(gpu[1])]
    else:
        lines.append(NO_GPU)
    return BEGIN + "\n".join(lines) + "\n" + END


def replaced(text: str, section: str) -> str:
    """The text with its section replaced; ValueError where the marks are not there once each, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the lines {BEGIN.strip()} and {END.strip()}")
    return before + section + after


def take(path: Path, folder: Path = RESULTS) -> None:
    """Put a result file and its pictures in the place of those of the same machine."""
    document = read(path)
    target = folder / name_of(document["machine"])
    write(target, document["machine"], document["rows"])
    draw(document["rows"], folder, target.stem)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The README's section on cost, from the result files.")
    parser.add_argument("file", type=Path, nargs="?", help="rows of `pytest benchmarks/`, for benchmarks/results/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the section is stale")
    parser.add_argument("--targets", action="store_true", help="write nothing; exit with 1 where a target is missed")
    options = parser.parse_args(argv)
    if options.targets:
        lines = list(verdicts(read(options.file)))
        print(*(f"{verdict:14}{text}: {figure}" for text, figure, verdict in lines), sep="\n")
        return int(any(verdict == "missed" for *_, verdict in lines))
    if options.file:
        take(options.file)
    text = README.read_text(encoding="utf-8")
    new = replaced(text, render())
    if options.check:
        if new != text:
            print("README.md: the section on cost is not what the result files say; run python -m benchmarks.readme")
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
