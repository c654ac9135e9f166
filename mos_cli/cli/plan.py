"""`mos plan`: what a model needs on a card, and the fastest setting that fits, from configs alone."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mos_cli.cli import console
from mos_cli.errors import MemoryLimitError

if TYPE_CHECKING:
    from mos_cli.runtime.blueprints import Network
    from mos_cli.runtime.fitting import Candidate

_STAGES = ("read", "bank", "draw", "decode")


def plan(
    model: Annotated[str, typer.Argument(help="A bundle or a blueprint: name, folder or hub id.")] = "emoji",
    max_vram: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="GIB", help="Memory of the card.", show_default="8, 12, 16 and 24"),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Size to draw.", show_default="the model's")] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="none, int8 or nf4; nf4,none for the understanding and the generation tower apart.",
            show_default="what is fastest",
        ),
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="What is not quantised, as `mos generate --precision` draws in.")
    ] = "bf16",
    references: Annotated[
        int, typer.Option(min=0, metavar="N", help="Plan an edit that is shown so many pictures.")
    ] = 0,
    understanding: Annotated[
        str | None, typer.Option(metavar="NAME", help="Understanding tower of a blueprint.", show_default="its first")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per card.")] = False,
) -> None:
    """Say what a model needs on a card, stage by stage, and which setting is fastest there; load no weights."""
    from mos_cli.runtime.blueprints import find_network
    from mos_cli.runtime.fitting import CARDS, candidates, fastest, parse_quant
    from mos_cli.runtime.settings import parse_size

    network = find_network(model, understanding, precision=precision, references=references)
    canvas = parse_size(size, network.canvas)
    chosen = None if quant is None else parse_quant(quant)
    found = candidates(network, canvas, quant=chosen)
    if not as_json:
        _print_head(network, canvas)
    missed = 0
    for card in CARDS if max_vram is None else (max_vram,):
        try:
            best = fastest(found, card)
        except MemoryLimitError as error:
            if max_vram is not None and not as_json:
                raise
            missed += 1
            _print_none(card, str(error), as_json)
            continue
        if as_json:
            console.print_json([{"model": model, "size": list(canvas), "card": card, **_row(best)}])
        else:
            _print_card(card, best, _command(network, best, card, size))
    if max_vram is not None and missed:
        raise typer.Exit(MemoryLimitError.exit_code)
    if not as_json:
        _print_foot(network)


def _command(network: "Network", best: "Candidate", card: float, size: str | None) -> str:
    words = [
        "mos edit PICTURE INSTRUCTION" if network.references else "mos generate PROMPT",
        f"-m {'DIR' if network.weightless else network.ref}",
    ]
    words += [f"--max-vram {card:g}", best.options]
    words += ["--precision fp32"] if network.each == 4 else []
    words += [f"--size {size}"] if size else []
    return " ".join(words)


def _row(best: "Candidate") -> dict[str, Any]:
    from dataclasses import asdict

    from mos_cli.runtime.memory import RESERVE

    return {
        "setting": asdict(best.setting),
        "options": best.options,
        "stages": {stage.name: {"peak": stage.peak, "parts": stage.parts} for stage in best.stages},
        "peak": best.peak,
        "reserve": RESERVE,
        "host": best.host,
        "estimated_seconds": {name: round(seconds, 3) for name, seconds in best.seconds.items()},
    }


def _print_none(card: float, why: str, as_json: bool) -> None:
    if as_json:
        console.print_json([{"card": card, "setting": None, "why": why}])
    else:
        console.out.print(f"\n[bold]{card:g} GiB[/]  {why}", soft_wrap=True)


def _print_head(network: "Network", canvas: tuple[int, int]) -> None:
    tower, g = network.understanding, network.generation
    print_line = console.out.print
    shown = network.references
    edited = f" from {shown} picture{'' if shown == 1 else 's'} as large" if shown else ""
    print_line(f"[bold]{network.ref}[/] at {canvas[0]} x {canvas[1]} px{edited}, {network.defaults.steps} steps")
    print_line(f"  generation     {_millions(g.parameters)}, of which router {_millions(g.router_parameters)}")
    sees = f"; what sees, {_millions(tower.vision)}, is left out" if tower.vision and not network.references else ""
    reads = f"{_millions(tower.linear + tower.other)}, {tower.layers} layers"
    print_line(f"  understanding  {network.understanding_name}: {reads}{sees}")
    if network.autoencoder:
        print_line(f"  autoencoder    {network.autoencoder.kind}: {_millions(network.autoencoder.parameters)}")


def _print_card(card: float, best: "Candidate", command: str) -> None:
    from rich.table import Table

    from mos_cli.runtime.memory import GIB, RESERVE

    names = list(dict.fromkeys(name for stage in best.stages for name in stage.parts))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"{card:g} GiB card", style="bold", no_wrap=True)
    for stage in _STAGES:
        table.add_column(stage, justify="right")
    for name in names:
        table.add_row(name, *(_gib(stage.parts.get(name, 0)) for stage in best.stages))
    table.add_row("reserve", *(_gib(RESERVE) for _ in best.stages))
    table.add_row("[bold]all, GiB[/]", *(f"[bold]{(stage.peak + RESERVE) / GIB:.2f}[/]" for stage in best.stages))
    console.out.print()
    console.out.print(table)
    host = f"; {best.host / GIB:.1f} GiB of main memory" if best.host else ""
    tiled = "; decoded in tiles" if best.setting.tiled else ""
    apart = "" if best.setting.together else "; branches of guidance one by one"
    console.out.print(f"  peak {best.needs / GIB:.1f} of {card:g} GiB{host}{tiled}{apart}")
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in best.seconds.items() if seconds >= 0.05)
    console.out.print(f"  about {best.total_seconds:.1f} s a picture" + (f": {parts}" if parts else ""))
    console.out.print(f"  [green]{command}[/]", soft_wrap=True)


def _print_foot(network: "Network") -> None:
    from mos_cli.runtime.fitting import BUS, FLOPS, MEMORY
    from mos_cli.runtime.memory import TOKENS

    console.out.print(
        f"\nTime is an estimate, without decoding and loading: {FLOPS / 1e12:.0f} TFLOP/s, memory at "
        f"{MEMORY / 1e9:.0f} GB/s, bus at {BUS / 1e9:.0f} GB/s. Prompts of {TOKENS} tokens, one picture at a time.",
    )
    if network.weightless:
        console.out.print(f"No weights yet: mos models init {network.ref} --out DIR", soft_wrap=True)


def _gib(size: int) -> str:
    from mos_cli.runtime.memory import GIB

    return f"{size / GIB:.2f}" if size else "-"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 10**9 else f"{parameters / 1e6:.1f}M"
