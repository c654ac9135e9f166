"""`mos plan`: how much memory a model needs, and the fastest setting that fits, from configs alone."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import plannable_names
from mos_cli.cli.output import print_json, print_view, stdout
from mos_cli.errors import MemoryLimitError
from mos_cli.utils.counts import counted
from mos_cli.utils.devices import Precision

if TYPE_CHECKING:
    from mos_cli.bundles.blueprints import Network
    from mos_cli.planning.candidates import Candidate

_STAGES = ("encode", "bank", "sample", "decode")


@dataclass(frozen=True)
class _Memory:
    """GiB of a GPU, or of free main memory.

    Args:
        option: the value of --max-vram that stands for it.
        on_cpu: whether it is main memory.
        up_to: GiB of the largest GPU that the same setting is fastest on; 0 for this one alone.
    """

    gib: float
    option: str
    on_cpu: bool = False
    up_to: float = 0

    @property
    def name(self) -> str:
        to = f" to {self.up_to:g}" if self.up_to else ""
        return f"{self.gib:.4g}{to} GiB {'free' if self.on_cpu else 'GPU'}"


def plan(
    model: Annotated[
        str, typer.Argument(autocompletion=plannable_names, help="A bundle or a blueprint: name, folder or hub id.")
    ] = "emoji",
    max_vram: Annotated[
        str | None,
        typer.Option(
            "--max-vram",
            envvar="MOS_MAX_VRAM",
            metavar="GIB",
            help="Memory of the GPU; auto: what this machine has, as `mos generate -p auto` takes it.",
            show_default="8, 12, 16 and 24",
        ),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="Size to draw.", show_default="the model's")] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="KIND",
            help="none, int8 or nf4; nf4,none for the understanding and the generation tower apart.",
            show_default="what is fastest",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            "--precision",
            help="What is not quantised, as `mos generate --precision` draws in. Understanding towers of a billion "
            "parameters or more stay in bf16.",
            show_default="bf16; with --max-vram auto, this machine's",
        ),
    ] = None,
    references: Annotated[
        int,
        typer.Option(
            "--references",
            min=0,
            metavar="N",
            help="Plan an edit of this many pictures; 0 plans a picture from a prompt.",
        ),
    ] = 0,
    understanding: Annotated[
        str | None,
        typer.Option(
            "--understanding", metavar="NAME", help="Understanding tower of a blueprint.", show_default="its first"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per GPU size.")] = False,
) -> None:
    """Show how much GPU memory a model needs, stage by stage, and the fastest setting that fits; load no weights."""
    from mos_cli.bundles.blueprints import find_network
    from mos_cli.config.settings import parse_size
    from mos_cli.planning.candidates import GPU_SIZES, candidates, parse_quant

    memories = [_Memory(gib, f"{gib:g}") for gib in GPU_SIZES]
    if max_vram is not None:
        memory, precision = _memory_of(max_vram, precision)
        memories = [memory]
    network = find_network(model, understanding, precision=precision or "bf16", references=references)
    pixels = parse_size(size, network.canvas)
    found = candidates(network, pixels, quant=None if quant is None else parse_quant(quant))
    answers = [(memory, _answer(found, memory)) for memory in memories]
    none_fits = all(isinstance(answer, MemoryLimitError) for _, answer in answers)
    if as_json:
        for memory, answer in answers:
            print_json([{"model": model, "size": list(pixels), "card": memory.gib, **_row(answer, memory)}])
    else:
        _print_head(network, pixels)
        if len(answers) > 1 and len({id(answer) for _, answer in answers}) == 1:
            # A model that fits the smallest GPU with its fastest setting needs the same on all of them.
            answers = [(replace(memories[0], up_to=memories[-1].gib), answers[0][1])]
        commands = []
        for memory, answer in answers:
            if isinstance(answer, MemoryLimitError):
                if max_vram is not None:
                    raise answer
                stdout.print(f"\n[bold]{memory.name}[/]  {answer}", soft_wrap=True)
            else:
                commands.append(_command(network, answer, memory, size))
                _print_memory(memory, answer, commands[-1])
        numbered = any("--max-vram" in command for command in commands)
        _print_foot(network, understanding, on_cpu=memories[0].on_cpu, numbered=numbered)
    if max_vram is not None and none_fits:
        raise typer.Exit(MemoryLimitError.exit_code)


def _memory_of(max_vram: str, precision: Precision | None) -> tuple[_Memory, Precision | None]:
    """The memory that --max-vram names, and the precision to plan for; torch is imported for auto only."""
    from mos_cli.config.settings import available_memory, make_settings

    gib = make_settings(max_vram=max_vram).max_vram
    if isinstance(gib, float):
        return _Memory(gib, f"{gib:g}"), precision
    from mos_cli.utils.devices import choose_device, choose_precision

    device = choose_device("auto")
    return _Memory(available_memory(device), "auto", on_cpu=device.type == "cpu"), precision or choose_precision(device)


def _answer(found: "list[Candidate]", memory: _Memory) -> "Candidate | MemoryLimitError":
    from mos_cli.planning.candidates import fastest, fastest_on_cpu

    try:
        return fastest_on_cpu(found, memory.gib) if memory.on_cpu else fastest(found, memory.gib)
    except MemoryLimitError as error:
        return error


def _command(network: "Network", best: "Candidate", memory: _Memory, size: str | None) -> str:
    words = [
        "mos edit PICTURE INSTRUCTION" if network.references else "mos generate PROMPT",
        f"-m {'DIR' if network.weightless else network.ref}",
    ]
    if memory.on_cpu:
        words += ["--max-vram auto", f"--quant {best.quant}"]
    elif not (memory.up_to and (best.quant, best.setting.offload, best.setting.tiled) == ("none", "none", False)):
        # What fits every GPU without changes needs no limit: the same command is right without a GPU.
        words += [f"--max-vram {memory.option}", best.options]
    words += ["--precision fp32"] if network.value_bytes == 4 else []
    words += [f"--size {size}"] if size else []
    return " ".join(words)


def _row(best: "Candidate | MemoryLimitError", memory: _Memory) -> dict[str, Any]:
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
        # The rates behind the estimate are those of a GPU.
        "estimated_seconds": {} if memory.on_cpu else {name: round(took, 3) for name, took in best.seconds.items()},
    }


def _print_head(network: "Network", size: tuple[int, int]) -> None:
    from mos_cli.bundles.adapters import BaseNetwork

    print_line = stdout.print
    shown = network.references
    edited = f" from {shown} picture{'' if shown == 1 else 's'} as large" if shown else ""
    print_line(f"[bold]{network.ref}[/] at {size[0]} x {size[1]} px{edited}, {counted(network.defaults.steps, 'step')}")
    if isinstance(network, BaseNetwork):
        shape = network.shape
        print_line(f"  transformer    {_millions(shape.transformer.parameters)}, {network.index.blocks} blocks")
        print_line(f"  language model {_millions(shape.text_encoder.parameters)}, {network.index.layers} states")
        print_line(f"  autoencoder    {_millions(shape.vae.parameters)}")
        return
    tower, g = network.understanding, network.generation
    print_line(f"  generation     {_millions(g.parameters)}, of which router {_millions(g.router_parameters)}")
    vision = f"; vision, {_millions(tower.vision)}, is left out" if tower.vision and not network.references else ""
    reads = f"{_millions(tower.linear + tower.other)}, {tower.layers} layers"
    print_line(f"  understanding  {network.understanding_name}: {reads}{vision}")
    if network.autoencoder:
        print_line(f"  autoencoder    {network.autoencoder.kind}: {_millions(network.autoencoder.parameters)}")


def _print_memory(memory: _Memory, best: "Candidate", command: str) -> None:
    from rich.table import Table

    from mos_cli.planning.memory import GIB, RESERVE

    names = list(dict.fromkeys(name for stage in best.stages for name in stage.parts))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(memory.name, style="bold", no_wrap=True)
    for stage in _STAGES:
        table.add_column(stage, justify="right")
    for name in names:
        table.add_row(name, *(_gib(stage.parts.get(name, 0)) for stage in best.stages))
    table.add_row("reserve", *(_gib(RESERVE) for _ in best.stages))
    table.add_row("[bold]total, GiB[/]", *(f"[bold]{(stage.peak + RESERVE) / GIB:.2f}[/]" for stage in best.stages))
    stdout.print()
    print_view(table, wide=True)
    host = f"; {best.host / GIB:.1f} GiB of main memory" if best.host else ""
    tiled = "; decoded in tiles" if best.setting.tiled else ""
    apart = "" if best.setting.batched_guidance else "; branches of guidance one by one"
    of = " GiB: fits all of them" if memory.up_to else f" of {memory.gib:.4g} GiB"
    stdout.print(f"  peak {best.needs / GIB:.1f}{of}{host}{tiled}{apart}")
    if not memory.on_cpu:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in best.seconds.items() if seconds >= 0.05)
        about = f"about {best.total_seconds:.1f} s" if best.total_seconds >= 0.1 else "less than 0.1 s"
        stdout.print(f"  {about} a picture" + (f": {parts}" if parts else ""))
    stdout.print(f"  [green]{command}[/]", soft_wrap=True)


def _print_foot(network: "Network", understanding: str | None, *, on_cpu: bool, numbered: bool) -> None:
    from mos_cli.planning.memory import TOKENS
    from mos_cli.planning.rates import BUS, FLOPS, MEMORY

    counted = f"Prompts of {TOKENS} tokens, one picture at a time."
    if not on_cpu:
        counted = (
            f"Time is an estimate, without decoding and loading: {FLOPS / 1e12:.0f} TFLOP/s, memory at "
            f"{MEMORY / 1e9:.0f} GB/s, bus at {BUS / 1e9:.0f} GB/s. {counted}"
        )
        counted += " A number behind --max-vram is for a GPU; without one take -p auto." if numbered else ""
    stdout.print(f"\n{counted}")
    if network.weightless:
        tower = f" --understanding {understanding}" if understanding else ""
        command = f"mos models init {network.ref} --out DIR{tower} --tower FOLDER"
        stdout.print(f"No weights yet: {command}", soft_wrap=True)
        stdout.print(f"FOLDER holds {network.understanding_name}. Untrained, it draws grey.")


def _gib(size: int) -> str:
    from mos_cli.planning.memory import GIB

    return f"{size / GIB:.2f}" if size else "-"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 10**9 else f"{parameters / 1e6:.1f}M"
