"""`mos plan`: what a model needs on a card, and the fastest setting that fits, from configs alone."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli import console
from mos_cli.errors import MemoryLimitError
from mos_cli.utils.devices import Precision

if TYPE_CHECKING:
    from mos_cli.bundles.blueprints import Network
    from mos_cli.planning.candidates import Candidate

_STAGES = ("read", "bank", "draw", "decode")


@dataclass(frozen=True)
class _Room:
    """GiB of a card, or of free main memory.

    Args:
        asked: what --max-vram says for it.
        on_cpu: it is main memory.
        up_to: GiB of the largest card that the same holds for; 0 for this one alone.
    """

    gib: float
    asked: str
    on_cpu: bool = False
    up_to: float = 0

    @property
    def name(self) -> str:
        to = f" to {self.up_to:g}" if self.up_to else ""
        return f"{self.gib:.4g}{to} GiB {'free' if self.on_cpu else 'card'}"


def plan(
    model: Annotated[str, typer.Argument(help="A bundle or a blueprint: name, folder or hub id.")] = "emoji",
    max_vram: Annotated[
        str | None,
        typer.Option(
            envvar="MOS_MAX_VRAM",
            metavar="GIB",
            help="Memory of the card; auto: what this machine has, as `mos generate -p auto` takes it.",
            show_default="8, 12, 16 and 24",
        ),
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
        Precision | None,
        typer.Option(
            help="What is not quantised, as `mos generate --precision` draws in. Understanding towers of a billion "
            "parameters or more stay in bf16.",
            show_default="bf16; with --max-vram auto, this machine's",
        ),
    ] = None,
    references: Annotated[
        int, typer.Option(min=0, metavar="N", help="Plan an edit that is shown so many pictures.")
    ] = 0,
    understanding: Annotated[
        str | None, typer.Option(metavar="NAME", help="Understanding tower of a blueprint.", show_default="its first")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per card.")] = False,
) -> None:
    """Say what a model needs on a card, stage by stage, and which setting is fastest there; load no weights."""
    from mos_cli.bundles.blueprints import find_network
    from mos_cli.config.settings import parse_size
    from mos_cli.planning.candidates import GPU_SIZES, candidates, parse_quant

    rooms = [_Room(card, f"{card:g}") for card in GPU_SIZES]
    if max_vram is not None:
        room, precision = _room_of(max_vram, precision)
        rooms = [room]
    network = find_network(model, understanding, precision=precision or "bf16", references=references)
    canvas = parse_size(size, network.canvas)
    found = candidates(network, canvas, quant=None if quant is None else parse_quant(quant))
    answers = [(room, _answer(found, room)) for room in rooms]
    none_fits = all(isinstance(answer, MemoryLimitError) for _, answer in answers)
    if as_json:
        for room, answer in answers:
            console.print_json([{"model": model, "size": list(canvas), "card": room.gib, **_row(answer, room)}])
    else:
        _print_head(network, canvas)
        if len(answers) > 1 and len({id(answer) for _, answer in answers}) == 1:
            # A model that fits the smallest card as it is fastest looks the same on all of them.
            answers = [(replace(rooms[0], up_to=rooms[-1].gib), answers[0][1])]
        commands = []
        for room, answer in answers:
            if isinstance(answer, MemoryLimitError):
                if max_vram is not None:
                    raise answer
                console.out.print(f"\n[bold]{room.name}[/]  {answer}", soft_wrap=True)
            else:
                commands.append(_command(network, answer, room, size))
                _print_room(room, answer, commands[-1])
        numbered = any("--max-vram" in command for command in commands)
        _print_foot(network, understanding, on_cpu=rooms[0].on_cpu, numbered=numbered)
    if max_vram is not None and none_fits:
        raise typer.Exit(MemoryLimitError.exit_code)


def _room_of(max_vram: str, precision: Precision | None) -> tuple[_Room, Precision | None]:
    """The room that --max-vram names, and the precision that is drawn in there; torch is imported for auto only."""
    from mos_cli.config.settings import available_memory, make_settings

    gib = make_settings(max_vram=max_vram).max_vram
    if isinstance(gib, float):
        return _Room(gib, f"{gib:g}"), precision
    from mos_cli.utils.devices import choose_device, choose_precision

    device = choose_device("auto")
    return _Room(available_memory(device), "auto", on_cpu=device.type == "cpu"), precision or choose_precision(device)


def _answer(found: "list[Candidate]", room: _Room) -> "Candidate | MemoryLimitError":
    from mos_cli.planning.candidates import fastest, fastest_on_cpu

    try:
        return fastest_on_cpu(found, room.gib) if room.on_cpu else fastest(found, room.gib)
    except MemoryLimitError as error:
        return error


def _command(network: "Network", best: "Candidate", room: _Room, size: str | None) -> str:
    words = [
        "mos edit PICTURE INSTRUCTION" if network.references else "mos generate PROMPT",
        f"-m {'DIR' if network.weightless else network.ref}",
    ]
    if room.on_cpu:
        words += ["--max-vram auto", f"--quant {best.quant}"]
    elif not (room.up_to and (best.quant, best.setting.offload, best.setting.tiled) == ("none", "none", False)):
        # What every card takes as it is needs no limit: the same command is right without a GPU.
        words += [f"--max-vram {room.asked}", best.options]
    words += ["--precision fp32"] if network.value_bytes == 4 else []
    words += [f"--size {size}"] if size else []
    return " ".join(words)


def _row(best: "Candidate | MemoryLimitError", room: _Room) -> dict[str, Any]:
    from mos_cli.planning.memory import RESERVE

    if isinstance(best, MemoryLimitError):
        return {"setting": None, "why": str(best)}
    return {
        "setting": asdict(best.setting),
        "options": best.options,
        "stages": {stage.name: {"peak": stage.peak, "parts": stage.parts} for stage in best.stages},
        "peak": best.peak,
        "reserve": RESERVE,
        "host": best.host,
        # The rates that it counts with are those of a card.
        "estimated_seconds": {} if room.on_cpu else {name: round(took, 3) for name, took in best.seconds.items()},
    }


def _print_head(network: "Network", canvas: tuple[int, int]) -> None:
    tower, g = network.understanding, network.generation
    print_line = console.out.print
    shown = network.references
    edited = f" from {shown} picture{'' if shown == 1 else 's'} as large" if shown else ""
    print_line(f"[bold]{network.ref}[/] at {canvas[0]} x {canvas[1]} px{edited}, {network.defaults.steps} steps")
    print_line(f"  generation     {_millions(g.parameters)}, of which router {_millions(g.router_parameters)}")
    vision = f"; what sees, {_millions(tower.vision)}, is left out" if tower.vision and not network.references else ""
    reads = f"{_millions(tower.linear + tower.other)}, {tower.layers} layers"
    print_line(f"  understanding  {network.understanding_name}: {reads}{vision}")
    if network.autoencoder:
        print_line(f"  autoencoder    {network.autoencoder.kind}: {_millions(network.autoencoder.parameters)}")


def _print_room(room: _Room, best: "Candidate", command: str) -> None:
    from rich.table import Table

    from mos_cli.planning.memory import GIB, RESERVE

    names = list(dict.fromkeys(name for stage in best.stages for name in stage.parts))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(room.name, style="bold", no_wrap=True)
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
    apart = "" if best.setting.batched_guidance else "; branches of guidance one by one"
    of = " GiB: fits all of them" if room.up_to else f" of {room.gib:.4g} GiB"
    console.out.print(f"  peak {best.needs / GIB:.1f}{of}{host}{tiled}{apart}")
    if not room.on_cpu:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in best.seconds.items() if seconds >= 0.05)
        about = f"about {best.total_seconds:.1f} s" if best.total_seconds >= 0.1 else "less than 0.1 s"
        console.out.print(f"  {about} a picture" + (f": {parts}" if parts else ""))
    console.out.print(f"  [green]{command}[/]", soft_wrap=True)


def _print_foot(network: "Network", understanding: str | None, *, on_cpu: bool, numbered: bool) -> None:
    from mos_cli.planning.candidates import BUS, FLOPS, MEMORY
    from mos_cli.planning.memory import TOKENS

    counted = f"Prompts of {TOKENS} tokens, one picture at a time."
    if not on_cpu:
        counted = (
            f"Time is an estimate, without decoding and loading: {FLOPS / 1e12:.0f} TFLOP/s, memory at "
            f"{MEMORY / 1e9:.0f} GB/s, bus at {BUS / 1e9:.0f} GB/s. {counted}"
        )
        counted += " A number behind --max-vram is for a GPU; without one take -p auto." if numbered else ""
    console.out.print(f"\n{counted}")
    if network.weightless:
        tower = f" --understanding {understanding}" if understanding else ""
        command = f"mos models init {network.ref} --out DIR{tower} --tower FOLDER"
        console.out.print(f"No weights yet: {command}", soft_wrap=True)
        console.out.print(f"FOLDER holds {network.understanding_name}. Untrained, it draws grey.")


def _gib(size: int) -> str:
    from mos_cli.planning.memory import GIB

    return f"{size / GIB:.2f}" if size else "-"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 10**9 else f"{parameters / 1e6:.1f}M"
