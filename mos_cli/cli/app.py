"""The `mos` command: one Typer app, one file per command, nothing heavy imported at start-up."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mos_cli import __version__
from mos_cli.cli.bench import bench
from mos_cli.cli.data import data_app
from mos_cli.cli.doctor import doctor
from mos_cli.cli.edit import edit
from mos_cli.cli.eval import evaluate
from mos_cli.cli.generate import generate
from mos_cli.cli.inspect_routing import inspect_routing
from mos_cli.cli.models import models_app
from mos_cli.cli.output import print_error, stdout
from mos_cli.cli.paths import App
from mos_cli.cli.plan import plan
from mos_cli.cli.presets import presets_app
from mos_cli.cli.replay import replay
from mos_cli.cli.routing import routing_app
from mos_cli.cli.train import train
from mos_cli.cli.train_enlarger import train_enlarger
from mos_cli.cli.train_judge import train_judge
from mos_cli.errors import INTERRUPTED, InputError, MosError
from mos_cli.utils.devices import limit_spinning


class MosGroup(TyperGroup):
    """A command group that turns user errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MosError as error:
            print_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            # A folder without permission, a name that is too long, a full disk: the user can mend these.
            print_error(f"{error.filename or 'a file'}: {error.strerror or error}")
            raise typer.Exit(InputError.exit_code) from None
        except KeyboardInterrupt:
            print_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None


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
    """Draw pictures from words, on your own machine, and see which layer of the language model painted each word."""


app.command()(generate)
app.command()(edit)
app.command("inspect-routing")(inspect_routing)
app.add_typer(routing_app)
app.command()(replay)
app.command()(plan)
app.command()(bench)
app.add_typer(models_app)
app.add_typer(presets_app)
app.command()(doctor)
app.add_typer(data_app, name="data")
app.command()(train)
app.command("eval")(evaluate)
app.command()(train_judge)
app.command()(train_enlarger)


def main() -> None:
    """Entry point of the `mos` script."""
    limit_spinning()
    sys.exit(app())
