"""Two image encoders: the frozen stages of EfficientNet-Lite0, and a small encoder trained with the language model.

    python benchmarks/image_encoders.py train FOLDER [--art PATH] [--steps N] [--scenes N]
    python benchmarks/image_encoders.py probe FOLDER [--art PATH] [--scenes N]

`train` teaches the small encoder to describe scenes and keeps it after 0, 1/4, 1/2 and all of its steps. `probe` asks
linear probes on every state of both encoders, with scenes that are new to both, and prints tables.

Shapes: B pictures, H x W their size, N rows of a probe, D features, V image tokens, T caption tokens, S width of a
sentence's state, Q words.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from image_encoder_scenes import UNMET_EVERY, Sheet, World
from image_encoder_trained import Captioner, Encoder, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mos_cli.bundles.bundle import find_bundle
from mos_cli.datasets.art.file import data_folder, load_art
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.datasets.tables import DataTable
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.recipe import load_recipe
from mos_cli.training.references import understanding_of
from mos_cli.utils.files import atomic_write
from mos_cli.utils.migration import part_folder
from mos_cli.utils.threads import cpu_threads

RECIPE = "train-emoji"
BATCH = 128
RATE = 2e-3
COLUMNS = {
    "cells": "what a cell shows",
    "things": "of cells with a thing",
    "unmet": "with a thing (b) never met",
    "paint": "its paint",
    "style": "its style",
    "present": "things in the picture",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    folder: Path,
    art: Path | None = None,
    steps: int = 1800,
    scenes: Annotated[int, typer.Option(help="Different scenes to train on.")] = 32768,
) -> None:
    """Trains the small encoder; its rate stays level and its weights are averaged, so that checkpoints compare."""
    torch.manual_seed(0)
    world, started = make_world(art or data_folder()), time.perf_counter()
    pictures, captions = world.lesson(scenes)
    tower = UnderstandingTower(understanding_of(load_recipe(RECIPE), None)[1], dtype=torch.bfloat16)
    sentences, ids = read(captions, tower)
    drawn = time.perf_counter()
    print(f"drew and read {scenes} scenes in {drawn - started:.0f} s", flush=True)
    captioner = Captioner(sentences.shape[1], int(ids.max()) + 1, ids.shape[1])
    averaged = AveragedModel(captioner.encoder, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimiser = torch.optim.AdamW(captioner.parameters(), RATE, weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=min(100, steps))
    kept: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[tuple[float, float]] = []
    for step, rows in enumerate(_shuffled(scenes, min(BATCH, scenes))):
        if step in (0, steps // 4, steps // 2, steps):
            save_file(averaged.module.state_dict(), folder / f"{step}.safetensors")
            recent = [statistics.mean(part) for part in zip(*losses[-100:], strict=True)]
            kept.append({"step": step, "pictures": step * len(rows), "seconds": time.perf_counter() - drawn})
            kept[-1]["losses"] = recent
            print(json.dumps(kept[-1]), flush=True)
        if step == steps:
            break
        matched, probes = captioner.losses(unpacked(pictures[rows]), sentences[rows], ids[rows])
        optimiser.zero_grad()
        (matched + probes).backward()
        nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
        optimiser.step()
        warmup.step()
        averaged.update_parameters(captioner.encoder)
        losses.append((matched.item(), probes.item()))
    atomic_write(folder / "training.json", json.dumps(kept, indent=1).encode(), overwrite=True)


@app.command()
def probe(
    folder: Path,
    art: Path | None = None,
    scenes: Annotated[
        int, typer.Option(help="Scenes the probes learn from; a quarter as many test them, twice.")
    ] = 4000,
    steps: Annotated[int, typer.Option(help="Steps of AdamW for a probe.")] = 400,
) -> None:
    """Prints the scores and costs of each encoder, as markdown."""
    world = make_world(art or data_folder())
    sheets = {kind: world.sheet(kind, scenes if kind == "probe" else scenes // 3) for kind in ("probe", "met", "new")}
    stages = part_folder(find_bundle("emoji").folder, "image_encoder")
    encoders: dict[str, ImageEncoder | Encoder] = {
        "(a) frozen": ImageEncoder.from_pretrained(stages, torch_dtype=torch.float32)
    }  # type: ignore[dict-item]
    kept = json.loads((folder / "training.json").read_text())
    for entry in kept:
        encoder = Encoder().eval()
        encoder.load_state_dict(load_file(folder / f"{entry['step']}.safetensors"))
        encoders[f"(b) {entry['pictures']:,} pictures"] = encoder.requires_grad_(False)
    last, per_state = list(encoders)[-1], []
    head = f"{' | '.join(COLUMNS.values())} |\n| --- |{' ---: |' * len(COLUMNS)}"
    print(f"Known / new combinations of words and styles.\n\n| all states | {head}")
    print(f"| the most frequent | {_cells(guessed(sheets))} |", flush=True)
    for name, each in encoders.items():
        seen = {kind: encode(each, sheet.pictures_B3HW) for kind, sheet in sheets.items()}
        all_states = {kind: torch.cat(states, 2) for kind, states in seen.items()}
        print(f"| {name} | {_cells(scored(all_states, sheets, steps))} |", flush=True)
        for state, width in enumerate(each.widths if name in ("(a) frozen", last) else ()):
            alone = {kind: states[state] for kind, states in seen.items()}
            per_state.append(f"| {name[:3]} {state}, {width} wide | {_cells(scored(alone, sheets, steps))} |")
    print(f"\n| one state | {head}", *per_state, sep="\n")
    print("\n| | weights | bytes, bf16 | ms a picture, one thread |\n| --- | ---: | ---: | ---: |")
    for name in ("(a) frozen", last):
        count = sum(weight.numel() for weight in encoders[name].parameters())
        milliseconds = 1000 * seconds_a_picture(encoders[name], unpacked(sheets["met"].pictures_B3HW[:1]))
        print(f"| {name} | {count / 1e6:.2f}M | {2 * count / 1e6:.2f}M | {milliseconds:.1f} |")
    print("\n| step | pictures | seconds | InfoNCE | caption, nats a token |\n| --- |" + " ---: |" * 4)
    for entry in kept[1:]:
        print(f"| {entry['step']} | {entry['pictures']} | {entry['seconds']:.0f} |", end="")
        print("".join(f" {loss:.2f} |" for loss in entry["losses"]))


def make_world(art: Path) -> World:
    data = load_recipe(RECIPE).data
    assert isinstance(data, DataTable)
    return World(load_vocabulary(load_art(art), data))


def encode(encoder: ImageEncoder | Encoder, pictures_B3HW: Tensor) -> list[Tensor]:
    """Every state of the image tokens of pictures in bytes, [B, V, width] each."""
    states = torch.cat([encoder.encode_images(unpacked(part)) for part in pictures_B3HW.split(BATCH)])
    return [states[:, :, state, :width] for state, width in enumerate(encoder.widths)]


def scored(states: dict[str, Tensor], sheets: dict[str, Sheet], steps: int) -> dict[str, list[float]]:
    """What probes on tokens [B, V, D] get right of the known and of the new scenes, by the keys of COLUMNS."""
    taught, things = sheets["probe"], len(sheets["probe"].present_BQ[0]) + 1
    scores: dict[str, list[float]] = {key: [] for key in COLUMNS}
    cells, probes = states["probe"].flatten(0, 1), {}
    for key, truth_BV in (("cells", taught.things_BV), ("paint", taught.paints_BV), ("style", taught.styles_BV)):
        known = truth_BV.flatten() >= 0
        probes[key] = fitted(cells[known], truth_BV.flatten()[known], int(truth_BV.max()) + 1, steps)
    share_BQ = F.normalize(taught.present_BQ, p=1, dim=1)
    present = fitted(states["probe"].mean(1), share_BQ, things - 1, steps)
    for kind in ("met", "new"):
        sheet, seen = sheets[kind], states[kind]
        right_BV = probes["cells"](seen).argmax(-1) == sheet.things_BV
        unmet_BV = sheet.things_BV % UNMET_EVERY == 1
        covered_BV = sheet.things_BV > 0
        scores["cells"].append(_share(right_BV))
        scores["things"].append(_share(right_BV[covered_BV & ~unmet_BV]))
        scores["unmet"].append(_share(right_BV[covered_BV & unmet_BV]))
        for key, truth_BV in (("paint", sheet.paints_BV), ("style", sheet.styles_BV)):
            scores[key].append(_share((probes[key](seen).argmax(-1) == truth_BV)[truth_BV >= 0]))
        scores["present"].append(_found(present(seen.mean(1)), sheet.present_BQ))
    return scores


def guessed(sheets: dict[str, Sheet]) -> dict[str, list[float]]:
    """The scores of always predicting the most frequent class of the probes' training scenes."""
    taught, scores = sheets["probe"], {}
    for key, name in (("cells", "things_BV"), ("paint", "paints_BV"), ("style", "styles_BV")):
        truth = getattr(taught, name)
        usual = truth[truth >= 0].mode().values
        scores[key] = [_share((getattr(s, name) == usual)[getattr(s, name) >= 0]) for s in _tests(sheets)]
    scores["things"] = scores["unmet"] = [0.0, 0.0]
    often_Q = taught.present_BQ.mean(0)
    scores["present"] = [_found(often_Q.expand_as(sheet.present_BQ), sheet.present_BQ) for sheet in _tests(sheets)]
    return {key: scores[key] for key in COLUMNS}


def fitted(inputs_ND: Tensor, targets: Tensor, classes: int, steps: int) -> nn.Module:
    """A linear probe on standardised features; targets are classes [N] or shares of them [N, classes]."""
    torch.manual_seed(0)
    mean, spread = inputs_ND.mean(0), inputs_ND.std(0).clamp_min(1e-12)
    linear = nn.Linear(inputs_ND.shape[1], classes)
    nn.init.zeros_(linear.weight)
    often = targets.mean(0) if targets.ndim > 1 else targets.bincount(minlength=classes) / len(targets)
    with torch.no_grad():
        linear.bias.copy_(often.clamp_min(1e-6).log())
    optimiser = torch.optim.AdamW(linear.parameters(), 5e-3, weight_decay=0.5)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _, rows in zip(range(steps), _shuffled(len(inputs_ND), min(1024, len(inputs_ND))), strict=False):
        loss = F.cross_entropy(linear((inputs_ND[rows] - mean) / spread), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
    with torch.no_grad():
        linear.weight.div_(spread)
        linear.bias.sub_(linear.weight @ mean)
    return linear.requires_grad_(False)


def seconds_a_picture(encoder: ImageEncoder | Encoder, picture_13HW: Tensor) -> float:
    """Of one thread; what else runs on its core does not count."""
    times = []
    with cpu_threads(1):
        for _ in range(60):
            started = time.process_time()
            encoder.encode_images(picture_13HW)
            times.append(time.process_time() - started)
    return statistics.median(times[10:])


def unpacked(pictures: Tensor) -> Tensor:
    """Bytes to -1..1."""
    return pictures.float() / 127.5 - 1


def _shuffled(count: int, batch: int) -> Iterator[Tensor]:
    """Batches of row numbers for ever, every row once before any comes again."""
    while True:
        yield from (rows for rows in torch.randperm(count).split(batch) if len(rows) == batch)


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _found(scores_BQ: Tensor, present_BQ: Tensor) -> float:
    """Share of the n things in a picture that are among the n best scored."""
    ranks = scores_BQ.argsort(1, descending=True).argsort(1)
    return _share((ranks < present_BQ.sum(1, keepdim=True))[present_BQ > 0])


def _tests(sheets: dict[str, Sheet]) -> tuple[Sheet, Sheet]:
    return sheets["met"], sheets["new"]


def _cells(scores: dict[str, list[float]]) -> str:
    return " | ".join(" / ".join(f"{100 * value:.0f}" for value in scores[key]) for key in COLUMNS)


if __name__ == "__main__":
    app()
