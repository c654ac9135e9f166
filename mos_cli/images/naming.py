"""The names of outputs, from a template."""

import os
import re
import sys
from collections.abc import Iterator
from datetime import date
from itertools import count
from pathlib import Path
from string import Formatter

from mos_cli.config.recipe import Recipe
from mos_cli.errors import InputError, UsageError
from mos_cli.images.companions import check_name
from mos_cli.images.outputs import SUFFIX_NAMES, SUFFIXES
from mos_cli.utils.files import NameTakenError, check_writable, expand

FIELDS = ("date", "number", "prompt", "seed", "model", "source")
IN_FOLDER = "{number}_{prompt}_s{seed}"
STDOUT = Path("-")
"""Stands for standard output, which takes one picture."""


class Naming:
    """Turns a template into unused paths, each returned once.

    Fields: {date} of today, {number} the next free one in the folder, {prompt} a slug, {seed}, {model},
    {source} the name of the edited picture's file without its suffix.

    Attributes:
        numbered: the template has {number}.
        overwrite: a picture that is there may be replaced; never one with a number, which makes a name of its own.

    Raises:
        UsageError: the template does not end in the suffix of a picture, or has unknown fields.
    """

    def __init__(self, template: str, *, overwrite: bool = False) -> None:
        self.template = template
        self.returned: set[Path] = set()
        self._fields: dict[Path, dict[str, object]] = {}
        self._numbers: dict[tuple[Path, str], int] = {}
        try:
            fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise UsageError(f"output '{template}' is not a template: {error}") from None
        for field, layout, conversion in fields:
            if field not in FIELDS or layout or conversion:
                raise UsageError(f"output '{template}': use {', '.join(f'{{{name}}}' for name in FIELDS)}, as they are")
        if "{number}" in str(Path(template).parent):
            raise UsageError("output field {number} belongs into the file's name, not into a folder's")
        if "\0" in template:
            raise UsageError("the output's name has a null character")
        if template != str(STDOUT) and Path(template).suffix.lower() not in SUFFIXES:
            raise UsageError(f"output '{template}' must end in {SUFFIX_NAMES}, or be a folder")
        self.numbered = "{number}" in template
        self.overwrite = overwrite and not self.numbered

    def existing(self, recipe: Recipe, source: Path | None) -> Path | None:
        """The file that is there under the name of a picture, if the name has no {number}; None if there is none."""
        if self.numbered or not (path := self._filled(recipe, source)).is_file():
            return None
        self.returned.add(path.absolute())
        return path

    def path(self, recipe: Recipe, source: Path | None = None) -> Path:
        """The path for a picture.

        Args:
            source: the file that is edited, for {source}.

        Raises:
            InputError: the path exists and may not be overwritten.
            UsageError: the path was returned before.
        """
        path = self._filled(recipe, source)
        if path.absolute() in self.returned:
            if path == STDOUT:
                raise UsageError("-o - writes one picture to standard output: name a folder for several")
            raise UsageError(
                f"several pictures would be written to {path}: add {self._different(path, recipe, source)} to the name"
            )
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            raise InputError(
                f"the system's encoding, {error.encoding}, has no name {path}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            ) from None
        if path != STDOUT:
            check_writable(path.parent)
            check_name(path, self.overwrite)
        self.returned.add(path.absolute())
        self._fields[path.absolute()] = _fields(recipe, source)
        return path

    def paths_after(self, path: Path, recipe: Recipe, source: Path | None = None) -> Iterator[Path]:
        """Further paths for a picture, after that of `path` was taken while it was drawn.

        With {number} in the template these are the next numbers, else the name with _2, _3 and so on.
        """
        for number in count(2):
            other = self._filled(recipe, source) if self.numbered else path.with_stem(f"{path.stem}_{number}")
            try:
                check_name(other, overwrite=False)
            except NameTakenError:
                continue
            if other.absolute() not in self.returned:
                self.returned.add(other.absolute())
                yield other

    def _filled(self, recipe: Recipe, source: Path | None) -> Path:
        if "{source}" in self.template and source is None:
            raise UsageError(f"output '{self.template}': {{source}} is the file that is edited, and there is none")
        path = Path(self.template.format(number="{number}", **_fields(recipe, source)))
        if "{number}" in path.name:
            path = path.with_name(path.name.replace("{number}", f"{self._next_number(path):04d}"))
        return path

    def _different(self, path: Path, recipe: Recipe, source: Path | None) -> str:
        """The fields that tell a picture apart from the one that has its path."""
        own = _fields(recipe, source)
        other = self._fields.get(path.absolute(), own)
        return " or ".join(f"{{{name}}}" for name in (*(name for name in own if own[name] != other[name]), "number"))

    def _next_number(self, path: Path) -> int:
        """The next number that no file in the folder had when it was first looked at."""
        before = path.name.partition("{number}")[0]
        key = (path.parent, before)
        if key not in self._numbers:
            names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            found = [re.match(re.escape(before) + r"(\d{4,})", name) for name in names]
            self._numbers[key] = max((int(match[1]) for match in found if match), default=0)
        self._numbers[key] += 1
        return self._numbers[key]


def _fields(recipe: Recipe, source: Path | None) -> dict[str, object]:
    """The values of all fields but {number}."""
    return {
        "date": date.today().isoformat(),
        "prompt": slug(recipe.prompt),
        "seed": recipe.seed,
        "model": slug(recipe.model),
        "source": "" if source is None else source.stem,
    }


def naming(output: str, *, suffix: str = "png", overwrite: bool = False) -> Naming:
    """The naming of --output: a template, a file, a folder, which a name without a suffix is too, or - for stdout.

    Args:
        suffix: that of the names made in a folder, without the dot.
    """
    if not output.strip():
        raise UsageError("the output's name is empty: name a file, a folder, or - for standard output")
    path = expand(output)
    if path == STDOUT:
        return Naming(output)
    new_folder = not path.suffix and not path.is_file()
    if output.endswith(("/", "\\")) or path.is_dir() or new_folder:
        return Naming(str(path / f"{IN_FOLDER}.{suffix}"), overwrite=overwrite)
    return Naming(str(path), overwrite=overwrite)


def slug(text: str) -> str:
    """Letters and digits that names of files can have here, joined by dashes, at most 40 characters."""
    encoding = sys.getfilesystemencoding()
    text = text.encode(encoding, "ignore").decode(encoding)
    return "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-_") or "picture"
