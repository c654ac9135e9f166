"""`mos loras`: the LoRA files that were trained or drawn with here."""

import sys
from typing import Annotated

import typer

from mos_cli.cli.output import print_json, print_view, size_text, stdout
from mos_cli.cli.paths import App
from mos_cli.errors import InputError, UsageError

loras_app = App(name="loras", help="LoRA files that were trained or drawn with here.", no_args_is_help=True)


@loras_app.command("ls")
def ls(json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False) -> None:
    """List the LoRA files that were trained or drawn with here."""
    from rich.table import Table
    from rich.text import Text

    from mos_cli.bundles.loras import known_loras

    rows = [
        {
            "name": lora.path.name,
            "model": lora.model,
            "size": lora.path.stat().st_size if lora.there else None,
            "there": lora.there,
            "path": str(lora.path),
            "sha256": lora.sha256,
        }
        for lora in known_loras()
    ]
    if json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "model", "size", "path"):
        table.add_column(column)
    for row in rows:
        size = size_text(row["size"]) if row["there"] else "gone"
        table.add_row(*map(Text, (row["name"], row["model"] or "", size, row["path"])))
    print_view(table, wide=True)


@loras_app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="A LoRA file of `mos loras ls`: its name or path.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a LoRA file that mos trained; one of another program is only taken off the list."""
    from mos_cli.bundles.loras import forget_lora, known_loras
    from mos_cli.utils.files import expand

    found = [lora for lora in known_loras() if name == lora.path.name or expand(name).resolve() == lora.path]
    if len({lora.path for lora in found}) > 1:
        raise UsageError(f"there are several LoRA files {name}: give the path of one, as mos loras ls shows it")
    if not found:
        raise InputError(f"there is no LoRA file {name} in the list: see mos loras ls")
    path = found[0].path
    ours = any(lora.model is not None for lora in found)
    if ours and not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"{path} is removed only if you say so: pass --yes")
        typer.confirm(f"remove {path}?", abort=True)
    if ours:
        path.unlink(missing_ok=True)
    for lora in found:
        forget_lora(lora.sha256)
    stdout.print(f"removed {path}" if ours else f"no longer listed; {path} stays", markup=False, soft_wrap=True)
