"""The sources of the art: pinned npm packages, fetched with the user's npm, verified, never executed."""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mos_cli.bundles.sources import offline
from mos_cli.errors import ModelError
from mos_cli.utils.files import atomic_write, sha256_of


@dataclass(frozen=True)
class Package:
    """One pinned npm package: its version and the sha256 of its tarball."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class ArtSet:
    """One style of pictures, its package, and its credit.

    `misnamed` are icons that do not show what their name says; they are left out.
    """

    style: str
    package: Package
    credit: str
    misnamed: tuple[str, ...] = ()


EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
)

SETS = (
    ArtSet(
        style="fluent-3d",
        package=Package(
            name="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            licence="MIT",
        ),
        credit="Fluent Emoji (3D) by Microsoft Corporation, packaged by LobeHub",
    ),
    ArtSet(
        style="fluent",
        package=Package(
            name="@iconify-json/fluent-emoji",
            version="1.2.7",
            sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
            licence="MIT",
        ),
        credit="Fluent Emoji (gradient) by Microsoft Corporation",
    ),
    ArtSet(
        style="fluent-flat",
        package=Package(
            name="@iconify-json/fluent-emoji-flat",
            version="1.2.6",
            sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            licence="MIT",
        ),
        credit="Fluent Emoji (flat) by Microsoft Corporation",
    ),
    ArtSet(
        style="noto",
        package=Package(
            name="@iconify-json/noto",
            version="1.2.9",
            sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            licence="Apache-2.0",
        ),
        credit="Noto Emoji by Google Inc",
    ),
    ArtSet(
        style="noto-v1",
        package=Package(
            name="@iconify-json/noto-v1",
            version="1.2.5",
            sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
            licence="Apache-2.0",
        ),
        credit="Noto Emoji (v1) by Google Inc",
        misnamed=("laptop", "pistol"),
    ),
    ArtSet(
        style="fxemoji",
        package=Package(
            name="@iconify-json/fxemoji",
            version="1.2.2",
            sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
            licence="Apache-2.0",
        ),
        credit="Firefox OS Emoji by Mozilla",
        misnamed=(
            "construction",
            "keyboard",
            "kissing",
            "personalcomputer",
            "pistol",
            "pout",
            "sheep",
            "sunglasses",
            "tramcar",
            "whitemediumstar",
        ),
    ),
    ArtSet(
        style="twemoji",
        package=Package(
            name="@iconify-json/twemoji",
            version="1.2.5",
            sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
            licence="CC-BY-4.0",
        ),
        credit="Twemoji by Twitter, Inc and other contributors",
    ),
    ArtSet(
        style="emojione",
        package=Package(
            name="@iconify-json/emojione",
            version="1.2.3",
            sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
            licence="CC-BY-4.0",
        ),
        credit="EmojiOne 2.3 by Emoji One",
        misnamed=("pistol",),
    ),
)


def fetch_package(package: Package, downloads: Path) -> Path:
    """The verified tarball of a package in `downloads`; fetched with `npm pack` if it is not there yet.

    Raises ModelError if npm is missing, cannot fetch the package, or the tarball does not match its sha256.
    """
    kept = downloads / package.tarball
    if kept.exists():
        _verify(kept, package, f"{kept} does not match its sha256: delete it and run again")
        return kept
    if offline():
        raise ModelError(
            f"HF_HUB_OFFLINE is set, and {package.tarball} is not in {downloads}: put it there, or unset it"
        )
    npm = shutil.which("npm")
    if npm is None:
        raise ModelError(
            f"npm is needed to fetch {package.name}: install Node.js, or put {package.tarball} in {downloads}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        fetched = Path(folder, package.tarball)
        if done.returncode or not fetched.exists():
            raise ModelError(
                f"npm cannot fetch {package.name}@{package.version}: {_complaint(done.stderr.decode(errors='replace'))}"
            )
        _verify(fetched, package, f"npm fetched a {package.name}@{package.version} that does not match its sha256")
        atomic_write(kept, fetched.read_bytes(), overwrite=True)
    return kept


def read_members(tarball: Path, accepts: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a tarball whose path is accepted, by path."""
    found = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            file = archive.extractfile(member) if accepts(member.name) else None
            if file is not None:
                found[member.name] = file.read()
    return found


def _verify(tarball: Path, package: Package, complaint: str) -> None:
    if (found := sha256_of(tarball)) != package.sha256:
        raise ModelError(f"{complaint} (expected {package.sha256[:12]}, found {found[:12]})")


def _complaint(stderr: str) -> str:
    errors = [
        line.split(maxsplit=2)[-1] for line in stderr.splitlines() if line.lower().startswith(("npm err", "npm error"))
    ]
    return "; ".join(errors[:2]) or "no reason given"
