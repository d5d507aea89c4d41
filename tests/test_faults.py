"""The table of faults fits the tree, and the script that applies them tells what is caught from what survives."""

from __future__ import annotations

import runpy
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "faults.py")))


def test_every_fault_fits_the_tree(script):
    assert script.problems(script.read_faults(ROOT), ROOT) == []


def test_every_folder_is_held_to_account(script):
    faults = script.read_faults(ROOT)
    assert len(faults) >= 60
    counts = Counter(Path(fault.file).parent for fault in faults)
    files = [path for name in ("ood_engine", "kernels") for path in (ROOT / name).rglob("*.py")]
    folders = {path.parent.relative_to(ROOT) for path in files}
    assert {str(folder): counts[folder] for folder in folders if counts[folder] < 3} == {}


@pytest.fixture
def project(tmp_path):
    """A project of one function, one test, and a table that is written by the test."""

    def write(*faults):
        (tmp_path / "tests" / "faults").mkdir(parents=True)
        (tmp_path / "twice.py").write_text("def twice(x):\n    return 2 * x\n")
        (tmp_path / "tests" / "test_twice.py").write_text(
            "from twice import twice\n\n\ndef test_twice():\n    assert twice(2) == 4\n"
        )
        for number, (old, new, test) in enumerate(faults):
            (tmp_path / "tests" / "faults" / f"{number}.toml").write_text(
                f"[[fault]]\nname = 'fault {number}'\nfile = 'twice.py'\nold = '{old}'\nnew = '{new}'\n"
                f"tests = ['tests/test_twice.py::{test}']\nreason = 'wrong'\n"
            )
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
        return tmp_path

    return write


def test_what_no_test_sees_survives(script, project, capsys):
    root = project(("2 * x", "3 * x", "test_twice"), ("2 * x", "x + 2", "test_twice"))
    assert script.main(["--jobs", "2"], root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in sorted(lines[1:3])] == ["SURVIVED", "caught"]
    assert lines[3].startswith("1 of 2 faults caught")
    assert (root / "twice.py").read_text() == "def twice(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("2 + x", "3 * x", "test_twice"), "fault 0: its snippet occurs 0 times in twice.py, expected once"),
        (("x", "y", "test_twice"), "fault 0: its snippet occurs 2 times in twice.py, expected once"),
        (("2 * x", "2 * x", "test_twice"), "fault 0: changes nothing"),
        (("2 * x", "3 * x", "test_thrice"), "fault 0: there is no tests/test_twice.py::test_thrice"),
    ],
)
def test_a_fault_that_does_not_fit_is_refused_in_one_line(script, project, capsys, fault, message):
    assert script.main([], project(fault)) == 2
    assert capsys.readouterr().err.splitlines() == [f"faults: {message}"]


def test_tests_that_fail_by_themselves_are_told(script, project, capsys):
    root = project(("2 * x", "3 * x", "test_twice"))
    (root / "twice.py").write_text("def twice(x):\n    return 3 * x\n\n\ndef half(x):\n    return 2 * x\n")
    assert script.main([], root) == 1
    assert "the tests do not pass without any fault" in capsys.readouterr().err


def test_a_test_that_never_ends_is_no_answer(script, project, capsys):
    root = project(("return 2 * x", "while True: pass", "test_twice"))
    assert script.main(["--limit", "2"], root) == 1
    assert "no answer after 2 s" in capsys.readouterr().out
