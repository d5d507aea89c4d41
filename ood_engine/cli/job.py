"""The identity of a computation in JSON values, by which an interrupted one is continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line

__all__ = ["as_json", "check_same_job"]


def as_json(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job as read back from a file, so that tuples and lists compare equal.

    Raises:
        InputError: other values than JSON has.
    """
    try:
        return dict(json.loads(json.dumps(dict(job), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise InputError(f"the job must hold JSON values only: {one_line(error)}") from error


def check_same_job(job_file: Path, job: dict[str, Any]) -> None:
    """Compare a job and its columns with those of an interrupted run.

    Raises:
        InputError: they differ, or the file cannot be read.
    """
    try:
        stored = json.loads(job_file.read_bytes())
        before, columns = dict(stored["job"]), dict(stored["columns"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{job_file}: cannot be read as a job; delete {job_file.parent} and start again") from error
    way_out = f"give the same arguments, or delete {job_file.parent} and start again"
    for key in sorted(before.keys() | job["job"].keys()):
        old, new = (json.dumps(side[key]) if key in side else "nothing" for side in (before, job["job"]))
        if old != new:
            raise InputError(f"--resume: {key!r} was {old} in the unfinished run and is {new} now; {way_out}")
    if list(columns.items()) != list(job["columns"].items()):
        raise InputError(
            f"--resume: 'columns' were {columns} in the unfinished run and are {job['columns']} now; {way_out}"
        )
