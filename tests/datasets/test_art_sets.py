"""Fetching packages with npm: once, pinned, and with the reason when it fails."""

from dataclasses import replace
from pathlib import Path

import pytest

from mos_cli.datasets.art.sets import SETS, Package, fetch_package
from mos_cli.errors import ModelError
from mos_cli.utils.files import sha256_of


@pytest.fixture
def package(tmp_path) -> Package:
    tarball = tmp_path / "served.tgz"
    tarball.write_bytes(b"any bytes: fetching looks at the hash only")
    return Package("@scope/names", "1.0.0", sha256_of(tarball), "MIT")


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Installs an npm that is a shell script of the test's choosing."""

    def install(script: str) -> None:
        file = tmp_path / "bin" / "npm"
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")

    return install


@pytest.fixture
def serving_npm(tmp_path, npm) -> Path:
    """An npm that serves the package and notes every run in the file returned."""
    log = tmp_path / "runs"
    npm(f'echo "$1 $2" >> {log}; cp {tmp_path}/served.tgz scope-names-1.0.0.tgz')
    return log


def test_a_package_is_fetched_once(tmp_path, package, serving_npm):
    kept = [fetch_package(package, tmp_path / "kept") for _ in range(2)]
    assert kept[0] == kept[1] == tmp_path / "kept" / "scope-names-1.0.0.tgz"
    assert sha256_of(kept[0]) == package.sha256
    assert serving_npm.read_text() == "pack @scope/names@1.0.0\n"


def test_what_npm_serves_must_be_what_is_pinned(tmp_path, package, serving_npm):
    with pytest.raises(ModelError, match="does not match its sha256"):
        fetch_package(replace(package, sha256="0" * 64), tmp_path / "kept")
    assert serving_npm.exists()
    assert not (tmp_path / "kept").exists()


def test_a_damaged_download_is_refused_and_named(tmp_path, package, serving_npm):
    kept = fetch_package(package, tmp_path)
    kept.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"scope-names-1\.0\.0\.tgz does not match .* delete it"):
        fetch_package(package, tmp_path)


def test_the_reason_npm_gives_is_passed_on(tmp_path, package, npm):
    npm('echo "npm warn old" >&2; echo "npm error code E404" >&2; exit 1')
    with pytest.raises(ModelError, match=r"npm cannot fetch @scope/names@1\.0\.0: code E404$"):
        fetch_package(package, tmp_path / "kept")


def test_a_missing_npm_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="npm is needed to fetch @iconify-json/noto"):
        fetch_package(SETS[3].package, tmp_path)
