"""Options: `generate` and `edit` share theirs, and every option has the name that the documents give it."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, get_args

import typer
from typer.models import OptionInfo

from mos_cli.cli.app import app


def commands(group: typer.Typer) -> Iterator[Callable[..., Any]]:
    """All commands of the program."""
    yield from (command.callback for command in group.registered_commands if command.callback is not None)
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance)


def options(command: Callable[..., Any]) -> dict[str, OptionInfo]:
    parameters = signature(command, eval_str=True).parameters.items()
    found = [(name, info) for name, parameter in parameters for info in get_args(parameter.annotation)]
    return {name: info for name, info in found if isinstance(info, OptionInfo)}


def test_every_option_is_named() -> None:
    """typer 0.27 takes the metavar for the name of an option that has no other."""
    found = [(command.__name__, name, info) for command in commands(app) for name, info in options(command).items()]
    assert len(found) > 100
    # In an annotation the first name is where a default would be.
    assert [(command, name) for command, name, info in found if not isinstance(info.default, str)] == []


def test_generate_and_edit_differ_only_in_what_one_of_them_needs() -> None:
    by_name = {command.__name__: options(command) for command in commands(app)}
    generate, edit = by_name["generate"], by_name["edit"]
    shared = generate.keys() & edit.keys()
    assert {name for name in shared if generate[name] is not edit[name]} == {"size"}
    assert generate.keys() <= edit.keys()
    assert len(shared) > 25
