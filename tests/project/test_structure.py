"""The tests are laid out as the packages are, and stand on helpers, not on each other."""

import ast
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "mos_cli"
FILES = sorted(TESTS.rglob("*.py"))
BESIDE = {"benchmarks", "project"}
"""Folders of tests that are of no package."""


def imported(path: Path) -> list[str]:
    """The dotted names that a file imports: of `from a import b` both a and a.b."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_only_helpers_are_imported_from_tests(path: Path) -> None:
    modules = {file.stem for file in FILES if file.parent != TESTS / "helpers"}
    names = [name for name in imported(path) if name != "tests" and not name.startswith("tests.helpers")]
    assert [name for name in names if name.split(".")[0] in {"", "tests", *modules}] == []


def test_every_package_has_its_folder_of_tests() -> None:
    packages = {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}
    assert {path.parent.name for path in FILES if path.name.startswith("test_")} == packages | BESIDE


def test_no_two_test_modules_have_one_name() -> None:
    counts = Counter(path.name for path in FILES if path.name.startswith("test_"))
    assert [name for name, count in counts.items() if count > 1] == []
