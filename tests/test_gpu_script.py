"""The script for a GPU machine, with an interpreter that only notes what it is asked to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OOD_BENCH") and name != "OUT"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=100)


@pytest.fixture
def fake_python(tmp_path):
    """Has a GPU, notes its arguments and does with them what a line of shell says."""

    def make(body: str) -> dict[str, str]:
        path = tmp_path / "python"
        note = f'echo "$*|$PYTHONPATH|$OOD_BENCH_COMMIT" >>{tmp_path}/calls'
        path.write_text(f'#!/bin/bash\n[ "$1" = -c ] && [[ "$2" == *cuda* ]] && exit 0\n{note}\n{body}\n')
        path.chmod(0o755)
        return {"PYTHON": str(path), "OUT": str(tmp_path / "out")}

    return make


def calls(tmp_path: Path) -> list[list[str]]:
    return [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]


def test_a_dry_run_lists_the_stages_within_nine_minutes():
    *stages, together = run("--dry-run", OUT="elsewhere").stdout.splitlines()
    seconds = [int(line.split()[-2]) for line in stages]
    assert [line.split()[0] for line in stages] == ["headline", "tests", "tuning", "benchmarks", "targets"]
    assert together == f"together at most {sum(seconds)} s; what comes out goes to elsewhere"
    assert sum(seconds) < 540
    assert not (ROOT / "elsewhere").exists()


def test_without_a_gpu_or_with_a_wrong_word_it_says_so(tmp_path):
    done = run(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", OUT=str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (2, "gpu.sh: nothing to measure on: torch finds no GPU\n")
    assert not (tmp_path / "out").exists()
    assert run("--fast").returncode == 64


def test_a_failed_stage_stops_none_and_a_file_without_its_package_is_skipped(fake_python, tmp_path):
    body = """case "$*" in
-c*) exit 1;;
*ood_kernels.tune*) exit 7;;
*test_readme*) echo "E   ModuleNotFoundError: No module named 'nobody_has_it'"; exit 2;;
*test_gpu_script*) exit 1;;
esac"""
    done = run(**fake_python(body), OOD_BENCH_SITE="/carried", PYTHONPATH="/own", OOD_BENCH_COMMIT="abc")
    assert done.returncode == 1
    assert "== tuning: 0 s, FAILED: exit code 7" in done.stdout
    assert "SKIPPED (no nobody_has_it) tests/test_readme.py" in done.stdout
    assert "FAILED tests/test_gpu_script.py" in done.stdout
    assert done.stdout.count("FAILED tests/") == 1
    found = calls(tmp_path)
    assert all(call[1:] == ["kernels:.:/carried:/own", "abc"] for call in found)
    ran = [call[0] for call in found]
    assert "--quick benchmarks/kernels.py" in ran[0]
    files = [word for line in ran for word in line.split() if word.startswith("tests/")]
    assert sorted(files) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    assert "kernels" in files[0]
    for words, line in zip(("ood_kernels.tune", "benchmarks/engine.py", "readme --targets"), ran[-3:], strict=True):
        assert words in line


def test_a_process_that_broke_the_gpu_is_followed_by_one_that_resumes(fake_python, tmp_path):
    done = run("benchmarks", **fake_python('case "$*" in *--resume*) exit 0;; *) exit 3;; esac'))
    assert done.returncode == 0
    assert ["--resume" in call[0] for call in calls(tmp_path)] == [False, True]


def test_a_stage_that_hangs_is_stopped_and_the_next_one_runs(fake_python, tmp_path):
    body = 'case "$*" in *ood_kernels.tune*) exec sleep 50;; esac'
    done = run("tuning", "targets", **fake_python(body), OOD_BENCH_TOTAL="17")
    assert done.returncode == 1
    # Of 17 s, 15 are kept for what follows; a start that took one leaves one.
    assert re.search("FAILED: stopped after [12] s", done.stdout)
    assert len(calls(tmp_path)) == 2
