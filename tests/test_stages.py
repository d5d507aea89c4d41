"""The stages of continuous integration: named, timed, and a failing one ends the run."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(stages: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail\nsource .ci/stages.sh\n{stages}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_every_stage_is_named_and_timed():
    done = run("stage first 1 true\nstage second 0 sleep 1.1")
    assert done.returncode == 0
    assert "== first (at most 1 min)" in done.stdout
    summary = done.stdout[done.stdout.index("== summary") :].splitlines()
    assert summary[1].split() == ["first", "0", "s", "of", "60"]
    assert summary[2].startswith("second ")
    assert summary[2].endswith(" s of 0  OVER ITS BUDGET")
    assert summary[3].startswith("total ")


@pytest.mark.parametrize("failing", ["false", "{ false; echo after; }", "exit 3"])
def test_the_first_that_fails_is_told_and_ends_the_run(failing):
    done = run(f"bad() {{ {failing}; true; }}\nstage good 1 true\nstage bad 1 bad\nstage never 1 true")
    assert done.returncode == (3 if "exit" in failing else 1)
    assert "never" not in done.stdout
    assert "after" not in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("FAILED")] == ["bad"]


def test_every_extra_that_is_installed_somewhere_exists():
    keywords = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (extras,) = [node.value for node in keywords if node.arg == "extras_require"]
    known = {key.value for key in extras.keys}
    places = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / ".ci").iterdir(),
        *ROOT.rglob("ood_engine/**/*.py"),
    ]
    for place in places:
        for names in re.findall(r"(?:ood-engine|\.)\[([a-z,]+)\]'", place.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= known, (place, names)
