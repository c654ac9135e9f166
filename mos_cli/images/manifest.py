"""The manifest of a run: JSONL, one line appended for every change of a job, by which the run can be resumed."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, ValidationError

from mos_cli.errors import InputError
from mos_cli.utils.files import NameTakenError, check_writable, sha256_of
from mos_cli.utils.validation import Frozen, Sha256

if TYPE_CHECKING:
    from mos_cli.config.recipe import Recipe


HEAD_BEGINS = b'{"schema":"mos-manifest/1"'


class ManifestHead(Frozen):
    """The first line: `seed` is that of the first picture where none was given."""

    schema_id: Literal["mos-manifest/1"] = Field("mos-manifest/1", alias="schema")
    seed: int = Field(ge=0)


class ManifestLine(Frozen):
    """What became of a job.

    `job` identifies it by its recipe, `index` is its number in the run. `files` are paths relative to the manifest's
    folder, the picture first, with their sha256. "writing" is written before the files, "done" after. `seconds` is the
    time that the job took.
    """

    job: str
    index: int
    status: Literal["writing", "done", "failed"]
    prompt: str
    seed: int | None = None
    files: dict[str, Sha256] = Field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None


class Manifest:
    """The manifest of a run, as a context manager: read when it is opened, and locked until it is closed.

    Args:
        path: its file; None keeps no manifest.
        resume: go on with what is there.
        write: without it, nothing is written, for a dry run.
        joins: another process of the same run has opened it, keeps other runs out, and has begun it.

    Raises:
        NameTakenError: it is there and is not to be resumed.
        InputError: it is no manifest, another run is writing it, or it cannot be written.
    """

    def __init__(self, path: Path | None, *, resume: bool, write: bool, joins: bool = False) -> None:
        self.path = path
        self._head: ManifestHead | None = None
        self._last: dict[str, ManifestLine] = {}
        self._numbers: Counter[str] = Counter()
        self._file: FileIO | None = None
        self._made = False
        if path is None:
            return
        if path.is_file() and path.stat().st_size and not (resume or joins):
            raise NameTakenError(f"{path} exists: go on with it by --resume, or choose another name")
        if write:
            self._open(path, joins=joins)
        if path.exists():
            self._read(path)

    @property
    def seed(self) -> int | None:
        """The seed of the first picture in the run that is resumed."""
        return None if self._head is None else self._head.seed

    def key(self, recipe: "Recipe") -> str:
        """What identifies a job; equal recipes of a run are told apart by their order."""
        digest = sha256(recipe.model_dump_json(exclude_none=True).encode()).hexdigest()[:16]
        self._numbers[digest] += 1
        return f"{digest}-{self._numbers[digest]}"

    def finished(self, key: str) -> Path | None:
        """The picture of a job that an earlier run has drawn, if it is there; None if it is to be drawn.

        A run that was killed while it wrote may have left some of the files: these are removed, by their hashes.
        """
        if self.path is None or (line := self._last.get(key)) is None or not line.files:
            return None
        files = {Path(os.path.normpath(self.path.parent / name)): digest for name, digest in line.files.items()}
        picture = next(iter(files))
        if line.status == "done":
            return picture if picture.is_file() else None
        ours = [path for path, digest in files.items() if path.is_file() and sha256_of(path) == digest]
        if picture in ours:
            self._append(line.model_copy(update={"status": "done"}))
            return picture
        if self._file is not None:
            for path in ours:
                path.unlink()
        return None

    def begin(self, seed: int) -> None:
        """Writes the first line, if it is not there yet."""
        if self._head is None:
            self._head = ManifestHead(schema="mos-manifest/1", seed=seed)
            self._write(self._head.model_dump_json(by_alias=True))

    def record(
        self,
        status: Literal["writing", "done", "failed"],
        key: str,
        index: int,
        prompt: str,
        *,
        seed: int | None = None,
        files: Mapping[Path, bytes] = {},
        seconds: float | None = None,
        error: str | None = None,
    ) -> None:
        """Appends a line, which is on the disk when this returns."""
        if self.path is None:
            return
        self._append(
            ManifestLine(
                job=key,
                index=index,
                status=status,
                prompt=prompt,
                seed=seed,
                files={
                    Path(os.path.relpath(path, self.path.parent)).as_posix(): sha256(data).hexdigest()
                    for path, data in files.items()
                },
                seconds=None if seconds is None else round(seconds, 3),
                error=error,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None and self.path is not None:
            # A run that was refused before it began leaves nothing.
            if self._made and self._head is None:
                self.path.unlink(missing_ok=True)
            self._file.close()

    def _open(self, path: Path, *, joins: bool) -> None:
        check_writable(path.parent)
        self._made = not path.exists()
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        if joins:
            return
        # Where files cannot be locked, two runs on one manifest would both draw what is missing.
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise InputError(f"another run is writing {path}: wait for it, or choose another name") from None

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        lines = data.split(b"\n")
        if len(lines) > 1:
            try:
                self._head = ManifestHead.model_validate_json(lines[0])
            except ValidationError:
                raise InputError(f"{path} is no manifest of a run: choose another name") from None
        elif not HEAD_BEGINS.startswith(data[: len(HEAD_BEGINS)]):
            raise InputError(f"{path} is no manifest of a run: choose another name")
        for text in lines[1:]:
            # A line that a kill or a full disk has cut off says nothing.
            with suppress(ValidationError):
                line = ManifestLine.model_validate_json(text)
                self._last[line.job] = line
        if self._file is not None and lines[-1]:
            if self._head is None:
                self._file.truncate(0)
            else:
                self._write("")

    def _append(self, line: ManifestLine) -> None:
        self._write(line.model_dump_json(exclude_none=True))

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            data = text.encode() + b"\n"
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
            removed = not os.fstat(self._file.fileno()).st_nlink
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        if removed:
            raise InputError(f"{self.path} was removed while the run wrote it: the same command begins a new one")
