from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ood_kernels.cpu import library

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("c++") is None, reason="no C++ compiler, or Windows"
)

SOURCE = 'extern "C" int answer() { return 42; }\n'
COMPILER = """#!/bin/sh
echo started >> {folder}/starts
for argument; do [ "$previous" = -o ] && made=$argument; previous=$argument; done
echo "half a library" > "$made"
sleep {seconds}
exec c++ "$@"
"""
PROCESS = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("library", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
print(library.load(pathlib.Path(sys.argv[2]), ["answer"])["answer"]())
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    for name in ("CXX", "OOD_ENGINE_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OOD_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path) -> Path:
    file = tmp_path / "source.cpp"
    file.write_text(SOURCE)
    return file


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Put a compiler into CXX that leaves half a library for a while and counts how often it was started."""

    def install(seconds: float = 0.0) -> Path:
        file = tmp_path / "compiler"
        file.write_text(COMPILER.format(folder=tmp_path, seconds=seconds))
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))
        return file

    install()
    return install


@pytest.fixture
def starts(tmp_path):
    file = tmp_path / "starts"
    return lambda: len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def refused(caplog, source):
    """Load, which must fail and say why in one line."""

    def load() -> str:
        caplog.clear()
        assert library.load(source, ["answer"]) is None
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("ood_kernels", logging.WARNING)
        assert "plain torch" in record.getMessage()
        assert "\n" not in record.getMessage()
        return record.getMessage()

    return load


def answer(source: Path) -> int:
    functions = library.load(source, ["answer"])
    assert functions is not None
    return functions["answer"]()


def start_process(source: Path, module: str | Path = library.__file__) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(module), str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def assert_all_answer(processes: list[subprocess.Popen[str]]) -> None:
    results = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in results] == ["42\n"] * len(processes), results


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def test_a_library_that_is_there_is_loaded_without_a_process(source, monkeypatch, cache):
    assert answer(source) == 42
    assert cache.stat().st_mode & 0o777 == 0o700
    assert sorted(file.name for file in cache.iterdir()) == sorted(["lock", *(file.name for file in libraries(cache))])
    for module, name in ((subprocess, "Popen"), (os, "fork"), (os, "posix_spawn"), (os, "system")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("started a process"))
    assert answer(source) == 42


def test_processes_that_start_together_compile_once(source, compiler, starts, cache):
    compiler(seconds=0.5)
    assert_all_answer([start_process(source) for _ in range(6)])
    assert starts() == 1
    assert len(libraries(cache)) == 1


def test_without_locks_every_process_finds_a_whole_library(source, compiler, tmp_path):
    compiler(seconds=0.5)
    text, lock = Path(library.__file__).read_text(), "fcntl.flock(file, fcntl.LOCK_EX)"
    assert lock in text
    without = tmp_path / "without_locks.py"
    without.write_text(text.replace(lock, "raise OSError"))
    assert_all_answer([start_process(source, without) for _ in range(4)])


def test_a_process_killed_while_it_compiles_leaves_nothing_that_is_loaded(source, compiler, starts, cache):
    compiler(seconds=30)
    process = start_process(source)
    while not starts():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.communicate()
    assert libraries(cache) == []
    assert len(list(cache.iterdir())) == 2  # the lock and the folder it compiled in
    compiler()
    assert answer(source) == 42
    assert sorted(cache.iterdir()) == sorted([cache / "lock", *libraries(cache)])


FORKED = """
import os, sys, threading, time
import torch
from ood_kernels.cpu import pooling
starts, kill = sys.argv[1], sys.argv[2] == "kill"
thread = threading.Thread(target=pooling.is_compiled)
thread.start()
while not os.path.exists(starts):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    os.environ["CXX"] = "c++"  # the parent's compiler takes its time
    print("child", pooling.is_compiled(), flush=True)
    sys.exit()
if kill:
    os._exit(0)
thread.join()
print("parent", pooling.is_compiled(), flush=True)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("ending", ["wait", "kill"])
def test_a_child_forked_while_a_thread_compiles_does_not_hang(ending, compiler, tmp_path):
    compiler(seconds=1)
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path / "starts"), ending]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=12)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert sorted(out.split()) == sorted(["child", "True"] + ["parent", "True"] * (ending == "wait"))


def test_a_library_is_on_the_disk_before_its_name(source, monkeypatch, cache):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    assert answer(source) == 42
    assert done == ["sync", "replace", "sync"]


def test_source_compiler_and_cpu_each_have_a_library_of_their_own(
    source, compiler, starts, cache, monkeypatch, tmp_path
):
    def changed() -> bool:
        before = libraries(cache), starts()
        assert answer(source) == 42
        assert answer(source) == 42
        assert len(libraries(cache)) - len(before[0]) == starts() - before[1]
        return starts() > before[1]

    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(library, "_CPU_INFO", cpu)
    assert changed()
    # A clock rate or another processor is not another CPU.
    for text, is_another in (
        ("model name : A\ncpu MHz : 1000\nflags : sse avx\n\nmodel name : A\n", True),
        ("model name : A\ncpu MHz : 2000\nflags : sse avx\n\nmodel name : B\n", False),
        ("model name : A\ncpu MHz : 2000\nflags : sse avx avx512f\n", True),
        ("model name : B\ncpu MHz : 2000\nflags : sse avx avx512f\n", True),
    ):
        cpu.write_text(text)
        assert changed() == is_another
    source.write_text(SOURCE + "// changed\n")
    assert changed()
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -O1")
    assert changed()
    os.utime(tmp_path / "compiler", (1, 1))
    assert changed(), "another version of the compiler"
    monkeypatch.setattr(library, "_OPTIONS", (*library._OPTIONS, "-g"))
    assert changed()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "other content"])
def test_a_damaged_library_is_compiled_again(source, compiler, starts, cache, damage):
    assert answer(source) == 42
    (file,) = libraries(cache)
    whole = file.read_bytes()
    flipped = bytes([whole[len(whole) // 2] ^ 1])
    # Not in place: this process has the file mapped.
    file.unlink()
    file.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "one bit": whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :],
            "empty": b"",
            "other content": b"nonsense",
        }[damage]
    )
    assert answer(source) == 42
    assert starts() == 2
    assert any(library._digest(file) in file.name for file in libraries(cache))
    assert answer(source) == 42
    assert starts() == 2


def test_an_intact_file_that_cannot_be_loaded_is_compiled_again(source, compiler, starts, cache):
    assert answer(source) == 42
    (file,) = libraries(cache)
    stem = file.stem.rpartition("-")[0]
    file.unlink()
    other = cache / "other"
    other.write_bytes(b"for another system")
    other.rename(cache / f"{stem}-{library._digest(other)}.so")
    assert answer(source) == 42
    assert starts() == 2


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_folder_that_others_can_enter_is_not_used(source, refused, cache, mode):
    assert answer(source) == 42
    cache.chmod(mode)
    assert f"expected mode 0700 and owner {os.geteuid()}, found {mode:04o}" in refused()
    cache.chmod(0o700)
    assert answer(source) == 42


def test_a_folder_of_another_user_is_not_used(source, refused, cache, monkeypatch):
    assert answer(source) == 42
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert f"expected mode 0700 and owner {owner + 1}, found 0700 and {owner}" in refused()


def test_a_folder_that_cannot_be_written_serves_what_it_holds(source, refused, cache, monkeypatch):
    assert answer(source) == 42

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(library, "_locked", read_only)
    assert answer(source) == 42
    source.write_text(SOURCE + "// changed\n")
    assert "Read-only file system" in refused()


def test_a_folder_that_cannot_be_made_is_one_line(source, refused, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OOD_ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in refused()


@pytest.mark.parametrize(
    ("compiler", "text", "expected"),
    [
        ("/no/such/compiler", SOURCE, "found no '/no/such/compiler'"),
        ("false", SOURCE, "false failed: exit status 1"),
        ("'", SOURCE, "quotation"),
        ("c++", "no C++\n", "c++ failed: {}"),
        ("c++", "int nothing;\n", "answer"),
    ],
)
def test_without_a_library_that_has_the_functions_nothing_is_loaded(
    source, refused, monkeypatch, compiler, text, expected
):
    monkeypatch.setenv("CXX", compiler)
    source.write_text(text)
    assert expected.format(source) in refused()


def test_what_is_forbidden_is_not_even_said(source, cache, monkeypatch, caplog):
    monkeypatch.setenv("OOD_ENGINE_COMPILE", "0")
    assert library.load(source, ["answer"]) is None
    assert not caplog.records
    assert not cache.exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OOD_ENGINE_CACHE": "own", "XDG_CACHE_HOME": "{0}/xdg"}, "own"),
        ({"XDG_CACHE_HOME": "{0}/xdg"}, "xdg/ood-engine"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/ood-engine"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/ood-engine"),
    ],
)
def test_where_the_cache_is(source, monkeypatch, tmp_path, environment, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("OOD_ENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert answer(source) == 42
    assert len(libraries(tmp_path / expected)) == 1
