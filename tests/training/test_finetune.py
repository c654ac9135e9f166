"""Training on one's own pictures: a model is continued, or changed by a LoRA, and what is made is drawn with."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file

from mos_cli.bundles.bundle import Bundle, find_bundle, read_bundle, verify_bundle, write_index
from mos_cli.bundles.shapes import read_generation
from mos_cli.datasets.tables import MixedScenes
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.checkpoint import found
from mos_cli.training.metrics import METRICS
from mos_cli.training.picks import Mixture, Source
from mos_cli.training.recipe import load_recipe, recipe_path
from tests.helpers import tiny_training as tiny

WEIGHTS = "generation/diffusion_pytorch_model.safetensors"


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    tiny.write_discs(tmp_path / "discs")
    return tmp_path / "discs"


@pytest.fixture
def short(tmp_path: Path) -> Callable[[str], Path]:
    """A shipped recipe with a batch of two, for runs of a few steps, in one precision on every CPU."""

    def write(name: str) -> Path:
        text = recipe_path(name).read_text()
        for key, value in (("warmup", 0), ("batch", 2), ("precision", '"fp32"')):
            text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
            assert count == 1
        (tmp_path / f"{name}.toml").write_text(text)
        return tmp_path / f"{name}.toml"

    return write


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error")]


def rewrite(bundle: Bundle) -> None:
    """Lists the files of a bundle again, after they were changed."""
    fields = ("name", "description", "license", "understanding", "canvas", "defaults", "edits")
    write_index(bundle.folder, **{name: getattr(bundle.index, name) for name in fields})


def test_an_interruption_says_what_goes_on(mos, editor, discs: Path, short, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mos_cli.training.run.train", interrupted)
    result = mos("train", short("finetune"), "--from", "editor", "--data", discs, "--run", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted: the same command goes on"


def test_a_name_that_cannot_be_says_what_can(mos, editor, discs: Path, short) -> None:
    result = mos("train", short("finetune"), "--from", "editor", "--data", discs, "--name", "zög eins")
    assert result.exit_code in (2, 3)
    (line,) = result.stderr.splitlines()
    assert line.endswith("bundle.name: 'zög eins' cannot be a name: use letters from A to Z, digits, dots and dashes")


@pytest.mark.slow
def test_a_model_is_continued_on_a_folder_and_the_result_draws_edits_and_replays(
    mos, editor: Bundle, discs: Path, short, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = mos(
        "train", short("finetune"), "--from", "editor", "--data", discs, "--run", run, "--steps", 2, "--name", "mine"
    )
    assert result.exit_code == 0, result.stderr
    assert "6 pictures with 6 different captions" in result.stderr
    made = read_bundle(run / "bundle")
    verify_bundle(made)
    assert made.index.name == "mine"
    assert made.index.edits == editor.index.edits
    assert made.index.understanding == editor.index.understanding
    assert read_generation(made.folder / "generation") == read_generation(editor.folder / "generation")
    trained, before = (load_file(one.folder / WEIGHTS) for one in (made, editor))
    assert any(not torch.equal(trained[name].float(), before[name].float()) for name in before)
    picture = tmp_path / "p.png"
    assert mos("generate", "a dog", "-m", made.folder, "-o", picture, "-s", 1).exit_code == 0
    assert mos("replay", picture, "--verify").stdout.strip() == "exact"
    changed = tmp_path / "e.png"
    assert mos("edit", picture, "a cat", "-m", made.folder, "-o", changed, "-s", 1).exit_code == 0
    assert mos("replay", changed, "--verify").stdout.strip() == "exact"
    rows = list(csv.DictReader((run / "data.csv").open()))
    assert [row["used"] for row in rows] == ["yes"] * 6


@pytest.mark.slow
def test_a_lora_is_trained_and_drawn_with(mos, bundle: Bundle, discs: Path, short, tmp_path: Path) -> None:
    command = [
        "train",
        short("finetune-lora"),
        "--from",
        "tiny",
        "--data",
        discs,
        "--run",
        tmp_path / "run",
        "--steps",
        4,
    ]
    result = mos(*command)
    assert result.exit_code == 0, result.stderr
    lora = tmp_path / "run" / "finetune-lora.safetensors"
    assert str(lora) in result.stdout
    first = (lora.read_bytes(), (tmp_path / "run" / METRICS).read_text())
    # The state has the weights of the LoRA alone, and the run goes on from it as if it had never stopped.
    shutil.rmtree(found(tmp_path / "run")[0])
    assert mos(*command).exit_code == 0
    losses = [[row["loss"] for row in csv.DictReader(text.splitlines())] for text in (first[1], _metrics(tmp_path))]
    assert losses[0] == losses[1]
    # The order of a file's metadata is not fixed.
    weights, again = load(first[0]), load(lora.read_bytes())
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    plain, changed = tmp_path / "plain.png", tmp_path / "changed.png"
    for path, options in ((plain, ()), (changed, ("--lora", f"{lora}:40"))):
        assert mos("generate", "a dog", "-s", 1, "-o", path, *options).exit_code == 0
    assert Image.open(plain).tobytes() != Image.open(changed).tobytes()
    assert mos("replay", changed, "--verify").stdout.strip() == "exact"
    exported = mos("models", "export", tmp_path / "run")
    assert exported.exit_code == 0, exported.stderr
    made = tmp_path / "run" / "finetune-lora-00000004.safetensors"
    assert str(made) in exported.stdout
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(made).items())
    (line,) = errors(mos("models", "export", tmp_path / "run", "-o", tmp_path / "folder"))
    assert "ends in .safetensors" in line
    # Another model under the same name is not what the state belongs to.
    weights = load_file(bundle.folder / WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, bundle.folder / WEIGHTS, {"format": "pt"})
    rewrite(bundle)
    (line,) = errors(mos(*command))
    assert "start_hash" in line
    (line,) = errors(mos("models", "export", tmp_path / "run"))
    assert "no longer the model" in line


def _metrics(folder: Path) -> str:
    return (folder / "run" / METRICS).read_text()


@pytest.mark.slow
def test_captioned_edits_are_learned_from_pairs_and_from_three_columns(
    mos, editor: Bundle, discs: Path, tmp_path: Path
) -> None:
    for path in list(discs.glob("*.png"))[:3]:
        Image.new("RGB", Image.open(path).size, "white").save(path.with_suffix(".before.png"))
    columns = tmp_path / "columns"
    columns.mkdir()
    lines = []
    for name in ("red", "green"):
        for kind in ("", ".before"):
            Image.new("RGB", (24, 24), name if kind else "white").save(columns / f"{name}{kind}.png")
        row = {"input_image": f"{name}.before.png", "edit_prompt": "erase it", "edited_image": f"{name}.png"}
        lines.append(json.dumps(row))
    (columns / "metadata.jsonl").write_text("\n".join(lines))
    for data, share in ((discs, 0.5), (columns, 1.0)):
        recipe = tmp_path / f"{data.name}.toml"
        table = f'start_from = "editor"\n[bundle]\nname = "{data.name}"\ndescription = "a test"\n'
        table += f'[data]\nkind = "captioned"\npath = "{data}"\nedits = {share}\n'
        settings = {key: value for key, value in tiny.TABLE["train"].items() if key != "sample_prompts"}
        settings |= {"steps": 3, "batch": 2, "sample_every": 100}
        table += "[train]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        recipe.write_text(table)
        run = tmp_path / f"run-{data.name}"
        result = mos("train", recipe, "--run", run)
        assert result.exit_code == 0, result.stderr
        edited = tmp_path / f"{data.name}.png"
        result = mos("edit", discs / "red.png", "erase it", "-m", run / "bundle", "-o", edited)
        assert result.exit_code == 0, result.stderr


def test_recipes_that_continue_what_does_not_fit_say_so_in_a_line(
    mos, bundle: Bundle, discs: Path, short, tmp_path: Path
) -> None:
    command = ["train", short("finetune"), "--run", tmp_path / "run", "--steps", 2]
    (line,) = errors(mos(*command, "--from", "nothing", "--data", discs))
    assert "no model named 'nothing'" in line
    (line,) = errors(mos(*command, "--from", "tiny"))
    assert "pictures is not a folder" in line
    (line,) = errors(mos("train", "train-smoke", "--data", discs))
    assert "--data and --caption are for recipes with captioned pictures" in line
    own = tmp_path / "own.toml"
    text = mos("train", "finetune", "--show").stdout.replace('precision = "auto"', 'precision = "fp32"')
    own.write_text(text + "\n[generation]\nwidth = 64\nstates_layers = 4\nstates_width = 32\n")
    (line,) = errors(mos("train", own, "--from", "tiny", "--data", discs, "--run", tmp_path / "own"))
    assert "leave [generation] out" in line
    assert len(line) < 300
    (discs / "film.mp4").write_bytes(b"film")
    (line,) = errors(mos(*command, "--from", "tiny", "--data", discs, "--strict"))
    assert "film.mp4: not a picture" in line
    (line,) = errors(
        mos("train", short("finetune-lora"), "--from", "tiny", "--data", discs, "--export", tmp_path / "folder")
    )
    assert "must" in line or "ends in .safetensors" in line


@pytest.mark.slow
def test_a_table_of_what_is_not_used_is_printed_and_written(
    mos, bundle: Bundle, discs: Path, short, tmp_path: Path
) -> None:
    (discs / "red.png").write_bytes(b"cut")
    (discs / "green.txt").write_text("apple " * 60)
    run = tmp_path / "run"
    command = ["train", short("finetune"), "--from", "tiny", "--data", discs, "--run", run, "--steps", 1]
    result = mos(*command)
    assert result.exit_code == 0, result.stderr
    assert "2 files left out" in result.stderr
    rows = {Path(row["file"]).name: row["reason"] for row in csv.DictReader((run / "data.csv").open())}
    assert "red.png" in rows
    assert "62 tokens, 24 are read" in rows["green.png"]
    # What changed since is said when the run goes on.
    (discs / "blue.png").unlink()
    (discs / "blue.txt").unlink()
    result = mos(*command[:-1], 2)
    assert result.exit_code == 0, result.stderr
    assert "1 gone" in " ".join(result.stderr.split())


def test_weights_that_are_not_finite_are_refused_when_read(mos, bundle: Bundle, tmp_path: Path) -> None:
    weights = load_file(bundle.folder / WEIGHTS)
    name = next(iter(weights))
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, bundle.folder / WEIGHTS, {"format": "pt"})
    rewrite(bundle)
    result = mos("generate", "a dog", "-o", tmp_path / "no.png")
    assert result.exit_code == 4
    (line,) = errors(result)
    assert "not finite" in line


@pytest.mark.slow
def test_an_export_that_fails_leaves_the_bundle_before(
    mos, bundle: Bundle, discs: Path, short, tmp_path: Path, monkeypatch
) -> None:
    run = tmp_path / "run"
    command = ["train", short("finetune"), "--from", "tiny", "--data", discs, "--run", run, "--steps"]
    assert mos(*command, 1).exit_code == 0
    (run / "bundle" / "card.md").write_text("# mine\n")
    before = {path: path.read_bytes() for path in (run / "bundle").rglob("*") if path.is_file()}
    save = GenerationTower.save_pretrained

    def full(tower: GenerationTower, folder: Path, **options) -> None:
        if "run" in str(folder) and ".check-" not in str(folder):
            raise OSError(28, "No space left on device")
        save(tower, folder, **options)

    with monkeypatch.context() as patched:
        patched.setattr(GenerationTower, "save_pretrained", full)
        result = mos(*command, 2)
    assert result.exit_code == 3
    (line,) = errors(result)
    assert "No space left on device" in line
    assert {path: path.read_bytes() for path in (run / "bundle").rglob("*") if path.is_file()} == before
    assert mos(*command, 2).exit_code == 0
    made = find_bundle(str(run / "bundle"))
    verify_bundle(made)
    assert "card.md" in made.index.files
    assert not [path for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_mixed_sources_are_drawn_in_the_order_in_which_they_were_picked() -> None:
    def source(value: float) -> Source:
        return Source(
            lambda random, canvas: (random.random(), f"{value:g}"),
            torch.tensor,
            lambda picked, canvas: torch.full((len(picked), 1, 3, 2, 2), value),
        )

    mixed = Mixture(source(1.0), source(2.0), 0.25).source()
    picked = [mixed.pick(Random(seed), 2) for seed in range(200)]
    drawn = mixed.draw(mixed.collate([picture for picture, _ in picked]), 2)
    assert drawn[:, 0, 0, 0, 0].tolist() == [float(caption) for _, caption in picked]
    assert 0.15 < (drawn[:, 0, 0, 0, 0] == 2).float().mean() < 0.35
    assert not mixed.edits


def test_the_scenes_that_are_mixed_in_are_those_of_the_model(bundle: Bundle, tmp_path: Path) -> None:
    assert load_recipe("finetune", start_from="tiny").data.scenes is None  # type: ignore[union-attr]
    data = bench_data()
    recipe = {"data": {"kind": "scenes", "words": dict(data.words), "styles": data.styles}}
    (bundle.folder / "recipe.json").write_text(json.dumps(recipe))
    scenes = load_recipe("finetune", start_from="tiny").data.scenes  # type: ignore[union-attr]
    assert isinstance(scenes, MixedScenes)
    assert (scenes.words, scenes.styles, scenes.share) == (data.words, data.styles, 0.6)
    # A model that only draws is not taught to edit.
    assert scenes.edits == 0
