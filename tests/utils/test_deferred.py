"""Packages whose import is put off: nothing of them runs before they are used, and then all of it."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from mos_cli.utils.deferred import defer


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "mos_deferred_package"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("LOADED = []\n")
    (tmp_path / name / "part.py").write_text(f"import {name}\n{name}.LOADED.append('part')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for each in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[each]


def test_a_package_is_imported_when_an_attribute_is_used(package: str) -> None:
    defer(package)
    there = import_module(package)
    assert find_spec(package) is not None
    assert "LOADED" not in vars(there)
    assert there.LOADED == []
    assert sys.modules[package].LOADED is there.LOADED
    assert sys.modules[package] is not there
    with pytest.raises(AttributeError):
        _ = there.nothing


def test_a_part_of_it_is_imported_after_it(package: str) -> None:
    defer(package)
    part = import_module(f"{package}.part")
    assert sys.modules[package].part is part
    assert sys.modules[package].LOADED == ["part"]


def test_what_is_imported_or_not_there_stays_so(package: str) -> None:
    there = import_module(package)
    defer(package)
    assert sys.modules[package] is there
    defer("mos_no_such_package")
    assert "mos_no_such_package" not in sys.modules


def test_a_picture_needs_no_bitsandbytes() -> None:
    """diffusers imports it with its models."""
    code = "import sys, mos_cli.towers.understanding, bitsandbytes; sys.exit('bitsandbytes.nn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
