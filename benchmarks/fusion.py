"""Ways of joining the two towers, compared at equal parameters, data, steps and seeds, and judged by what is drawn.

    python benchmarks/fusion.py run FOLDER [--seeds 3] [--jobs 2] [--steps N] [--only TEXT] [--art PATH]
    python benchmarks/fusion.py table FOLDER

Every run of fusion.toml with one variant's changes is a folder with a result.json; runs that have one are not made
again. Prompts are SceneBench's, made for the small world's own words.

Shapes: B pictures, T context tokens, H x W a picture's size.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.runtime.files import atomic_write
from mos_cli.sampling.sampler import NEGATIVE, POSITIVE, Guidance, sample
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.art.file import data_folder, load_art
from mos_cli.training.evaluation.bench import CATEGORIES, Entry, make_bench
from mos_cli.training.evaluation.examine import Examiner, TrueScenes
from mos_cli.training.evaluation.judge import Judge, judge_folder
from mos_cli.training.loop import Trainer
from mos_cli.training.recipe import DataTable, TrainRecipe, load_recipe
from mos_cli.training.run import prepare
from mos_cli.training.scenes.vocabulary import load_vocabulary

RECIPE = Path(__file__).with_name("fusion.toml")
PROMPTS = 60
"""Prompts per category."""
BATCH = 60

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
ROUTERS: dict[str, dict[str, Any]] = {
    "MoS without the latent": {"generation": {"router_inputs": ["tokens", "time"]}},
    "MoS without the timestep": {"generation": {"router_inputs": ["tokens", "latent"]}},
    "MoS, one route per sample": {"generation": {"routing": "sample"}},
    # Scaled to sum to 1, the single weight of k = 1 would always be 1 and its router would never learn.
    "MoS, k = 1, weights not scaled": {"generation": {"top_k": 1, "renormalise": False}},
    "MoS, k = 2, weights not scaled": {"generation": {"top_k": 2, "renormalise": False}},
    "MoS, k = 3, weights not scaled": {"generation": {"top_k": 3, "renormalise": False}},
    "MoS, epsilon = 0": {"train": {"epsilon": 0.0}},
}
VARIANTS = {f"MiniLM: {name}": [MINILM, changes] for name, changes in (FUSIONS | ROUTERS).items()}
VARIANTS |= {f"SmolLM2: {name}": [SMOLLM2, changes] for name, changes in FUSIONS.items()}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    folder: Path,
    seeds: int = 3,
    jobs: int = 2,
    steps: Annotated[int | None, typer.Option(help="For all runs, instead of the recipe's.")] = None,
    only: Annotated[str, typer.Option(help="Variants with this in their name.")] = "",
    art: Path | None = None,
) -> None:
    """Trains and judges every variant with every seed, `jobs` at a time; seeds go round before variants do."""
    plan = [(name, seed) for seed in range(seeds) for name in VARIANTS if only in name]

    def start(one: tuple[str, int]) -> None:
        name, seed = one
        target = folder / _slug(name) / str(seed)
        if (target / "result.json").exists():
            return
        target.mkdir(parents=True, exist_ok=True)
        arguments = [name, str(seed), str(target), str(steps or 0), str(art or data_folder())]
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with (target / "log.txt").open("w") as log:
            code = subprocess.run(
                [sys.executable, __file__, "one", *arguments],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        print(f"{name}, seed {seed}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, plan))


@app.command(hidden=True)
def one(name: str, seed: int, target: Path, steps: int, art: Path) -> None:
    """One run, from nothing to result.json."""
    recipe = variant(name, seed, steps)
    trainer = prepare(recipe, art, target)
    losses: list[float] = []
    trainer.run(lambda metrics: losses.append(metrics.loss), lambda _trainer: None)
    opened = load_art(art)
    assert isinstance(recipe.data, DataTable)
    entries = make_bench(load_vocabulary(opened, recipe.data), PROMPTS)
    examiner = Examiner(Judge(judge_folder()), TrueScenes(opened), entries, recipe.bundle.canvas.native[0])
    _, passed = examiner.examine(drawn(trainer, entries))
    result = {
        "variant": name,
        "seed": seed,
        "parameters": parameters(recipe.generation),
        "steps": recipe.train.steps,
        "loss": statistics.mean(losses[-100:]),
        "scores": {
            category: statistics.mean(
                float(ok) for ok, entry in zip(passed, entries, strict=True) if entry.category == category
            )
            for category in CATEGORIES
        },
    }
    atomic_write(target / "result.json", json.dumps(result, indent=1).encode(), overwrite=True)


@app.command()
def table(folder: Path) -> None:
    """Prints the comparison as markdown: mean and, in brackets, standard deviation over the seeds."""
    print(f"| variant | parameters | seeds | loss | {' | '.join(CATEGORIES)} | mean |")
    print(f"| --- | ---: | ---: | {' | '.join(['---:'] * (len(CATEGORIES) + 2))} |")
    for name in VARIANTS:
        results = [json.loads(path.read_text()) for path in sorted((folder / _slug(name)).glob("*/result.json"))]
        if not results:
            continue
        scores = [[result["scores"][category] for result in results] for category in CATEGORIES]
        means = [statistics.mean(row) for row in zip(*scores, strict=True)]
        cells = [
            f"{results[0]['parameters'] / 1e6:.2f}M",
            str(len(results)),
            _spread([result["loss"] for result in results], 4),
            *(_spread(values, 2) for values in [*scores, means]),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def variant(name: str, seed: int, steps: int) -> TrainRecipe:
    """The recipe of one run; its feed-forward layers are sized so that all of a tower's variants are equally large."""
    base: dict[str, Any] = load_recipe(str(RECIPE)).model_dump(exclude_none=True)
    tower, changes = VARIANTS[name]
    for change in (tower, changes, {"train": {"seed": seed} | ({"steps": steps} if steps else {})}):
        for key, value in change.items():
            base[key] = base[key] | value if isinstance(value, dict) else value
    reference = parameters(load_recipe(str(RECIPE)).generation | tower.get("generation", {}))
    sizes = base["generation"]
    excess = (parameters(sizes) - reference) / (3 * sizes["width"] * sizes["depth"])
    sizes["hidden"] -= round(excess)
    return TrainRecipe.model_validate(base)


def parameters(generation: dict[str, Any]) -> int:
    """How many a network of this configuration has, router included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GenerationTower(**generation).parameters())


@torch.no_grad()
def drawn(trainer: Trainer, entries: tuple[Entry, ...]) -> torch.Tensor:
    """Draws every prompt from the noise of its place in the list with the averaged weights, [B, 3, H, W]."""
    tower, device, recipe = trainer.averaged_tower(), trainer.device, trainer.recipe
    side, defaults = recipe.bundle.canvas.native[0], recipe.bundle.defaults
    noise = torch.randn(len(entries), 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    guidance, scheduler, pictures = Guidance(defaults.cfg, defaults.cfg_interval), FlowMatchEulerDiscreteScheduler(), []
    for start in range(0, len(entries), BATCH):
        prompts = [entry.prompt for entry in entries[start : start + BATCH]]
        banks = {}
        for branch, texts in {POSITIVE: prompts, NEGATIVE: [""] * len(prompts)}.items():
            reading = trainer.batches.understanding.read(texts)
            banks[branch] = tower.read(reading.states_BTMS.to(device), reading.mask_BT.to(device))
        part = noise[start : start + BATCH]
        z = sample(tower, part, banks, steps=defaults.steps, guidance=guidance, scheduler=scheduler)
        pictures.append(z.clamp(-1, 1).cpu())
    return torch.cat(pictures)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _spread(values: list[float], digits: int) -> str:
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    app()
