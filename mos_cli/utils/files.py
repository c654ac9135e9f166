"""Writing files atomically, without replacing others unless requested; hashes and sizes of files."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from mos_cli.errors import InputError


@contextlib.contextmanager
def atomic_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there becomes `path` when it succeeds.

    The temporary path keeps the suffix of `path`; missing parent folders are made. Whatever goes wrong,
    Ctrl-C included, the temporary file is removed and `path` is as it was.

    Raises InputError if `path` exists and `overwrite` is false, also when it appeared in the meantime, and if
    the folder cannot be written.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    make_folder(path.parent)
    temporary = path.with_name(f".{secrets.token_hex(6)}{path.suffix}")
    try:
        yield temporary
        if overwrite:
            temporary.replace(path)
        else:
            _rename_to_new(temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Writes `data` to `path`, whole or not at all; raises as `atomic_file` does."""
    with atomic_file(path, overwrite) as temporary:
        temporary.write_bytes(data)


def write_all(files: Mapping[Path, bytes], overwrite: bool = False) -> None:
    """Writes several files, all or none: all are complete on the disk before the first is renamed to its path."""
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            stack.enter_context(atomic_file(path, overwrite)).write_bytes(data)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises InputError if a file to be written is there already and may not be replaced."""
    if path.exists() and not overwrite:
        raise _taken(path)


def check_writable(folder: Path) -> None:
    """Raises InputError if nothing could be written in a folder, or the folder not be made; writes nothing itself."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    effective = os.access in os.supports_effective_ids
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        raise InputError(f"cannot write to {folder}: {existing} is not a folder you may write in")


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents; raises InputError if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror or error}") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source` (symbolic links followed), or a copy across disks."""
    import shutil

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


def _taken(path: Path) -> InputError:
    return InputError(f"{path} exists: choose another name, or pass --overwrite")


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (exFAT, some network shares): claim the name first, then rename over the claim.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(path)
