"""`~` in the paths that commands take."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from mos_cli.utils.files import expand


class App(typer.Typer):
    """A group of commands in whose paths `~` is the home folder; a shell does not expand it in `--html=~/a.html`."""

    def command(self, *names: Any, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(*names, **settings)
        return lambda function: register(_with_expanded_paths(function))


def _with_expanded_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(command)
    def call(*arguments: Any, **values: Any) -> Any:
        return command(*arguments, **{name: _expanded(value) for name, value in values.items()})

    return call


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return expand(value) if isinstance(value, Path) else value
