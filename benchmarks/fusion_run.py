"""One run of the fusion comparison: trains a network on encoded scenes, measures its loss, and judges its pictures.

Shapes: B pictures, H x W a picture's size, J generation blocks, M layers.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from fusion_world import CATEGORIES, Library, Scenes
from torch import Tensor

from mos_cli.evaluation.checks import passes
from mos_cli.evaluation.judge import Judge
from mos_cli.evaluation.scenebench import Entry
from mos_cli.sampling.flow import logit_normal, noised, velocity_loss
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Guidance
from mos_cli.sampling.sampler import make_sigmas, sample_batch
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.batches import Batch
from mos_cli.training.ema import PowerEMA
from mos_cli.training.objective import Objective, layer_use
from mos_cli.training.optimiser import build_optimisers, rates_at, set_rates, start_states
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.stages import curriculum

BATCH = 100
"""Pictures drawn or measured at once."""


@dataclass(frozen=True)
class Bench:
    """The data of all runs: scenes to train on, others of that kind, and true scenes of the prompts.

    `libraries` hold what each understanding tower reads of all captions and prompts.
    """

    train: Scenes
    held_back: Scenes
    unmet: Scenes
    entries: list[Entry]
    libraries: dict[str, Library]
    judge: Judge
    device: torch.device


def one_run(recipe: TrainRecipe, bench: Bench, target: Path, *, router_rate: float = 1.0) -> dict[str, Any]:
    """Trains, measures and judges one variant with one seed; the averaged weights and the pictures stay in `target`."""
    assert recipe.understanding is not None
    started, fusion = time.perf_counter(), recipe.generation.get("fusion", "routed")
    assert recipe.understanding is not None
    library = bench.libraries[recipe.understanding].handed(fusion, recipe.generation["depth"])
    tower, seconds = _trained(recipe, library, bench, router_rate)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        measured = _measured(tower, recipe, library, bench.held_back)
        unmet = _measured(tower, recipe, library, bench.unmet)["loss"]
        pictures = _drawn(tower, recipe, library, bench)
    target.mkdir(parents=True, exist_ok=True)
    tower.bfloat16().save_pretrained(target / "generation")
    torch.save(((pictures + 1) * 127.5).round().byte(), target / "pictures.pt")
    return {
        "parameters": parameters(recipe.generation),
        "steps": recipe.train.steps,
        "seconds_per_step": seconds,
        **measured,
        "loss_unmet": unmet,
        **judged(bench.judge, bench.entries, pictures),
        "seconds": time.perf_counter() - started,
    }


def parameters(generation: dict[str, Any]) -> int:
    """The number of parameters of a network of this configuration, router included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GenerationTower(**generation).parameters())


def handed_sizes(generation: dict[str, Any]) -> dict[str, Any]:
    """The network of a configuration, for the states that `Library.handed` leaves: it computes the same."""
    fusion = generation.get("fusion", "routed")
    if fusion == "routed":
        return generation
    if fusion == "aligned":
        return generation | {"states_layers": generation["depth"]}
    return generation | {"states_layers": 1, "fusion": "last"}


def _trained(recipe: TrainRecipe, library: Library, bench: Bench, router_rate: float) -> tuple[GenerationTower, float]:
    """The averaged network, and the median of the processor's seconds that a step took."""
    train, plan, device = recipe.train, curriculum(recipe), bench.device
    torch.manual_seed(train.seed)
    tower = GenerationTower(**handed_sizes(recipe.generation)).to(device)  # type: ignore[arg-type]
    objective, optimisers = Objective(tower, train.epsilon), build_optimisers(tower)
    if train.compile:
        objective.compile_blocks()
    if tower.router is not None:
        _part(optimisers, tower.router)
    start_states(optimisers)
    named: dict[str, Tensor] = dict(tower.named_parameters())
    average, took = PowerEMA(named), []
    for step, batch in enumerate(_batches(recipe, library, bench)):
        began = time.process_time()
        set_rates(optimisers, rates_at(plan, step))
        if tower.router is not None:
            for optimiser in optimisers:
                optimiser.param_groups[-1]["lr"] *= router_rate
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            loss, _ = objective(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), train.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        average.update(named, step + 1)
        took.append(time.process_time() - began)
    # A fresh one: for drawing the blocks would be compiled once more.
    averaged = GenerationTower(**handed_sizes(recipe.generation))
    averaged.load_state_dict(average.averages[train.ema])
    return averaged.eval().to(device), statistics.median(took)  # type: ignore[arg-type]


def _part(optimisers: list[torch.optim.Optimizer], router: torch.nn.Module) -> None:
    """Gives the router's parameters a group of their own, the last of each optimiser."""
    own = set(router.parameters())
    for optimiser in optimisers:
        (group,) = optimiser.param_groups
        mine = [parameter for parameter in group["params"] if parameter in own]
        group["params"] = [parameter for parameter in group["params"] if parameter not in own]
        optimiser.add_param_group({"params": mine})


def _batches(recipe: TrainRecipe, library: Library, bench: Bench) -> Iterator[Batch]:
    """The run's batches: a seed's pictures, noise and times are the same for every variant."""
    train, chance = recipe.train, torch.Generator().manual_seed(recipe.train.seed)
    rows, pictures = library.rows_of(bench.train.captions), bench.train.pictures_N3HW
    for _ in range(recipe.train.steps or 0):
        chosen = torch.randint(len(rows), (train.batch,), generator=chance)
        wordless = torch.rand(train.batch, generator=chance) < train.drop_caption
        read = torch.where(wordless, library.rows[""], rows[chosen])
        yield _batch(pictures[chosen], read, recipe, library, chance, bench.device)


def _batch(
    z0: Tensor, rows: Tensor, recipe: TrainRecipe, library: Library, chance: torch.Generator, device: torch.device
) -> Batch:
    t = logit_normal(len(rows), recipe.train.time_mean, recipe.train.time_std, chance)
    z = noised(z0, torch.randn(z0.shape, generator=chance), t)
    states, mask = library.states_NTMS[rows], library.mask_NT[rows]
    return Batch(z0.to(device), z.to(device), t.to(device), states.to(device), mask.to(device))


@torch.no_grad()
def _measured(tower: GenerationTower, recipe: TrainRecipe, library: Library, scenes: Scenes) -> dict[str, Any]:
    """The loss on scenes, and for routes the use of the layers [J, M] and the mean first kept weight."""
    rows, chance = library.rows_of(scenes.captions), torch.Generator().manual_seed(0)
    losses, uses, firsts = [], [], []
    for part in torch.arange(len(rows)).split(BATCH):
        batch = _batch(scenes.pictures_N3HW[part], rows[part], recipe, library, chance, tower.device)
        x_hat, route = tower(batch.z_BCHW, batch.t_B, tower.project_states(batch.states_BTMS, batch.mask_BT))
        losses.append(velocity_loss(x_hat, batch.z0_BCHW, batch.t_B).item() * len(part))
        uses.append(layer_use(route, batch.mask_BT, tower.states_shape[0]))
        firsts.append(route.weights_BTJK[batch.mask_BT][..., 0].mean().item())
    found: dict[str, Any] = {"loss": sum(losses) / len(rows)}
    if tower.router is not None:
        found |= {"layer_use": torch.stack(uses).mean(dim=0).tolist(), "first_weight": statistics.mean(firsts)}
    return found


def _drawn(tower: GenerationTower, recipe: TrainRecipe, library: Library, bench: Bench) -> Tensor:
    """A picture of every prompt, each from the noise of its own seed, [B, 3, H, W]."""
    defaults, side, pictures = recipe.bundle.defaults, recipe.bundle.canvas.native[0], []
    guidance = Guidance(defaults.cfg, defaults.cfg_interval)
    sigmas = make_sigmas(FlowMatchEulerDiscreteScheduler(), defaults.steps)
    for start in range(0, len(bench.entries), BATCH):
        entries = bench.entries[start : start + BATCH]
        without = _bank(tower, library, "", bench.device)
        banks = [{POSITIVE: _bank(tower, library, one.prompt, bench.device), NEGATIVE: without} for one in entries]
        noise = [torch.randn(3, side, side, generator=torch.Generator().manual_seed(one.seed)) for one in entries]
        z1 = torch.stack(noise).to(bench.device)
        z = sample_batch(tower, z1, banks, sigmas=sigmas, solver="euler", guidance=guidance)
        pictures.append(z.clamp(-1, 1).float().cpu())
    return torch.cat(pictures)


@torch.no_grad()
def _bank(tower: GenerationTower, library: Library, caption: str, device: torch.device) -> StateBank:
    rows = library.rows_of([caption])
    return tower.project_states(library.states_NTMS[rows].to(device), library.mask_NT[rows].to(device))


def judged(judge: Judge, entries: list[Entry], pictures: Tensor) -> dict[str, dict[str, float]]:
    """By category: the share of pictures that pass, and of the requested things that are detected in their colour."""
    passed, shares = [], []
    for entry, seen in zip(entries, judge.detect(pictures), strict=True):
        things = entry.description.things
        there = [any(one.word == t.word and t.colour in (None, one.colour) for one in seen) for t in things]
        passed.append(float(passes(entry, seen)))
        shares.append(sum(there) / len(things))
    return {"scores": _by_category(entries, passed), "found": _by_category(entries, shares)}


def _by_category(entries: list[Entry], values: list[float]) -> dict[str, float]:
    return {
        category: statistics.mean(value for value, e in zip(values, entries, strict=True) if e.category == category)
        for category in CATEGORIES
    }
