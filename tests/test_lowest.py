"""setup.py names no version lower than one that continuous integration runs."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: Version(str(each.specifier).removeprefix("==")) for each in requirements}


@pytest.fixture
def setup(monkeypatch) -> dict:
    """What setup.py gives to setuptools."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return given


def test_every_lower_bound_is_the_lowest_version_that_is_run(setup):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = [requirement for extra in setup["extras_require"].values() for requirement in extra]
    bounds = {}
    for requirement in map(Requirement, [*setup["install_requires"], *extras, *build]):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        bounds[requirement.name] = Version(bound.version)
    run = pins()
    assert {name: run.get(name) for name in bounds} == bounds


def test_the_oldest_python_is_the_one_that_is_checked(setup):
    oldest = setup["python_requires"].removeprefix(">=")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["python_version"] == oldest
    assert tools["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert sys.version_info[:2] >= tuple(map(int, oldest.split(".")))
