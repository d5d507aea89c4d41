"""What the wheel contains."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"ood_engine": ROOT / "ood_engine", "ood_kernels": ROOT / "kernels" / "ood_kernels"}
CONFIG = "ood_kernels/triton_kernels/configs/some_gpu.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> set[str]:
    """The files that setuptools puts in a wheel, from a copy of the checkout with a tuned configuration."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    for name in ("ood_engine", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    config = checkout / "kernels" / CONFIG
    config.parent.mkdir(exist_ok=True)
    config.write_text("{}")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=120)
    folder = checkout / "built"
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_everything_but_the_tools_of_developers_is_in_the_wheel(built):
    files = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    left_out = {file for file in files if file.startswith(("ood_kernels/aot/", "ood_kernels/emulation/"))}
    assert {"ood_kernels/aot/__main__.py", "ood_kernels/emulation/__main__.py"} <= left_out
    assert built == files - left_out | {CONFIG}
    assert {"ood_kernels/cpu/pooling.cpp", "ood_kernels/tune.py", "ood_engine/py.typed"} <= built
