"""The examples in docstrings run, and the public names have one."""

from __future__ import annotations

import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ood_engine as oe
import ood_kernels as ok

ROOT = Path(__file__).parents[1]
PROMPT = re.compile(r"^\s*>>> ", re.MULTILINE)
ENGINE_NAMES = ("Engine", "FeatureCache", "Runtime", "Scores", "explain")


def modules_with_examples(root: Path) -> dict[str, str]:
    """Dotted name → source of the modules below a folder of packages with an example; none is imported."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): source
        for path, source in sources.items()
        if PROMPT.search(source)
    }


SOURCES = {
    name: source
    for package in (ROOT / "ood_engine", ROOT / "kernels" / "ood_kernels")
    for name, source in modules_with_examples(package.parent).items()
    if name.partition(".")[0] == package.name
}


def public_names() -> dict[str, object]:
    """What has to have an example: the operators and their tuples, the engine, its metrics and its detectors."""
    kernels = {name: getattr(ok, name) for name in ok.__all__}
    names = {
        f"ood_kernels.{name}": value
        for name, value in kernels.items()
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, tuple))
    }
    names |= {f"ood_engine.{name}": getattr(oe, name) for name in ENGINE_NAMES}
    names |= {f"ood_engine.metrics.{name}": getattr(oe.metrics, name) for name in oe.metrics.__all__}
    detectors = [type(oe.detectors.create_detector(name)) for name in oe.available_detectors()]
    return names | {f"ood_engine.detectors.{each.__name__}": each for each in detectors}


def run_examples(module: ModuleType) -> tuple[int, str]:
    """Number of examples that were run, and what failed; each docstring sees the names of its module, as in `python -m doctest`."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module)
    for test in tests:
        runner.run(test, out=report.append)
    return sum(len(test.examples) for test in tests), "".join(report)


@pytest.mark.parametrize("module", SOURCES)
def test_the_examples_of_a_module_run(module, tmp_path, monkeypatch):
    if module.startswith("ood_kernels.triton_kernels") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.chdir(tmp_path)
    count, failures = run_examples(import_module(module))
    assert not failures, failures
    assert count == len(PROMPT.findall(SOURCES[module])), "an example is where doctest does not look"


@pytest.mark.parametrize(("name", "value"), public_names().items(), ids=public_names())
def test_a_public_name_has_an_example(name, value):
    assert re.search(r"^Example:\n +>>> ", inspect.getdoc(value) or "", re.MULTILINE), f"{name}: no Example section"


@pytest.mark.parametrize(
    ("source", "count", "failure"),
    [
        ('def one():\n    """One.\n\n    >>> 1 + 1\n    2\n    """', 1, ""),
        ('def one():\n    """One.\n\n    >>> 1 + 1\n    3\n    """', 1, "Expected:\n    3\nGot:\n    2"),
        ('def one():\n    """One.\n\n    >>> two()\n    """', 1, "NameError"),
        (
            'def one():\n    """One.\n\n    >>> import warnings\n    >>> warnings.warn("old")\n    """',
            2,
            "UserWarning: old",
        ),
        ('ONE = 1\n"""One.\n\n>>> ONE\n1\n"""', 0, ""),
    ],
)
def test_what_fails_is_told(source, count, failure):
    module = ModuleType("module")
    exec(source, module.__dict__)
    found, report = run_examples(module)
    assert found == count
    assert failure in report
    assert bool(failure) == bool(report)
