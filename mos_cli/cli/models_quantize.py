"""`mos models quantize`: a model whose generation tower is quantised, written once instead of at every start."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.completion import model_names
from mos_cli.cli.output import size_text, stdout
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from mos_cli.towers.quantized import QuantisationReport


def quantize(
    name: Annotated[str, typer.Argument(autocompletion=model_names, help="A model: name, folder or hub id.")],
    quant: Annotated[str, typer.Option("--quant", metavar="METHOD", help="nf4 (4 bits) or int8 (8 bits).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; its name is the new model's.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Write a model again with its generation tower quantised; everything else stays as it is."""
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.bundles.quantized import check_quantising, write_quantised_bundle
    from mos_cli.errors import ModelError, UsageError
    from mos_cli.quantization.method import METHODS
    from mos_cli.utils.quiet import quieten

    if quant not in METHODS:
        raise UsageError(f"--quant cannot be {quant!r}: choose from {', '.join(METHODS)}")
    bundle = find_bundle(name)
    check_quantising(bundle, out, overwrite=overwrite)
    quieten()
    from mos_cli.towers.quantized import quantise_generation

    reports: list[QuantisationReport] = []

    def write_tower(source: Path, folder: Path) -> None:
        try:
            reports.append(quantise_generation(source, folder, quant))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"the generation tower in {source} cannot be loaded: {error}") from None

    written = write_quantised_bundle(bundle, out, quant, write_tower, overwrite=overwrite)
    (report,) = reports
    sizes = f"{size_text(report.bytes_before)} -> {size_text(report.bytes_after)}"
    stdout.print(f"{written.folder}", markup=False, soft_wrap=True)
    layers = counted(len(report.quantised), "layer")
    stdout.print(f"{layers} in {quant}, {len(report.kept)} kept, {sizes}", markup=False)
