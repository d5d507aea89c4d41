"""Which module imports which: read from the source, lazy and typing imports too, so that nothing has to be loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ood_engine": ROOT / "ood_engine", "ood_kernels": ROOT / "kernels" / "ood_kernels"}


class Import(NamedTuple):
    """One name that a module asks of another; `name` is None where the module itself is meant, here known as `bound`."""

    module: str
    name: str | None
    is_relative: bool
    bound: str = ""


class Source:
    """The modules of some packages, parsed.

    Args:
        folders: package → its folder.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.trees: dict[str, ast.Module] = {}
        self.packages: set[str] = set()
        for package, folder in folders.items():
            for path in sorted(folder.rglob("*.py")):
                parts = [package, *path.relative_to(folder).with_suffix("").parts]
                if parts[-1] == "__init__":
                    parts.pop()
                    self.packages.add(".".join(parts))
                self.trees[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
        self.imports = {module: list(self._read(module)) for module in self.trees}

    def _read(self, module: str) -> Iterator[Import]:
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, None, False, alias.asname or alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(module, node.module or "", node.level)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    found = (inner, None) if inner in self.trees else (base, alias.name)
                    yield Import(*found, bool(node.level), alias.asname or alias.name)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                yield from self._dynamic(module, node.args[0])

    def _dynamic(self, module: str, name: ast.expr) -> Iterator[Import]:
        """Of `import_module`: the module named, or every module of this package where the name is put together."""
        if isinstance(name, ast.Constant):
            level = len(name.value) - len(name.value.lstrip("."))
            yield Import(self._absolute(module, name.value.lstrip("."), level), None, bool(level))
        else:
            yield from (Import(each, None, True) for each in self.trees if each.rpartition(".")[0] == module)

    def _absolute(self, module: str, name: str, level: int) -> str:
        if not level:
            return name
        parts = module.split(".") if module in self.packages else module.split(".")[:-1]
        return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name])])

    def defining(self, module: str, name: str | None) -> str:
        """The module that a name comes from: what a package re-exports belongs to the file that it takes it from."""
        if name is not None and module in self.packages:
            for node in ast.walk(self.trees[module]):
                if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
                    original = next(alias.name for alias in node.names if name == (alias.asname or alias.name))
                    base = self._absolute(module, node.module or "", node.level)
                    inner = f"{base}.{original}"
                    return inner if inner in self.trees else self.defining(base, original)
        return module

    def edges(self) -> dict[str, set[str]]:
        """Module → the modules that it imports, of those that were read."""
        found = {
            module: {self.defining(each.module, each.name) for each in imports if each.module in self.trees}
            for module, imports in self.imports.items()
        }
        # `import x.y` in a package's own __init__ re-exports; it is no import of itself.
        return {module: targets - {module} for module, targets in found.items()}

    def private(self) -> set[tuple[str, str]]:
        """(importer, name) for every private name, imported or reached through a module, of another module."""
        found = set()
        for module, imports in self.imports.items():
            found |= {
                (module, f"{each.module}.{each.name}")
                for each in imports
                if each.module in self.trees and each.name and is_private(each.name)
            }
            modules = {each.bound: each.module for each in imports if each.module in self.trees and not each.name}
            found |= {
                (module, f"{modules[node.value.id]}.{node.attr}")
                for node in ast.walk(self.trees[module])
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                if node.value.id in modules and is_private(node.attr)
            }
        return found


def is_private(name: str) -> bool:
    """Whether it starts with one underscore, or is mangled; `__version__` and the like are public."""
    return name.startswith("_") and not name.endswith("__")


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or by way of others."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = edges[waiting.pop()] - found
            found |= fresh
            waiting += fresh
        return found

    all_reached = {module: reached(module) for module in edges}
    groups = {
        frozenset(other for other in found if module in all_reached[other])
        for module, found in all_reached.items()
        if module in found
    }
    return sorted(sorted(group) for group in groups)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(FOLDERS)


def test_no_modules_import_each_other(source):
    assert circles(source.edges()) == []


def test_no_private_name_is_used_across_modules(source):
    assert source.private() == set()


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_themselves_relatively(source, package):
    absolute = {
        (module, each.module)
        for module, imports in source.imports.items()
        for each in imports
        if module.split(".")[0] == package == each.module.split(".")[0] and not each.is_relative
    }
    assert absolute == set()


@pytest.mark.parametrize(("package", "forbidden"), [("ood_kernels", "ood_engine"), ("ood_engine", "triton")])
def test_arrows_point_one_way(source, package, forbidden):
    found = {
        (module, each.module)
        for module, imports in source.imports.items()
        for each in imports
        if module.split(".")[0] == package and each.module.split(".")[0] == forbidden
    }
    assert found == set()


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Source({"package": folder})


@pytest.mark.parametrize(
    "back",
    [
        "from .one import ONE",
        "from . import one",
        "from . import ONE",
        "def late():\n    from .one import ONE",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import ONE",
        "from importlib import import_module\none = import_module('package.one')",
    ],
)
def test_every_kind_of_circle_is_found(back, tmp_path):
    files = {"__init__.py": "from .one import ONE", "one.py": "from .two import TWO\nONE = 1"}
    assert circles(write(tmp_path, {**files, "two.py": "TWO = 2"}).edges()) == []
    assert circles(write(tmp_path, {**files, "two.py": back}).edges()) == [["package.one", "package.two"]]


def test_what_a_package_itself_defines_is_no_re_export(tmp_path):
    files = {"room/__init__.py": "from .one import ONE\nTABLE = {}", "__init__.py": ""}
    assert circles(write(tmp_path, {**files, "room/one.py": "from ..room import TABLE"}).edges()) == [
        ["package.room", "package.room.one"]
    ]


def test_private_names_are_found_however_they_are_reached(tmp_path):
    files = {"__init__.py": "", "one.py": "_HIDDEN = 1", "two.py": "from .one import _HIDDEN"}
    files["three.py"] = "from . import one as other\nother._HIDDEN"
    assert write(tmp_path, files).private() == {
        ("package.two", "package.one._HIDDEN"),
        ("package.three", "package.one._HIDDEN"),
    }
