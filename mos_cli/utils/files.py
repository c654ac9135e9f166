"""Writing files and folders atomically, without replacing others unless requested; hashes and sizes of files."""

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from mos_cli.errors import InputError

LOCK = ".lock"
"""The file by which a process keeps others out of a folder."""


class NameTakenError(InputError):
    """A file cannot be written under its name without replacing one that has to stay."""


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` as the home folder; the name of an unknown user stays as it is."""
    # Path.expanduser raises for unknown users.
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextlib.contextmanager
def atomic_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there becomes `path` when it succeeds.

    The temporary path keeps the suffix of `path`; missing parent folders are made. Whatever goes wrong,
    Ctrl-C included, the temporary file is removed and `path` is as it was.

    Raises NameTakenError if `path` exists and `overwrite` is false, also when it appeared in the meantime, and
    InputError if the folder cannot be written.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    make_folder(path.parent)
    temporary = _beside(path)
    try:
        yield temporary
        _publish(temporary, path, overwrite)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        _remove(temporary)


def atomic_write(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Writes `data` to `path`, whole or not at all; raises as `atomic_file` does."""
    with atomic_file(path, overwrite) as temporary:
        _write_to_disk(temporary, data)


def write_all(files: Mapping[Path, bytes], overwrite: bool = False, *, remove: Collection[Path] = ()) -> None:
    """Writes several files and removes others: all of it or none.

    All are complete on the disk before the first gets its name. The first of `files` gets its name last and in one
    step, so where it is, the others are. What is replaced or removed is kept beside under another name until then.

    Raises:
        NameTakenError: a file exists and `overwrite` is false.
        InputError: the folder cannot be written.
    """
    last, current = next(iter(files)), next(iter(files))
    for path in files:
        refuse_existing(path, overwrite)
        make_folder(path.parent)
    written = {path: _beside(path) for path in files}
    kept: dict[Path, Path] = {}
    published: list[Path] = []
    try:
        for current, temporary in written.items():
            _write_to_disk(temporary, files[current])
        for current in (*remove, *reversed(written)):
            if current != last and os.path.lexists(current):
                if not overwrite:
                    raise FileExistsError
                kept[current] = _beside(current)
                current.rename(kept[current])
            if current in written:
                _publish(written[current], current, overwrite and current == last)
                published.append(current)
    except BaseException as error:
        for path in published:
            _remove(path)
        for path, aside in kept.items():
            with contextlib.suppress(OSError):
                aside.rename(path)
        if isinstance(error, FileExistsError):
            raise _taken(current) from None
        if isinstance(error, OSError):
            raise _unwritable(current, error) from error
        raise
    finally:
        for temporary in written.values():
            _remove(temporary)
    for aside in kept.values():
        _remove(aside)


def replace_folder(made: Path, folder: Path) -> None:
    """Gives the folder `made`, on the same disk, the name `folder`. One that is there is removed when that is done.

    Raises InputError if that is not possible; the one that is there is as it was.
    """
    before = _beside(folder)
    try:
        if os.path.lexists(folder):
            folder.rename(before)
        made.rename(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            before.rename(folder)
        if isinstance(error, OSError):
            raise _unwritable(folder, error) from error
        raise
    shutil.rmtree(before, ignore_errors=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises NameTakenError if something is there already under the name of a file to be written.

    With `overwrite`, a file or a link may be replaced, but no folder and nothing else that is not a file.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise _taken(path)
    if path.exists() and not path.is_file():
        raise NameTakenError(f"{path} is not a file, and is not replaced: choose another name")


def check_writable(folder: Path) -> None:
    """Raises InputError if nothing could be written in a folder, or the folder not be made; leaves nothing behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        # Permissions do not tell of everything: a virtual file system may have files of its own only.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        raise InputError(f"cannot write to {folder}: {existing} is not a folder you may write in") from None


def check_folder(folder: Path, *marks: str) -> None:
    """Checks a folder that a command fills with files of its own before the work begins.

    Args:
        marks: files of which an earlier run of the command left one.

    Raises:
        InputError: it cannot be written, or it has other files and none of the marks.
    """
    check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).is_file() for mark in marks):
        raise InputError(f"{folder} has files of something else, which stay: choose a new folder")


@contextlib.contextmanager
def sole_user(folder: Path, what: str, *, needed: bool = True) -> Iterator[None]:
    """Makes sure that no other process works in a folder in the meantime; a process that dies leaves nothing behind.

    Args:
        what: what works there, for the error.

    Raises:
        InputError: another process does, or the folder cannot be written.
    """
    if not needed:
        yield
        return
    from filelock import FileLock, Timeout

    make_folder(folder)
    # The lock is one of the operating system on the open file, which ends with the process.
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{what} is running in {folder}: wait for it, stop it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents; raises InputError if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror or error}") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source` (symbolic links followed), or a copy across disks."""
    source = source.resolve(strict=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as 64 lower-case hex digits."""
    import hashlib

    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_size(folder: Path) -> int:
    """The bytes of all files under `folder`, links not followed; 0 if there is no such folder."""
    size = 0
    for path in folder.rglob("*"):
        # Another process may delete a file in the meantime.
        with contextlib.suppress(OSError):
            status = path.lstat()
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def _beside(path: Path) -> Path:
    """A new name in the same folder, hidden, with the same suffix."""
    return path.with_name(f".{secrets.token_hex(6)}{path.suffix}")


def _write_to_disk(path: Path, data: bytes) -> None:
    # Without fsync, a full disk may show only later, and a power cut leave an empty file under the final name.
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives a complete file its name; raises FileExistsError if that is taken and `overwrite` is false."""
    if overwrite:
        temporary.replace(path)
        return
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        _rename_to_new(temporary, path)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Renames without replacing where there are no hard links (exFAT, some network shares)."""
    with contextlib.ExitStack() as stack:
        # The lock keeps two runs of mos from taking one name between the question and the renaming. Unlike a
        # placeholder, it does not outlive its process.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        if os.path.lexists(path):
            raise FileExistsError
        temporary.rename(path)


def _remove(path: Path) -> None:
    """Removes a file of ours; where that fails, for example on a disk that went read-only, it stays."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _taken(path: Path) -> NameTakenError:
    return NameTakenError(f"{path} exists: choose another name, or pass --overwrite")


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}")
