"""The `mos` command: one Typer app, one file per command, nothing heavy imported at start-up."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mos_cli import __version__
from mos_cli.cli.bench import bench
from mos_cli.cli.data import data_app
from mos_cli.cli.doctor import doctor
from mos_cli.cli.edit import ADVICE, edit
from mos_cli.cli.eval import evaluate
from mos_cli.cli.gallery import gallery
from mos_cli.cli.generate import generate
from mos_cli.cli.inspect_routing import inspect_routing
from mos_cli.cli.logs import logs
from mos_cli.cli.loras import loras_app
from mos_cli.cli.models import models_app
from mos_cli.cli.output import open_standard_streams, print_error, stdout
from mos_cli.cli.paths import App
from mos_cli.cli.plan import plan
from mos_cli.cli.presets import presets_app
from mos_cli.cli.prompts import READ_SUFFIXES
from mos_cli.cli.replay import replay
from mos_cli.cli.routing import routing_app
from mos_cli.cli.run import run as run_file
from mos_cli.cli.serve import serve
from mos_cli.cli.show import show
from mos_cli.cli.train import train
from mos_cli.cli.train_enlarger import train_enlarger
from mos_cli.cli.train_judge import train_judge
from mos_cli.errors import INTERRUPTED, InputError, MosError
from mos_cli.utils.heap import keep_freed_memory
from mos_cli.utils.threads import limit_spinning

# The UsageError of click, of which newer versions of typer bring a copy of their own.
_ParseError: Any = typer.BadParameter.__base__

OTHER_NAMES = {
    **dict.fromkeys(("num", "num_images"), ("--count", "-n or --count")),
    **dict.fromkeys(("width", "height"), ("--size", "--size 256x256")),
}
"""Options of other programs for drawing: the option that stands for each, and how it is written."""


class MosGroup(TyperGroup):
    """A command group that turns user errors, of the command line and of the run, into one line and an exit code."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        typed = list(args)
        with _errors_as_lines(typed):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta["mos.typed"] = typed
        return context

    def invoke(self, ctx: Any) -> Any:
        with _errors_as_lines(ctx.meta["mos.typed"]):
            return super().invoke(ctx)


@contextmanager
def _errors_as_lines(typed: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except MosError as error:
        print_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except _ParseError as error:
        # The error of a group without arguments has no text: its help was printed.
        if message := error.format_message():
            print_error(_parse_error(message, error, typed))
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        # A folder without permission, a name that is too long, a full disk: the user can mend these.
        print_error(f"{error.filename or 'a file'}: {error.strerror or error}")
        raise typer.Exit(InputError.exit_code) from None
    except UnicodeEncodeError as error:
        print_error(
            f"the system's encoding, {error.encoding}, has no {error.object[error.start : error.end]}: "
            "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
        raise typer.Exit(InputError.exit_code) from None
    except (KeyboardInterrupt, typer.Abort) as interrupt:
        print_error(": ".join(["interrupted", *map(str, interrupt.args)]))
        raise typer.Exit(INTERRUPTED) from None


def _parse_error(message: str, error: Any, typed: Sequence[str]) -> str:
    """What is wrong with the command line, and what to do."""
    if error.__cause__ is not None:
        from mos_cli.utils.validation import first_problem

        message = message.replace(error.message, first_problem(error.__cause__))
    message = message.rstrip(".")
    if variable := re.search(r" \(env var: '(\w+)'\)", message):
        message = message.replace(variable[0], f" ({variable[1]})" if variable[1] in os.environ else "")
    if any(argument.startswith("-") and " " in argument for argument in typed) or re.search(r": -\d", message):
        return f"{message}: write -- before a text that begins with a dash"
    if error.ctx is None:
        return message
    arguments = [part for part in error.ctx.command.params if part.param_type_name == "argument"]
    named = [(part.metavar or part.name).upper() for part in arguments]
    if "extra argument" in message:
        if "--" in typed and any(argument.startswith("-") for argument in typed[typed.index("--") + 1 :]):
            return f"{message}: write the options before --"
        if "PROMPT" in named:
            return f"{message}: put a text of several words in quotes"
        taken = " and ".join(f"one {name}" for name in named) or "no arguments"
        message = f"{message}: {error.ctx.command_path} takes {taken}"
    elif "Missing argument" in message:
        given = error.ctx.params.get("instruction", "")
        # Path.exists raises for a text that is too long for a name.
        if Path(given).suffix.lower() in READ_SUFFIXES or os.path.exists(given):  # noqa: PTH110
            return f"say {ADVICE}"
        message = f"{message} of {' '.join([error.ctx.command_path, *named])}"
    elif "No such option" in message and (meant := _meant_option(error, typed)):
        message = f"{error.message.rstrip('.')}: write {meant}"
    return f"{message}: see {error.ctx.command_path} --help"


def _meant_option(error: Any, typed: Sequence[str]) -> str | None:
    """What stands for an option that a command does not have: another of its options, or a value of its --set."""
    from mos_cli.config.recipe import Recipe

    options = {name for option in error.ctx.command.params for name in option.opts}
    field = error.option_name.lstrip("-").replace("-", "_")
    if "--set" in options and field in {*Recipe.model_fields, "image_cfg", "strength"}:
        words = [word for argument in typed for word in argument.split("=", 1)]
        value = next((after for before, after in pairwise(words) if before == error.option_name), "VALUE")
        return f"--set {field}={value}"
    option, text = OTHER_NAMES.get(field, ("", None))
    return text if option in options else None


app = App(
    name="mos",
    cls=MosGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        stdout.print(f"mos {__version__}")
        raise typer.Exit


@app.callback()
def mos(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Generate pictures with Mixture of States, and record which language model layers each word is read from."""


app.command()(generate)
app.command()(edit)
app.command("run")(run_file)
app.command()(serve)
app.command("inspect-routing")(inspect_routing)
app.add_typer(routing_app)
app.command()(show)
app.command()(replay)
app.command()(logs)
app.command()(gallery)
app.command()(plan)
app.command()(bench)
app.add_typer(models_app)
app.add_typer(loras_app)
app.add_typer(presets_app)
app.command()(doctor)
app.add_typer(data_app, name="data")
app.command()(train)
app.command("eval")(evaluate)
app.command()(train_judge)
app.command()(train_enlarger)


def run() -> None:
    """Runs the command line of the process, and ends it."""
    # The bars of other libraries: what takes long has one of this tool's own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    open_standard_streams()
    limit_spinning()
    keep_freed_memory()
    app(prog_name="mos")
