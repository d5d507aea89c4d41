"""Writes the README's section on cost from the result files: every figure in it is one that was measured and committed.

The words are in `performance.md.j2`; the newest file of every benchmark in `results/` is read.

    python benchmarks/readme.py            # rewrites the section
    python benchmarks/readme.py --check    # exits with 1 where it is not what the files say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
BEGIN = "<!-- performance: written by benchmarks/readme.py from benchmarks/results/ -->\n"
END = "<!-- performance: end -->\n"

Row = Mapping[str, Any]


class Results:
    """The newest result file of one benchmark.

    Attributes:
        path: of the file, relative to the README.
        machine: facts about the machine.
    """

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path = path.relative_to(README.parent).as_posix()
        self.document = document
        self.machine: Mapping[str, Any] = document["machine"]
        self._rows: Sequence[Row] = document["rows"]

    def all(self, **wanted: Any) -> list[Row]:
        """The rows with these values, in their order."""
        return [row for row in self._rows if all(row.get(key) == value for key, value in wanted.items())]

    def one(self, **wanted: Any) -> Row:
        """The only row with these values; LookupError where there are none or several."""
        rows = self.all(**wanted)
        if len(rows) != 1:
            raise LookupError(f"{self.path}: {len(rows)} rows with {wanted}, expected one")
        return rows[0]

    def cases(self, **wanted: Any) -> list[Case]:
        """The cases of `ood-engine bench` with these values, in their order."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.all(**wanted):
            key = tuple(row[name] for name in ("subject", "workload", "shape", "dtype", "memory_format", "cache"))
            groups.setdefault(key, []).append(row)
        return [Case(rows) for rows in groups.values()]

    def largest_cases(self, *subjects: str) -> list[Case]:
        """Of each subject that was measured the case with most numbers to compute."""
        found = (self.cases(subject=subject) for subject in subjects)
        return [max(cases, key=lambda case: case.first["flops"] or 0) for cases in found if cases]

    @property
    def pictures(self) -> str:
        """Name of the folder beside the file that has its pictures."""
        return Path(self.path).stem

    @property
    def made(self) -> str:
        """Machine, versions, day and commit in a few words."""
        facts = self.machine
        commit = (facts["commit"] or "unknown").rstrip("+")[:7]
        where = facts.get("gpu") or f"{facts['cores']} cores of {facts['cpu']}"
        return f"{where}, torch {facts['torch']}, {facts['date'][:10]}, commit {commit}"


class Case:
    """The rows of one case of `ood-engine bench`, by provider."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {row["provider"]: row for row in rows}
        self.first = rows[0]

    @property
    def title(self) -> str:
        """Workload and sizes, and what else tells it apart."""
        row = self.first
        words = (row["workload"], row["shape"], row["dtype"], row["memory_format"], "cold" * (row["cache"] == "cold"))
        return ", ".join(word for word in words if word)

    @property
    def title_with_subject(self) -> str:
        """Method before the rest."""
        return f"{self.first['subject']}: {self.title}"

    def time(self, provider: str) -> str:
        """Median and spread in milliseconds; a dash where it was not measured."""
        row = self._rows.get(provider)
        if row is None or row["p50_ms"] is None:
            return "–"
        return f"{figure(row['p50_ms'])} ({figure(row['p5_ms'])}–{figure(row['p95_ms'])})"

    def memory(self, provider: str) -> str:
        """Peak extra memory."""
        row = self._rows.get(provider)
        return "–" if row is None else f"{figure(row['peak_extra_mib'], 2)} MiB"

    def figures(self, provider: str) -> str:
        """Milliseconds a call and MiB, with the samples of a call where it took fewer than the case has."""
        row = self._rows.get(provider)
        if row is None or row["p50_ms"] is None:
            return "–"
        fewer = "" if row["samples_run"] == row["N"] else f" for {row['samples_run']} samples"
        return f"{figure(row['p50_ms'])}{fewer} ({figure(row['peak_extra_mib'], 2)})"


def newest(name: str, folder: Path | None = None) -> Results | None:
    """The newest file of a benchmark; None where there is none."""
    paths = sorted((folder or FOLDER / "results").glob(f"{name}-*.json"))
    return Results(paths[-1], json.loads(paths[-1].read_text(encoding="utf-8"))) if paths else None


def figure(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, in plain notation; a dash for None."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}"
    return format(Decimal(f"{value:.{digits}g}"), ",f")


def render(find: Callable[[str], Results | None] = newest) -> str:
    """The section, between its two marks."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    return BEGIN + environment.get_template("performance.md.j2").render(newest=find).strip() + "\n" + END


def replaced(text: str, section: str) -> str:
    """The text with its section replaced; ValueError where the marks are not there once each, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the lines {BEGIN.strip()} and {END.strip()}")
    return before + section + after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The README's section on cost, from the result files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the section is stale")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    new = replaced(text, render())
    if options.check:
        if new != text:
            print("README.md: the section on cost is not what the result files say; run python benchmarks/readme.py")
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
