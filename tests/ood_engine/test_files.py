from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest

from ood_engine.errors import OodEngineError, one_line
from ood_engine.files import TEMPORARY, atomic_file, write_atomically


def test_a_file_appears_whole_with_the_permissions_of_any_new_file(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        (unfinished,) = os.listdir(path.parent)
        assert unfinished.endswith(TEMPORARY)
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(path.parent) == ["file"]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_leaves_the_older_file_and_no_remains(tmp_path, error):
    path, folder = tmp_path / "file", tmp_path / "unfinished"
    path.write_bytes(b"older")

    def broken():
        with atomic_file(path, folder) as file:
            file.write(b"newer")
            assert len(os.listdir(folder)) == 1
            raise error

    with pytest.raises(error):
        broken()
    assert path.read_bytes() == b"older"
    assert sorted(os.listdir(tmp_path)) == ["file", "unfinished"]
    assert os.listdir(folder) == []


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    path, older = tmp_path / "file", tmp_path / "older"
    older.write_bytes(b"older")
    path.hardlink_to(older)
    write_atomically(path, b"content")
    assert done == ["sync", "replace", "sync"]
    assert (path.read_bytes(), older.read_bytes()) == (b"content", b"older")


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path):
    path, other = tmp_path / "f[1]", tmp_path / "f[1].x"
    program = "import sys; from ood_engine.files import atomic_file\n"
    program += "with atomic_file(__import__('pathlib').Path(sys.argv[1])): print('open', flush=True); sys.stdin.read()"
    for target, is_killed in ((path, True), (path, False), (other, True)):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"open\n"
        if is_killed:
            process.kill()
            process.communicate()
        else:
            alive = process
    assert len(os.listdir(tmp_path)) == 2  # the second writer removed what the first had left
    write_atomically(path, b"content")
    assert len(os.listdir(tmp_path)) == 3
    alive.communicate(timeout=60)
    assert alive.returncode == 0
    assert path.read_bytes() == b""
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    handles = []

    def only_files(handle):
        handles.append(handle)
        if len(handles) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", only_files)
    assert write_atomically(str(tmp_path / "file"), b"content").read_bytes() == b"content"
    assert len(handles) == 2


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OodEngineError, match=r"cannot write '.*in' \(.+\), expected a writable file path") as caught:
        write_atomically(tmp_path / "file" / "in", b"")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "plain", "typed"),
    [
        (ValueError("a\n  b\tc"), "a b c", "ValueError: a b c"),
        (ValueError(), "ValueError", "ValueError"),
        (KeyError("\udc80"), "'\\udc80'", "KeyError: '\\udc80'"),
        (OSError("x" * 1000), "x" * 300, "OSError: " + "x" * 300),
    ],
)
def test_any_error_is_one_line(error, plain, typed):
    assert one_line(error) == plain
    assert one_line(error, with_type=True) == typed
