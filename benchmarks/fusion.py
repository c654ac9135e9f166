"""Fusions of the two towers, compared at equal parameters, data, steps and seeds by the judge's scores.

    python benchmarks/fusion.py run FOLDER [--seeds 3] [--steps N] [--only NAME]... [--art PATH] [--recipe PATH]
    python benchmarks/fusion.py table FOLDER

One process makes all runs, one after another: what the towers read and the scenes are shared by all of them. Every run
is a folder with a result.json; runs that have one are not made again, and a table can be made at any time.
"""

import json
import statistics
import time
from functools import cache
from itertools import chain
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from fusion_run import Bench, judged, one_run, parameters
from fusion_world import CATEGORIES, Scenes, World, read_library

from mos_cli.datasets.art.file import data_folder, load_art
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.datasets.tables import DataTable
from mos_cli.evaluation.judge import Judge, judge_folder
from mos_cli.training.recipe import TrainRecipe, load_recipe
from mos_cli.utils.devices import choose_device
from mos_cli.utils.files import atomic_write

RECIPE = Path(__file__).with_name("fusion.toml")
HELD_BACK = 512
"""Scenes of the training kind that the loss is measured on."""
PROMPTS = 50
"""Prompts per category."""

MINILM: dict[str, Any] = {"understanding": "all-minilm-l6-v2"}
SMOLLM2: dict[str, Any] = {
    "understanding": "smollm2-135m",
    "generation": {"states_layers": 31, "states_width": 576},
}
FUSIONS: dict[str, dict[str, Any]] = {
    "MoS": {},
    "cross-attention, last layer": {"generation": {"fusion": "last", "context": "cross"}},
    "joint attention, last layer": {"generation": {"fusion": "last", "context": "joint"}},
    "keys and values, last layer": {"generation": {"fusion": "last"}},
    "layer-aligned": {"generation": {"fusion": "aligned"}},
    "mean of all layers": {"generation": {"fusion": "mean"}},
}
SLOW_ROUTER = "MoS, router at a tenth of the rate"
ROUTERS: dict[str, dict[str, Any]] = {
    "MoS without the latent": {"generation": {"router_inputs": ["tokens", "time"]}},
    "MoS without the timestep": {"generation": {"router_inputs": ["tokens", "latent"]}},
    "MoS, one route per sample": {"generation": {"routing": "sample"}},
    # Scaled to sum to 1, the single weight of k = 1 would always be 1 and its router would never learn.
    "MoS, k = 1, weights not scaled": {"generation": {"top_k": 1, "renormalise": False}},
    "MoS, k = 2, weights not scaled": {"generation": {"top_k": 2, "renormalise": False}},
    "MoS, k = 3, weights not scaled": {"generation": {"top_k": 3, "renormalise": False}},
    "MoS, epsilon = 0": {"train": {"epsilon": 0.0}},
    SLOW_ROUTER: {},
}
COMPARED = {f"MiniLM: {name}": [MINILM, changes] for name, changes in FUSIONS.items()}
COMPARED |= {f"SmolLM2: {name}": [SMOLLM2, changes] for name, changes in FUSIONS.items()}
TAKEN_APART = {f"MiniLM: {name}": [MINILM, changes] for name, changes in ROUTERS.items()}
VARIANTS = COMPARED | TAKEN_APART

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    folder: Path,
    seeds: int = 3,
    steps: Annotated[int | None, typer.Option(help="For all runs, instead of the recipe's.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A variant to run; may be repeated. All, where none.")] = None,
    scenes: Annotated[int, typer.Option(help="Different scenes to train on.")] = 4096,
    art: Path | None = None,
    recipe: Path = RECIPE,
) -> None:
    """Trains and judges every variant with every seed: first the fusions, a seed at a time, then the router's parts."""
    names = [name for name in VARIANTS if name in (only or VARIANTS)]
    plan = [(name, seed) for part in (COMPARED, TAKEN_APART) for seed in range(seeds) for name in part if name in names]
    device = choose_device("auto")
    _set_up(device)
    bench = _bench(folder, names, scenes, art or data_folder(), load_recipe(str(recipe)), device)
    for name, seed in plan:
        target = folder / _slug(name) / str(seed)
        if (target / "result.json").exists():
            continue
        rate = 0.1 if name.endswith(SLOW_ROUTER) else 1.0
        result = one_run(variant(name, seed, steps, recipe), bench, target, router_rate=rate)
        text = json.dumps({"variant": name, "seed": seed} | result, indent=1)
        atomic_write(target / "result.json", text.encode(), overwrite=True)
        mean = statistics.mean(result["scores"].values())
        _report(f"{name}, seed {seed}: loss {result['loss']:.4f}, mean score {mean:.3f}, {result['seconds']:.0f} s")


@app.command()
def table(folder: Path) -> None:
    """Prints the comparison as markdown: mean and, in brackets, standard deviation over the seeds."""
    print(f"| variant | parameters | seeds | loss | loss, unmet | {' | '.join(CATEGORIES)} | mean | found | s a step |")
    print(f"| --- | {' | '.join(['---:'] * (len(CATEGORIES) + 7))} |")
    for name in VARIANTS:
        results = [json.loads(path.read_text()) for path in sorted((folder / _slug(name)).glob("*/result.json"))]
        if not results:
            continue
        cells = [
            f"{results[0]['parameters'] / 1e6:.2f}M",
            str(len(results)),
            *(_spread([result[key] for result in results], 4) for key in ("loss", "loss_unmet")),
            *(_spread([result["scores"][category] for result in results], 2) for category in CATEGORIES),
            *(_spread([statistics.mean(result[key].values()) for result in results], 3) for key in ("scores", "found")),
            f"{statistics.median(result['seconds_per_step'] for result in results):.3f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    ceiling = json.loads((folder / "ceiling.json").read_text())
    cells = [*(f"{ceiling[category]:.2f}" for category in CATEGORIES), f"{statistics.mean(ceiling.values()):.3f}"]
    print(f"| true scenes | | | | | {' | '.join(cells)} | | |")


def variant(name: str, seed: int, steps: int | None, path: Path = RECIPE) -> TrainRecipe:
    """The recipe of one run; its feed-forward layers are sized so that all of a tower's variants are equally large."""
    given = load_recipe(str(path), {"steps": steps} if steps else {})
    base: dict[str, Any] = given.model_dump(exclude_none=True)
    tower, changes = VARIANTS[name]
    for change in (tower, changes, {"train": {"seed": seed}}):
        for key, value in change.items():
            base[key] = base[key] | value if isinstance(value, dict) else value
    reference = parameters(given.generation | tower.get("generation", {}))
    sizes = base["generation"]
    excess = (parameters(sizes) - reference) / (3 * sizes["width"] * sizes["depth"])
    sizes["hidden"] -= round(excess)
    return TrainRecipe.model_validate(base)


def _bench(folder: Path, names: list[str], scenes: int, art: Path, recipe: TrainRecipe, device: torch.device) -> Bench:
    """Scenes, prompts and their hidden states; writes the judge's ceiling."""
    assert isinstance(recipe.data, DataTable)
    world, canvas = World(load_vocabulary(load_art(art), recipe.data)), recipe.bundle.canvas.native[0]
    train, held_back = world.scenes(scenes, canvas, "train"), world.scenes(HELD_BACK, canvas, "held back")
    entries, judge = world.prompts(PROMPTS), Judge(judge_folder())
    prompts, libraries = [entry.prompt for entry in entries], {}
    true = world.draw([entry.description for entry in entries], canvas, Random(0))
    if not (folder / "ceiling.json").exists():
        atomic_write(folder / "ceiling.json", json.dumps(judged(judge, entries, true)["scores"]).encode())
    for tower in dict.fromkeys(VARIANTS[name][0]["understanding"] for name in names):
        captions = chain([""], train.captions, held_back.captions, prompts)
        libraries[tower] = read_library(tower, captions, folder / "states", _report)
    return Bench(train, held_back, Scenes(prompts, true), entries, libraries, judge, device)


def _set_up(device: torch.device) -> None:
    """For a process with many runs: keeps the compiled blocks of all variants."""
    torch._dynamo.config.recompile_limit = 64
    if device.type == "cuda":
        return
    # As in `mos_cli.training.launch`.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


@cache
def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _report(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _spread(values: list[float], digits: int) -> str:
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    app()
