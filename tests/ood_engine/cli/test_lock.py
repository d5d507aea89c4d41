"""One run at a time: runs that live, that were killed, that live elsewhere, and rows of two runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ood_engine.cli import lock
from ood_engine.cli.lock import Lock
from ood_engine.cli.results import ResultWriter
from ood_engine.errors import InputError, OodEngineError

COLUMNS = {"row": "int"}


def writer_of(path: Path, resume: bool = True) -> ResultWriter:
    return ResultWriter(path, COLUMNS, job={}, resume=resume)


# Writes two parts, says so, and waits.
CHILD = """
import sys
sys.path[:0] = {path!r}
from ood_engine.cli.results import ResultWriter
writer = ResultWriter(sys.argv[1], {{"row": "int"}}, job={{}})
for start in (0, 10): writer.write({{"row": list(range(start, start + 10))}})
print("written", flush=True)
sys.stdin.read()
"""


def test_no_run_joins_one_that_lives_and_any_continues_one_that_was_killed(tmp_path):
    path = tmp_path / "scores.parquet"
    command = [sys.executable, "-c", CHILD.format(path=sys.path), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "written\n"
        for resume in (True, False):
            with pytest.raises(
                InputError, match=rf"scores.parquet: process {child.pid} on host .* is writing it; wait"
            ):
                writer_of(path, resume)
        child.kill()
    assert (tmp_path / "scores.parquet.lock").exists()
    with writer_of(path) as writer:
        assert writer.rows_done == 20
        writer.finish(20)
    assert os.listdir(tmp_path) == ["scores.parquet"]


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("where", ["another host", "no locks"])
def test_a_run_that_cannot_be_looked_up_is_told_with_a_way_out(tmp_path, monkeypatch, where):
    path, file = tmp_path / "scores.csv", tmp_path / "scores.csv.lock"
    if where == "no locks":
        monkeypatch.setattr(fcntl, "flock", without_locks)
        first = writer_of(path)
    else:
        file.write_text(json.dumps({"host": "elsewhere", "process": 7}))
    owner = "process 7 on host 'elsewhere'" if where == "another host" else f"process {os.getpid()} on host"
    with pytest.raises(InputError, match=rf"{owner}.* was writing it, .* if it has ended, delete {file} and repeat"):
        writer_of(path)
    file.unlink()
    writer_of(path).close()
    if where == "no locks":
        first.close()
    assert not file.exists()


def test_two_runs_whose_lock_was_deleted_do_not_mix_their_rows(tmp_path):
    path = tmp_path / "scores.csv"
    first = writer_of(path)
    first.write({"row": [0]})
    first.close()
    second = writer_of(path)
    second.write({"row": [1]})
    with pytest.raises(OodEngineError, match=r"part-00001.parquet: another run writes this table as well; stop both"):
        first.write({"row": [1]})
    second.finish(2)
    with pytest.raises(OodEngineError, match="0 parts hold 0 rows, expected 1 rows in 1 parts"):
        first.finish(1)
    assert path.read_text().split() == ['"row"', "0", "1"]


def test_a_lock_released_while_another_takes_it_is_taken_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / "lock", fcntl.flock
    first = Lock(path, "table")

    def late(handle: int, how: int) -> None:
        first.release()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Lock(path, "table")
    assert path.exists()
    with pytest.raises(InputError, match="is writing it"):
        Lock(path, "table")
    second.release()
    second.release()
    assert not path.exists()


def test_of_many_that_want_a_lock_left_behind_one_has_it_at_a_time(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": lock.socket.gethostname(), "process": 1}))
    inside, most, taken = [], [], []

    def work() -> None:
        for _ in range(200):
            try:
                held = Lock(path, "table")
            except InputError:
                continue
            inside.append(1)
            most.append(len(inside))
            taken.append(1)
            inside.pop()
            held.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken
    assert max(most) == 1
    assert not path.exists()
