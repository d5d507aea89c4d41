"""The host's work on a call, counted in Python calls; its time is for `python -m benchmarks.host`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stub would take the place of the GPU's driver")
def test_a_plan_takes_few_python_calls(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.host", "--quick", "--json", "score, dual basis", "pool_nap"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["way"] for row in rows] == ["as written", "plan"] * 2
    for row in rows:
        assert row["way"] != "plan" or row["python_calls"] <= 60, row
