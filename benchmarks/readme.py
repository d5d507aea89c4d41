"""Writes the README's section on cost from the result files: every figure in it is one that was measured and committed.

python -m benchmarks.readme FILE       # take FILE into benchmarks/results/, draw its pictures, rewrite the section
python -m benchmarks.readme            # rewrite the section
python -m benchmarks.readme --check    # exits with 1 where it is not what the files say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from .cases import AUTOGRAD, COMPILED, COPY, OURS, PLAIN, REFERENCE
from .engine import ALL, ALONE, FORWARD
from .kernels import VMAP
from .peers import METHODS, OODEEL, PYTORCH_OOD
from .plot import draw
from .rows import FOLDER, RESULTS, name_of, read, write
from .targets import evaluate

README = FOLDER.parent / "README.md"
BEGIN = "<!-- performance: written by benchmarks/readme.py from benchmarks/results/ -->\n"
END = "<!-- performance: end -->\n"
NO_GPU = """\
Not measured yet. `bash benchmarks/gpu.sh` does everything on a GPU machine, offline: the tests with compiled kernels, tuning,
benchmarks beside plain torch, `torch.compile`, per-sample autograd and a ResNet-50 forward, and a table that says of every target
whether it was met; see [benchmarks/](benchmarks/README.md#on-a-gpu).
"""

Row = Mapping[str, Any]


def newest(is_gpu: bool, folder: Path = RESULTS) -> tuple[Path, dict[str, Any]] | None:
    """The newest result file of a machine with or without a GPU."""
    found = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    right = [(path, document) for path, document in found if ("gpu" in document["machine"]) is is_gpu]
    return max(right, key=lambda pair: str(pair[1]["machine"]["date"])) if right else None


def figure(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, in plain notation; a dash for None."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}"
    return format(Decimal(f"{value:.{digits}g}"), ",f")


def made(machine: Mapping[str, Any]) -> str:
    """Machine, versions, day and commit in a few words."""
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    commit = (machine["commit"] or "unknown").rstrip("+")[:7]
    return f"{where}, torch {machine['torch']}, {machine['date'][:10]}, commit {commit}"


def table(rows: Sequence[Row], providers: Sequence[str], cell: Any, subjects: Sequence[str]) -> Iterator[str]:
    """A line a case of these subjects, a column a provider."""
    yield f"| | {' | '.join(providers)} |"
    yield f"|---|{'---:|' * len(providers)}"
    for subject in subjects:
        for case in dict.fromkeys(row["case"] for row in rows if row["subject"] == subject):
            by = {row["provider"]: row for row in rows if row["case"] == case}
            if not any("median_ms" in by.get(provider, {}) for provider in providers):
                continue
            first = next(iter(by.values()))
            words = [
                f"{subject}:" * (len(subjects) > 1),
                *(first.get(name) for name in ("workload", "shape", "dtype", "layout")),
            ]
            yield f"| {' '.join(word for word in words if word)} | {' | '.join(cell(by.get(name)) for name in providers)} |"


_METHODS = list(dict.fromkeys(method for methods in METHODS.values() for method in methods))


def time(row: Row | None) -> str:
    """Median and spread."""
    return (
        "–"
        if row is None or "median_ms" not in row
        else f"{figure(row['median_ms'])} ± {figure(row['spread_ms'] / 2, 1)}"
    )


def time_and_memory(row: Row | None) -> str:
    """Median, the samples where they are not those of the case, and MiB."""
    if row is None or "median_ms" not in row:
        return "–"
    fewer = (
        f" for {row['samples']}" if f"N={row.get('samples')}" not in row["shape"].split() and "samples" in row else ""
    )
    return f"{figure(row['median_ms'])}{fewer} ({figure(row['peak_mib'], 2)})"


def per_sample(row: Row | None) -> str:
    """Milliseconds a sample."""
    return "–" if row is None or "median_ms" not in row else figure(row["median_ms"] / row["samples"], 2)


def targets(document: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| target | measured, at worst | |", "|---|---|---|")
    for one in evaluate(document["rows"], "gpu" in document["machine"]):
        yield f"| {one.target} | {one.figure or '–'} | {one.verdict} |"


def sections(path: Path, document: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a CPU's section."""
    rows, where = document["rows"], f"benchmarks/results/{path.name}"
    yield f"Measured by `make bench` ({made(document['machine'])}; [all rows]({where})):"
    yield "every row is compared with fp64 first, then all are timed in turns. Milliseconds a call, median ± half the interquartile"
    yield "range. All three methods for a batch, from the feature map on:"
    yield ""
    yield from table(rows, (OURS, REFERENCE, COMPILED, COPY), time, ["score"])
    yield from (
        "",
        "Methods that peers have too; in brackets MiB beyond the operands. A dash: not available, or not at this size.",
        "",
    )
    yield from table(rows, (OURS, PLAIN, PYTORCH_OOD, OODEEL), time_and_memory, _METHODS)
    yield from ("", "What scoring adds to a forward of torchvision's ResNet-50:", "")
    yield from table(rows, (FORWARD, OURS, ALONE, ALL), time, ["engine around a forward"])
    yield from ("", "Coordinates of last-layer gradients, milliseconds a sample:", "")
    yield from table(
        rows,
        (OURS, REFERENCE, PLAIN, VMAP, AUTOGRAD),
        per_sample,
        [f"project {kind}" for kind in ("dual", "explicit", "factored")],
    )
    yield from ("", "Fitting from features:", "")
    yield from table(rows, (OURS, PLAIN, ALL, "scikit-learn"), time_and_memory, ["fit dual basis", "fit engine"])
    yield from ("", "Targets:", "")
    yield from targets(document)
    for picture in sorted(path.parent.glob(f"{path.stem}-*.png")):
        yield from (
            "",
            f"![{picture.stem.removeprefix(path.stem + '-').capitalize()}](benchmarks/results/{picture.name})",
        )


def render(folder: Path = RESULTS) -> str:
    """The section, between its two marks."""
    cpu, gpu = newest(False, folder), newest(True, folder)
    lines = list(sections(*cpu)) if cpu else ["Not measured yet: `make bench`."]
    lines += ["", "### Speed on a GPU", ""]
    if gpu:
        path, document = gpu
        lines += [
            f"Measured by `bash benchmarks/gpu.sh` ({made(document['machine'])}; [all rows](benchmarks/results/{path.name})):",
            "",
        ]
        lines += targets(document)
    else:
        lines += NO_GPU.splitlines()
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
    parser.add_argument(
        "file", type=Path, nargs="?", help="rows of `pytest benchmarks/` to take into benchmarks/results/"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the section is stale")
    options = parser.parse_args(argv)
    if options.file and not options.check:
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
