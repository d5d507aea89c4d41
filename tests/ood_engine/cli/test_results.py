"""The table writer: what is on disk after a kill, a full disk, a damaged part, and what reads back."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.cli import merge, results
from ood_engine.cli.results import ResultWriter
from ood_engine.errors import InputError, OodEngineError, OodEngineWarning

COLUMNS = {"path": "string", "energy": "float", "label": "int", "flagged": "bool", "error": "string"}
JOB = {"state": "abc123", "data": ["images", 40], "batch_size": 8}
NAN = math.nan
ENDINGS = pytest.mark.parametrize("ending", ["parquet", "csv"])


def make_rows(start: int, stop: int) -> dict[str, list]:
    numbers = range(start, stop)
    return {
        "path": [f"cat, {i}/'ü'\n\"{i}\".png" for i in numbers],
        "energy": [None if i % 7 == 0 else math.sin(i) * 10.0 ** (i % 30 - 15) for i in numbers],
        "label": [None if i % 5 == 0 else i - 3 for i in numbers],
        "flagged": [None if i % 7 == 0 else i % 2 == 0 for i in numbers],
        "error": ["unreadable" if i % 7 == 0 else None for i in numbers],
    }


def parts_of(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def write_parts(path: Path, start: int, stop: int, size: int = 8, resume: bool = False) -> ResultWriter:
    writer = ResultWriter(path, COLUMNS, job=JOB, resume=resume)
    for first in range(start, stop, size):
        writer.write(make_rows(first, min(first + size, stop)))
    return writer


def rows_resumed(path: Path, job: dict = JOB) -> int:
    with ResultWriter(path, COLUMNS, job=job, resume=True) as writer:
        return writer.rows_done


def uninterrupted(path: Path, size: int = 8) -> bytes:
    write_parts(path, 0, 40, size).finish(40)
    return path.read_bytes()


def read_back(path: Path) -> dict[str, list]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pydict()
    types = {"string": pyarrow.string(), "float": pyarrow.float64(), "int": pyarrow.int64(), "bool": pyarrow.bool_()}
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: types[kind] for name, kind in COLUMNS.items()},
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
    ).to_pydict()


@ENDINGS
def test_the_table_does_not_depend_on_the_parts(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(merge, "ROWS_PER_GROUP", 16)
    tables = {uninterrupted(tmp_path / f"scores.{ending}", size) for size in (1, 7, 8, 16, 40)}
    assert len(tables) == 1
    assert os.listdir(tmp_path) == [f"scores.{ending}"]
    back = read_back(tmp_path / f"scores.{ending}")
    assert back == make_rows(0, 40)
    assert list(back) == list(COLUMNS)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            st.none() | st.floats(allow_nan=False) | st.just(NAN),
            st.none() | st.integers(-(2**63), 2**63 - 1),
            st.none() | st.booleans(),
            st.none() | st.just("") | st.just("a,b"),
        ),
        max_size=12,
    ),
    st.sampled_from(["parquet", "csv"]),
    st.integers(1, 5),
)
def test_any_values_survive(values, ending, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scores.{ending}"
        writer = ResultWriter(path, COLUMNS, job={}, raw_csv=True)
        for first in range(0, len(values), size):
            part = values[first : first + size]
            writer.write({name: [row[k] for row in part] for k, name in enumerate(COLUMNS)})
        writer.finish(len(values))
        back = read_back(path)
    back["energy"] = [NAN if value is not None and math.isnan(value) else value for value in back["energy"]]
    assert back == {name: [row[k] for row in values] for k, name in enumerate(COLUMNS)}


FORMULAS = ["=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1"]
HARMLESS = ["a=1", "'quoted'", "", None, "line\n=1", " x"]


@pytest.mark.parametrize("raw", [False, True])
def test_a_csv_holds_no_text_that_a_spreadsheet_runs(tmp_path, raw):
    texts = FORMULAS + HARMLESS
    rows = {"path": texts, "energy": [-1.5] * len(texts), "error": texts[::-1]}
    for ending in ("csv", "parquet"):
        path = tmp_path / f"scores.{ending}"
        columns = {name: COLUMNS[name] for name in rows}
        with ResultWriter(path, columns, job={}, raw_csv=raw) as writer:
            writer.write(rows)
            writer.finish(len(texts))
        expected = [("" if raw or ending == "parquet" else "'") + text for text in FORMULAS] + HARMLESS
        back = read_back(path)
        assert back["path"] == expected
        assert back["error"] == expected[::-1]
        assert back["energy"] == rows["energy"]


# The child writes parts of 8 rows and is killed where its second argument says.
CHILD = """
import os, signal, sys
sys.path[:0] = {paths!r}
import tests_of_results as tests
from pathlib import Path
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
path, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "between": tests.write_parts(path, 0, 24); die()
writer = tests.write_parts(path, 0, 16 if moment == "part" else 40)
if moment == "part": os.fsync = die; writer.write(tests.make_rows(16, 24))
if moment == "merge": os.fsync = die; writer.finish(40)
"""


def run_killed(path: Path, moment: str, folder: Path) -> None:
    (folder / "tests_of_results.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    code = CHILD.format(paths=[str(folder), *sys.path])
    child = subprocess.run([sys.executable, "-c", code, str(path), moment], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("ending", "moment", "safe"),
    [
        ("parquet", "between", 24),
        ("csv", "between", 24),
        ("csv", "part", 16),
        ("parquet", "part", 16),
        ("parquet", "merge", 40),
    ],
)
def test_killed_and_resumed_gives_the_same_table(tmp_path, tmp_path_factory, ending, moment, safe):
    path = tmp_path / f"scores.{ending}"
    run_killed(path, moment, tmp_path_factory.mktemp("child"))
    assert not path.exists()
    assert bool(list(parts_of(path).glob("*.tmp"))) == (moment != "between")

    writer = ResultWriter(path, COLUMNS, job=JOB, resume=True)
    assert writer.rows_done == safe
    assert not list(parts_of(path).glob("*.tmp"))
    for first in range(writer.rows_done, 40, 8):
        writer.write(make_rows(first, first + 8))
    writer.finish(40)
    assert path.read_bytes() == uninterrupted(tmp_path / f"whole.{ending}")


def test_a_kill_while_the_parts_are_removed_leaves_a_complete_table(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    with monkeypatch.context() as patch:
        patch.setattr(results.shutil, "rmtree", lambda *_, **__: None)
        uninterrupted(path)
    assert (tmp_path / "scores.csv.parts.merged").is_dir()
    with pytest.raises(InputError, match="already complete"):
        ResultWriter(path, COLUMNS, job=JOB, resume=True)
    assert os.listdir(tmp_path) == ["scores.csv"]


def test_a_path_with_a_slash_becomes_a_folder_of_parts(tmp_path):
    path = f"{tmp_path / 'scores'}/"
    write_parts(path, 0, 24).close()
    assert os.listdir(tmp_path) == ["scores.parts"]
    with pytest.raises(InputError, match="use --resume to continue"):
        write_parts(path, 0, 8)
    write_parts(path, 24, 40, resume=True).finish(40)
    assert os.listdir(tmp_path) == ["scores"]
    assert sorted(os.listdir(path)) == ["_job.json", *(f"part-{i:05d}.parquet" for i in range(5))]
    assert pyarrow.parquet.read_table(path).to_pydict() == make_rows(0, 40)
    for resume in (False, True):
        with pytest.raises(InputError, match="the table is a folder already; give a new name"):
            ResultWriter(path, COLUMNS, job=JOB, resume=resume)


def drop_the_last_part(folder: Path) -> None:
    (folder / "part-00004.parquet").unlink()


def copy_a_part(folder: Path) -> None:
    shutil.copy(folder / "part-00000.parquet", folder / "part-00005.parquet")


@pytest.mark.parametrize("ending", ["parquet", "csv", "folder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_the_last_part, "4 parts hold 32 rows, expected 40 rows in 5 parts; .* continue with --resume"),
        (copy_a_part, "6 parts hold 48 rows, expected 40 rows in 5 parts; .* delete .*parts and start again"),
    ],
)
def test_a_table_has_a_row_for_every_image(tmp_path, ending, change, message):
    path = f"{tmp_path / 'scores'}/" if ending == "folder" else tmp_path / f"scores.{ending}"
    folder = parts_of(Path(path))
    with write_parts(path, 0, 40) as writer:
        with pytest.raises(OodEngineError, match="5 parts hold 40 rows, expected 41 rows in 5 parts"):
            writer.finish(41)
        change(folder)
        with pytest.raises(OodEngineError, match=message):
            writer.finish(40)
    assert os.listdir(tmp_path) == [folder.name]
    if change is copy_a_part:
        shutil.rmtree(folder)
    with ResultWriter(path, COLUMNS, job=JOB, resume=change is drop_the_last_part) as writer:
        for first in range(writer.rows_done, 40, 8):
            writer.write(make_rows(first, first + 8))
        writer.finish(40)


def truncate(part: Path) -> None:
    os.truncate(part, part.stat().st_size - 20)


def change_a_byte(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[content.index(b"unreadable")] ^= 1
    part.write_bytes(content)


def replace_columns(part: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"other": [1.0]}), part)


@pytest.mark.parametrize(
    ("damage", "damaged"),
    [(truncate, 4), (truncate, 1), (change_a_byte, 3), (Path.unlink, 2), (replace_columns, 1)],
)
def test_a_damaged_part_and_all_behind_it_are_computed_again(tmp_path, damage, damaged):
    path = tmp_path / "scores.csv"
    write_parts(path, 0, 40).close()
    damage(parts_of(path) / f"part-{damaged:05d}.parquet")
    left = 5 - damaged - (damage is Path.unlink)
    message = f"part-{damaged:05d}.parquet: the part is damaged or missing.* after row {8 * damaged}, and {left} part"
    with pytest.warns(OodEngineWarning, match=message):
        assert rows_resumed(path) == 8 * damaged
    assert len(os.listdir(parts_of(path))) == 1 + damaged
    write_parts(path, 8 * damaged, 40, resume=True).finish(40)
    assert path.read_bytes() == uninterrupted(tmp_path / "whole.csv")


def test_damage_found_while_merging_is_one_line(tmp_path):
    path = tmp_path / "scores.csv"
    writer = write_parts(path, 0, 16)
    (parts_of(path) / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(OodEngineError, match=r"part-00001.parquet: cannot be read .* continue with --resume"):
        writer.finish(16)
    writer.close()
    assert os.listdir(tmp_path) == ["scores.csv.parts"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(_, file, **__):
    file.write(b"PAR1half")
    no_space()


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("owner", "name", "broken", "stop"),
    [(os, "fsync", no_space, 24), (pyarrow.parquet, "write_table", half_written, 24), (os, "fsync", no_space, 40)],
)
def test_a_full_disk_keeps_the_rows_and_the_older_table_and_says_how_many(
    tmp_path, monkeypatch, ending, owner, name, broken, stop
):
    path = tmp_path / f"scores.{ending}"
    path.write_bytes(b"older")
    writer = write_parts(path, 0, stop)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        message = rf"No space left on device.*{stop} rows are safe.*--resume"
        with pytest.raises(OodEngineError, match=message) as caught:
            writer.finish(40) if stop == 40 else writer.write(make_rows(stop, stop + 8))
    assert "\n" not in str(caught.value)
    writer.close()
    assert path.read_bytes() == b"older"
    assert sorted(os.listdir(parts_of(path))) == ["_job.json", *(f"part-{i:05d}.parquet" for i in range(stop // 8))]
    path.unlink()
    write_parts(path, stop, 40, resume=True).finish(40)
    assert path.read_bytes() == uninterrupted(tmp_path / f"whole.{ending}")


def forbidden(self, *_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))


@pytest.mark.parametrize(
    ("owner", "name", "broken", "said"),
    [(Path, "mkdir", forbidden, "Permission denied"), (os, "fsync", no_space, "No space left on device")],
)
def test_an_error_at_the_start_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, owner, name, broken, said):
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(OodEngineError, match=rf"cannot write \({said}\); 0 rows are safe"):
        ResultWriter(tmp_path / "scores.csv", COLUMNS, job=JOB)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("job", "columns", "message"),
    [
        ({**JOB, "state": "other"}, COLUMNS, '\'state\' was "abc123" in the unfinished run and is "other" now'),
        ({**JOB, "data": ["images", 41]}, COLUMNS, "'data' was"),
        ({**JOB, "device": "cpu"}, COLUMNS, "'device' was nothing in the unfinished run"),
        ({key: JOB[key] for key in ("data", "batch_size")}, COLUMNS, "'state' was \"abc123\" .* is nothing now"),
        (JOB, {**COLUMNS, "nap": "float"}, "'columns' were"),
        (JOB, dict(reversed(COLUMNS.items())), "'columns' were"),
    ],
)
def test_another_job_is_refused(tmp_path, job, columns, message):
    path = tmp_path / "scores.parquet"
    write_parts(path, 0, 16).close()
    with pytest.raises(InputError, match=message):
        ResultWriter(path, columns, job=job, resume=True)
    assert rows_resumed(path, {**JOB, "data": ("images", 40)}) == 16


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"job": 3, "columns": {}}', b"\xff"])
def test_a_damaged_job_file_is_refused(tmp_path, content):
    path = tmp_path / "scores.parquet"
    write_parts(path, 0, 16).close()
    (parts_of(path) / "_job.json").write_bytes(content)
    with pytest.raises(InputError, match=r"_job.json: cannot be read as a job; delete .*scores.parquet.parts"):
        ResultWriter(path, COLUMNS, job=JOB, resume=True)


def test_resume_where_nothing_is_starts_from_the_beginning(tmp_path):
    path = tmp_path / "scores.csv"
    assert rows_resumed(path) == 0
    assert rows_resumed(path) == 0
    (parts_of(path) / "_job.json").unlink()
    write_parts(path, 0, 40, resume=True).finish(40)
    assert read_back(path) == make_rows(0, 40)


@ENDINGS
def test_no_rows_give_a_table_with_its_columns(tmp_path, ending):
    path = tmp_path / f"scores.{ending}"
    writer = ResultWriter(path, COLUMNS, job=JOB)
    writer.write(make_rows(0, 0))
    assert os.listdir(parts_of(path)) == ["_job.json"]
    assert os.listdir(tmp_path).count(path.name + ".lock") == 1
    writer.finish(0)
    writer.finish(0)
    assert read_back(path) == make_rows(0, 0)
    with pytest.raises(InputError, match="finished"):
        writer.write(make_rows(0, 1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"path": 3}, "column 'path' wants string or None"),
        ({"path": "\udcff"}, "column 'path' wants string or None"),
        ({"energy": "high"}, "column 'energy' wants float or None"),
        ({"label": 1.5}, "column 'label' wants int or None"),
        ({"label": 2**70}, "column 'label' wants int or None"),
        ({"flagged": 1}, "column 'flagged' wants bool or None"),
        ({"more": 1}, "rows have the columns"),
        ({"energy": [1.0, 2.0]}, "differ in length"),
    ],
)
def test_rows_that_do_not_fit_the_columns_are_refused(tmp_path, rows, message):
    writer = ResultWriter(tmp_path / "scores.csv", COLUMNS, job=JOB)
    changed = {name: value if isinstance(value, list) else [value] for name, value in rows.items()}
    with pytest.raises(InputError, match=message):
        writer.write({**make_rows(1, 2), **changed})
    assert writer.rows_done == 0
    writer.close()


@pytest.mark.parametrize(
    ("name", "columns", "job", "message"),
    [
        ("scores.txt", COLUMNS, JOB, "ends in '.txt'; use .parquet or .csv"),
        ("scores", COLUMNS, JOB, "ends in ''; use .parquet or .csv"),
        ("missing/scores.csv", COLUMNS, JOB, "needs the folder"),
        ("folder.csv", COLUMNS, JOB, "is a folder"),
        ("scores.csv", {}, JOB, "non-empty mapping"),
        ("scores.csv", ["path"], JOB, "non-empty mapping"),
        ("scores.csv", {"path": "text"}, JOB, "column 'path' has the type 'text'; expected one of string, float"),
        ("scores.csv", COLUMNS, {"state": object()}, "JSON values only"),
        ("scores.csv", COLUMNS, {"state": float("nan")}, "JSON values only"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, name, columns, job, message):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=message):
        ResultWriter(tmp_path / name, columns, job=job)
    assert os.listdir(tmp_path) == ["folder.csv"]


def test_a_file_in_the_place_of_the_parts_is_refused(tmp_path):
    (tmp_path / "scores.csv.parts").write_text("mine")
    with pytest.raises(InputError, match="a file is where the folder of parts belongs"):
        ResultWriter(tmp_path / "scores.csv", COLUMNS, job=JOB, resume=True)


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OodEngineError, match=r"pip install 'ood-engine\[cli\]'"):
        ResultWriter(tmp_path / "scores.csv", COLUMNS, job=JOB)
