"""Result tables on disk that survive a killed process and a full disk.

A truncated Parquet file is lost, because its footer comes last, and a truncated CSV goes unnoticed. Rows are therefore written as
small complete part files beside the table, and either merged into it at the end or kept as a folder of parts.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, OodEngineError, OodEngineWarning, one_line
from ..files import TEMPORARY, atomic_file
from .job import as_json, check_same_job
from .lock import Lock
from .merge import import_pyarrow, merge

__all__ = ["COLUMN_TYPES", "ResultWriter", "names_folder"]

COLUMN_TYPES = ("string", "float", "int", "bool")
ENDINGS = (".parquet", ".csv")
PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
JOB = "_job.json"
"""Readers of Parquet folders skip names that begin with an underscore."""


class ResultWriter:
    """Writes a table in parts, and resumes an interrupted one.

    The parts are `<path>.parts/part-00000.parquet`, `part-00001.parquet`, …, for every format: a truncated Parquet part is always
    detected, a truncated CSV is not. Each part is written under a temporary name, flushed to disk and renamed, so every part under
    its final name is complete. `finish` merges the parts with about one row group in memory; the result does not depend on the
    division into parts. For a path with a trailing slash the parts are the table, and `finish` renames their folder.

    One process writes a table at a time: `<path>.lock` names it until `close` or the end of a `with` block.

    Args:
        path: the table to write; the ending `.parquet`, `.csv` or `/` selects the format. An existing file is kept until `finish`
            replaces it; an existing folder is refused.
        columns: name → "string", "float" (64 bits), "int" (64 bits) or "bool", in table order. Every column may hold None: an empty
            cell in CSV, where an empty string is `""`. Floats round-trip bitwise.
        job: identity of the computation in JSON values (a digest of the state, the data and their number, …); a run is resumed
            only with an equal job.
        resume: continue from existing parts; without any, start from the beginning.
        raw_csv: write text to CSV as it is, without the apostrophe before what a spreadsheet would run.

    Raises:
        InputError: an unknown ending or column type, another process that writes the table, parts of an interrupted run without
            `resume`, or `resume` with a complete table or parts of another job.
        OodEngineError: pyarrow is not installed, or the disk is full or not writable.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, str],
        *,
        job: Mapping[str, Any],
        resume: bool = False,
        raw_csv: bool = False,
    ) -> None:
        self.path = Path(path)
        self._is_folder = names_folder(path)
        if not self._is_folder and self.path.suffix.lower() not in ENDINGS:
            raise InputError(
                f"{self.path}: the name ends in {self.path.suffix!r}; use .parquet or .csv, or a slash for a folder of parts"
            )
        if self.path.is_dir() or not self.path.parent.is_dir():
            problem = (
                "is a folder already"
                if self.path.is_dir()
                else f"needs the folder {self.path.parent}, which is missing"
            )
            raise InputError(f"{self.path}: the table {problem}; give a new name in a folder that exists")
        self.columns = _checked_columns(columns)
        self.parts_folder = self.path.with_name(self.path.name + ".parts")
        self.rows_done = 0
        self._arrow = import_pyarrow()
        self._raw_csv = raw_csv
        self._part_count = 0
        self._finished = False
        types = {"string": "string", "float": "float64", "int": "int64", "bool": "bool"}
        arrow_types = ((name, self._arrow.type_for_alias(types[kind])) for name, kind in self.columns.items())
        self._schema = self._arrow.schema(list(arrow_types))
        document = {"job": as_json(job), "columns": self.columns}
        with self._saving():
            self._lock = Lock(self.path.with_name(self.path.name + ".lock"), str(self.path))
        try:
            with self._saving():
                self._start(document, resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the table; what is not finished stays to be resumed."""
        self._lock.release()

    def write(self, rows: Mapping[str, list[Any]]) -> None:
        """Write rows, given as column → values (None if missing), as one part, safely on disk on return.

        Raises:
            InputError: missing or unknown columns, columns of unequal length, or values of the wrong type.
            OodEngineError: the part cannot be written; earlier rows are kept, none of this call are.
        """
        if self._finished:
            raise InputError(f"{self.path}: the table is finished; create a new ResultWriter to write another")
        table = self._table(rows)
        if table.num_rows == 0:
            return
        with self._saving(), atomic_file(self._part(self._part_count), exclusive=True) as file:
            self._arrow.parquet.write_table(table, file, write_page_checksum=True)
        self._part_count += 1
        self.rows_done += table.num_rows

    def read(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """The named columns of the rows written so far, those of earlier runs among them; before `finish`."""
        parts = [self._read(number).select(list(names)) for number in range(self._part_count)]
        return {name: [value for part in parts for value in part[name].to_pylist()] for name in names}

    def finish(self, rows: int) -> None:
        """Merge the parts into the table, atomically, and remove them.

        Raises:
            OodEngineError: the parts do not hold `rows` rows, or cannot be read or merged; they stay.
        """
        if self._finished:
            return
        self._check_rows(rows)
        # Renamed before deletion, because a kill during deletion would leave a gap in the parts.
        leftover = self._merged_folder()
        with self._saving():
            if not self._is_folder:
                with atomic_file(self.path, self.parts_folder) as file:
                    parts = (self._read(number) for number in range(self._part_count))
                    csv = self.path.suffix.lower() == ".csv"
                    merge(parts, self._schema, file, csv=csv, raw=self._raw_csv)
            os.replace(self.parts_folder, self.path if self._is_folder else leftover)
        self._finished = True
        shutil.rmtree(leftover, ignore_errors=True)
        self.close()

    def _start(self, job: dict[str, Any], resume: bool) -> None:
        shutil.rmtree(self._merged_folder(), ignore_errors=True)
        if self.parts_folder.exists():
            if not resume:
                raise InputError(
                    f"{self.parts_folder}: holds parts of an unfinished run; use --resume to continue, or delete it"
                )
            self._continue(job)
        elif resume and self.path.exists():
            raise InputError(f"{self.path}: the table is already complete; leave out --resume to compute it again")
        else:
            self.parts_folder.mkdir()
            try:
                self._save_job(job)
            except OodEngineError:
                with contextlib.suppress(OSError):
                    self.parts_folder.rmdir()
                raise

    def _continue(self, job: dict[str, Any]) -> None:
        """Check the job, delete incomplete parts and count the complete rows."""
        if not self.parts_folder.is_dir():
            raise InputError(f"{self.parts_folder}: a file is where the folder of parts belongs; move it away")
        for leftover in self.parts_folder.glob("*" + TEMPORARY):
            leftover.unlink()
        job_file = self.parts_folder / JOB
        parts = self._part_numbers()
        if not job_file.exists() and not parts:
            self._save_job(job)
            return
        check_same_job(job_file, job)
        for number in parts:
            rows = self._rows_of_part(number) if number == self._part_count else None
            if rows is None:
                self._drop([later for later in parts if later >= number])
                return
            self._part_count += 1
            self.rows_done += rows

    def _drop(self, numbers: list[int]) -> None:
        """Delete the parts from the first damaged or missing one on; their rows are recomputed."""
        warnings.warn(
            f"{self._part(self._part_count)}: the part is damaged or missing; the run goes on after row "
            f"{self.rows_done}, and {len(numbers)} part(s) from there on are recomputed",
            OodEngineWarning,
            stacklevel=5,
        )
        for number in numbers:
            self._part(number).unlink()

    def _part(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:05d}.parquet"

    def _part_numbers(self) -> list[int]:
        names = (PART_NAME.fullmatch(file.name) for file in self.parts_folder.glob("part-*"))
        return sorted(int(name[1]) for name in names if name)

    def _merged_folder(self) -> Path:
        return self.path.with_name(self.path.name + ".parts.merged")

    def _rows_of_part(self, number: int) -> int | None:
        """Number of rows of a part; None if it is unreadable or has other columns."""
        try:
            return int(self._read(number).num_rows)
        except OodEngineError:
            return None

    def _check_rows(self, wanted: int) -> None:
        """Hold the parts on the disk to the rows written, and these to the number wanted."""
        numbers = self._part_numbers()
        found = sum(self._read(number).num_rows for number in numbers)
        if numbers != list(range(self._part_count)) or found != wanted:
            way_out = "continue with --resume" if found < wanted else f"delete {self.parts_folder} and start again"
            raise OodEngineError(
                f"{self.parts_folder}: {len(numbers)} parts hold {found} rows, expected {wanted} rows in {self._part_count}"
                f" parts; something else changed them: {way_out}"
            )

    def _read(self, number: int) -> Any:
        part = self._part(number)
        try:
            with self._arrow.parquet.ParquetFile(part, page_checksum_verification=True) as file:
                table = file.read()
        except (OSError, ValueError) as error:
            raise OodEngineError(f"{part}: cannot be read ({one_line(error)}); continue with --resume") from error
        if not table.schema.equals(self._schema):
            raise OodEngineError(
                f"{part}: holds {table.schema.names}, not {self._schema.names}; continue with --resume"
            )
        return table

    def _table(self, rows: Mapping[str, list[Any]]) -> Any:
        if set(rows) != set(self.columns):
            raise InputError(
                f"rows have the columns {sorted(rows)}, expected {sorted(self.columns)}; give exactly these"
            )
        if len({len(values) for values in rows.values()}) > 1:
            lengths = {name: len(values) for name, values in rows.items()}
            raise InputError(f"the columns of the rows differ in length: {lengths}; use None for a missing value")
        arrays = []
        for field in self._schema:
            wanted, values = self.columns[field.name], rows[field.name]
            try:
                if wanted == "int":  # pyarrow would truncate 1.5 to 1
                    values = [None if value is None else operator.index(value) for value in values]
                arrays.append(self._arrow.array(values, type=field.type, from_pandas=False))
            except (ValueError, TypeError, OverflowError) as error:
                raise InputError(f"column {field.name!r} wants {wanted} or None: {one_line(error)}") from error
        return self._arrow.table(arrays, schema=self._schema)

    def _save_job(self, job: dict[str, Any]) -> None:
        with self._saving(), atomic_file(self.parts_folder / JOB) as file:
            file.write((json.dumps(job, indent=2) + "\n").encode("ascii"))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise OodEngineError(
                f"{error.filename}: another run writes this table as well; stop both, then continue with --resume"
            ) from error
        except OSError as error:
            raise OodEngineError(
                f"{self.path}: cannot write ({error.strerror or one_line(error)}); {self.rows_done} rows are safe in "
                f"{self.parts_folder.name}: free some space or grant access, then continue with --resume"
            ) from error


def names_folder(path: str | Path) -> bool:
    """Whether a path has a trailing slash, which `Path` would drop."""
    return str(path).endswith(("/", os.sep))


def _checked_columns(columns: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(columns, Mapping) or not columns:
        raise InputError(f"columns must be a non-empty mapping of name to type, got {columns!r}")
    for name, kind in columns.items():
        if not isinstance(name, str) or not name or kind not in COLUMN_TYPES:
            raise InputError(f"column {name!r} has the type {kind!r}; expected one of {', '.join(COLUMN_TYPES)}")
    return dict(columns)
