"""Which torch a machine without a GPU gets, from indexes of tiny wheels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from constraints import choose_torch

SCRIPT = Path(choose_torch.__file__)
PINNED = choose_torch.PINNED


def put_wheel(folder: Path, name: str, version: str, requires: str = "", padding: int = 0) -> int:
    """Write an installable wheel; returns its bytes."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}/data", bytes(padding))
        wheel.writestr(f"{info}/RECORD", "")
    return path.stat().st_size


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """ask() runs the script with pip seeing the wheels of tmp_path alone."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, check=False)

    return run


def test_takes_the_cpu_build_without_a_word(tmp_path, ask):
    for version in ("99.0", PINNED, f"{PINNED}+cpu"):
        put_wheel(tmp_path, "torch", version, "nvidia_cublas")
    answer = ask()
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"torch=={PINNED}+cpu\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's default build has no CUDA")
def test_says_what_the_default_build_weighs_and_how_to_avoid_it(tmp_path, ask):
    total = put_wheel(tmp_path, "torch", PINNED, "nvidia_cublas", padding=1_000_000)
    total += put_wheel(tmp_path, "nvidia_cublas", "13.1", padding=2_000_000)
    answer = ask()
    assert (answer.returncode, answer.stdout) == (0, f"torch=={PINNED}\n")
    assert f"no CPU build of torch: taking its torch {PINNED}." in answer.stderr
    assert "PIP_EXTRA_INDEX_URL" in answer.stderr
    assert f"2 packages of {total / 1e6:,.1f} MB; the largest are nvidia" in answer.stderr
    assert answer.stderr.index("Ctrl-C") < answer.stderr.index("To download")


def test_without_any_torch_says_so(ask):
    answer = ask()
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "pip finds no torch for this Python and platform: expected 2.13 or later" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        (["99.0", f"{PINNED}+cpu", PINNED], f"{PINNED}+cpu"),
        (["99.0", "98.1+cpu", "98.0+cpu", PINNED], "98.1+cpu"),
        (["99.0", PINNED, "2.8.0"], PINNED),
        (["99.0", "98.0"], "99.0"),
    ],
)
def test_prefers_a_cpu_build_then_the_pinned_version_then_the_newest(versions, chosen):
    assert choose_torch.choose(versions) == chosen


def test_a_size_that_is_not_told_is_said(tmp_path):
    (tmp_path / "some.whl").write_bytes(bytes(1234))
    assert choose_torch.size((tmp_path / "some.whl").as_uri()) == 1234
    assert choose_torch.size((tmp_path / "none.whl").as_uri()) is None
    assert choose_torch.summary({"torch": 526_000_000, "a": 10_000, "b": None}) == (
        "2 packages of 526.0 MB and 1 of unknown size; the largest are torch 526.0 MB, a 0.0 MB"
    )
    assert "cannot tell the megabytes" in choose_torch.summary({"torch": None})
    assert "cannot tell the megabytes" in choose_torch.summary({})
