"""The file by which `--server auto` finds a running server of the user: its address, its token and its process."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mos_cli import __version__
from mos_cli.utils.files import make_folder
from mos_cli.utils.folders import cache_folder
from mos_cli.utils.validation import Frozen


class ServerState(Frozen):
    """A running server. `started` is when its process was, in seconds since 1970: another may get its number later."""

    schema_id: Literal["mos-server/1"] = Field("mos-server/1", alias="schema")
    url: str
    token: str | None
    process: int
    started: float
    version: str


def state_file() -> Path:
    return cache_folder() / "server.json"


def write_state(url: str, token: str | None) -> ServerState:
    """Writes that this process serves at `url`; only the user can read the file, which holds the token.

    Raises:
        InputError: the cache folder cannot be made.
    """
    import psutil

    state = ServerState(
        schema="mos-server/1",
        url=url,
        token=token,
        process=os.getpid(),
        started=psutil.Process().create_time(),
        version=__version__,
    )
    path = state_file()
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(state.model_dump_json(exclude_none=False))
    temporary.replace(path)
    return state


def read_state() -> ServerState | None:
    """The server that runs; None if there is none, as when its process has ended."""
    import psutil

    state = _written()
    try:
        return state if state and psutil.Process(state.process).create_time() == state.started else None
    except psutil.Error:
        return None


def _written() -> ServerState | None:
    try:
        return ServerState.model_validate_json(state_file().read_bytes())
    except (OSError, ValidationError):
        return None


def remove_state(state: ServerState) -> None:
    """Removes the file, unless a later server has written its own."""
    # The clock may have been set since: the beginning of the process would not be what it was.
    if _written() == state:
        state_file().unlink(missing_ok=True)
