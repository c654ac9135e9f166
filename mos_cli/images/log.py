"""The log of drawn pictures: an SQLite file in the user's data folder, which `mos logs` lists and searches.

Nothing else reads it: a picture holds its own recipe. Deleting the file forgets all.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mos_cli.config.recipe import Recipe
from mos_cli.errors import InputError
from mos_cli.utils.files import make_folder
from mos_cli.utils.folders import user_data_folder

VERSION = 1
"""The version of the table, as `user_version` in the file."""
PATIENCE = 10.0
"""Seconds to wait for another process that writes."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS pictures (id INTEGER PRIMARY KEY, time TEXT NOT NULL, path TEXT NOT NULL, "
    "prompt TEXT NOT NULL, negative TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER NOT NULL, recipe TEXT NOT NULL)"
)
_SEARCHED = "casefold(prompt || char(10) || negative || char(10) || path || char(10) || model)"


@dataclass(frozen=True)
class LoggedPicture:
    """A picture of the log, in the order of drawing.

    Attributes:
        time: when it was written, in UTC, by the clock of then.
        path: where, absolute; None for a picture that a server sent to a client.
        prompt: with its weights.
        state: "there", "gone", "replaced" by a later picture of that path, or "served" without a path.
    """

    time: str
    path: Path | None
    prompt: str
    negative: str
    model: str
    seed: int
    recipe: dict[str, Any]
    state: str


def log_file() -> Path:
    """The file of the log."""
    return user_data_folder() / "pictures.sqlite"


def log_picture(path: Path | None, recipe: Recipe) -> None:
    """Adds a picture that was written, or sent without a path; raises InputError where that fails."""
    file = log_file()
    values = (
        datetime.now(UTC).isoformat(timespec="seconds"),
        "" if path is None else str(path.absolute()),
        recipe.weighted_prompt,
        recipe.negative,
        recipe.model,
        recipe.seed,
        recipe.model_dump_json(exclude_none=True),
    )
    with _errors_in_one_line(file):
        make_folder(file.parent)
        # Prompts are the user's alone.
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as log:
            log.execute("BEGIN IMMEDIATE")
            _check_version(log, file, new=True)
            log.execute(_TABLE)
            log.execute(f"PRAGMA user_version = {VERSION}")
            columns = "time, path, prompt, negative, model, seed, recipe"
            log.execute(f"INSERT INTO pictures ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            log.execute("COMMIT")


def logged_pictures(words: Sequence[str] = (), most: int | None = None) -> list[LoggedPicture]:
    """The last pictures in whose prompts, path or model all words occur, whatever their case; the oldest first.

    Raises:
        InputError: the log cannot be read.
    """
    file = log_file()
    if not file.is_file():
        return []
    with _errors_in_one_line(file), closing(_opened_to_read(file)) as log:
        log.create_function("casefold", 1, lambda text: str(text).casefold(), deterministic=True)
        _check_version(log, file)
        where = " AND ".join([f"instr({_SEARCHED}, ?)"] * len(words)) or "1"
        rows = log.execute(
            "SELECT time, path, prompt, negative, model, seed, recipe, "
            "EXISTS (SELECT 1 FROM pictures AS later WHERE later.path = pictures.path AND later.id > pictures.id) "
            f"FROM pictures WHERE {where} ORDER BY id DESC LIMIT ?",
            (*(word.casefold() for word in words), -1 if most is None else most),
        ).fetchall()
    return [_picture(*row) for row in reversed(rows)]


def _picture(
    time: str, path: str, prompt: str, negative: str, model: str, seed: int, recipe: str, replaced: int
) -> LoggedPicture:
    if not path:
        return LoggedPicture(time, None, prompt, negative, model, seed, json.loads(recipe), "served")
    state = "gone" if not os.path.isfile(path) else "replaced" if replaced else "there"  # noqa: PTH113 - any bytes
    return LoggedPicture(time, Path(path), prompt, negative, model, seed, json.loads(recipe), state)


def _opened_to_read(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)


def _check_version(log: sqlite3.Connection, file: Path, *, new: bool = False) -> None:
    (version,) = log.execute("PRAGMA user_version").fetchone()
    if version not in ((0, VERSION) if new else (VERSION,)):
        raise InputError(f"{file} is no log that this version of mos reads: move it away, or turn the log off")


@contextmanager
def _errors_in_one_line(file: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the log {file} cannot be used: {reason}") from None
