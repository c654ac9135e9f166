"""`mos routing ablate`: what is banned, what is drawn and what need not be, what the table and the strip say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mos_cli.bundles.sources import fetch_tower
from mos_cli.cli.app import app
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.images.differences import mean_difference, psnr
from mos_cli.images.pictures import FILTER
from mos_cli.images.sheets import CELL, GAP
from mos_cli.inference.ablation import ablate, shares_read, with_layer
from mos_cli.inference.drawing import Drawing
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.routing.rules import Rule, parse_rule
from mos_cli.routing.trace import load_recording
from mos_cli.utils.devices import choose_device

LAYERS = 4


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["routing", "ablate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def events(*arguments: object) -> list[dict]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def picture(mos, bundle, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "dog.png"
    assert mos("generate", "a red dog", "-s", 5, "-o", path).exit_code == 0
    return path


@pytest.fixture
def pipeline(bundle) -> MoSPipeline:
    return MoSPipeline(bundle, fetch_tower(bundle.index.understanding), device=choose_device("cpu"), precision="fp32")


def recipe_of(**changes: object) -> Recipe:
    fields = {"prompt": "a red dog", "model": "tiny", "seed": 5, "steps": 3, "cfg": 2, "cfg_interval": "0,1"}
    return make_recipe(**{**fields, "width": 32, "height": 32, "precision": "fp32", **changes})


def rule_of(text: str) -> Rule:
    rule = parse_rule(text)
    assert isinstance(rule, Rule)
    return rule


def partly_read(pipeline: MoSPipeline) -> tuple[Drawing, Rule]:
    """A drawing in which some layers were read by a word, in a block and at a step, and some were not."""
    before = pipeline.draw(recipe_of())
    for block in range(before.trace.blocks):
        rule = rule_of(f"dog!=0 blocks {block} steps 1")
        if 0 in shares_read(before.trace, before.routes, rule):
            return before, rule
    raise AssertionError("every block read every layer")


def test_shares_count_the_decisions_of_the_word(pipeline):
    before = pipeline.draw(recipe_of(negative="a dog"))
    ids = {name: routes.ids_SJTK for name, routes in before.routes.items()}
    columns = {name: [t.text for t in branch.tokens].index("dog") for name, branch in before.trace.branches.items()}
    kept = np.concatenate([array[1:3, 2, columns[name]] for name, array in ids.items()])
    shares = shares_read(before.trace, before.routes, rule_of("dog!=0 blocks 2 steps 1-2"))
    assert shares == [(kept == layer).any(axis=-1).mean() for layer in range(LAYERS)]
    assert sum(shares_read(before.trace, before.routes, rule_of("*!=0"))) == pytest.approx(before.trace.top_k)


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_layer_never_read_changes_nothing_when_it_is_banned(pipeline, renormalise):
    """Why such layers are not drawn without: drawing without them gives the same bytes."""
    pipeline.tower.renormalise = renormalise
    before, rule = partly_read(pipeline)
    shares = shares_read(before.trace, before.routes, rule)
    for layer, share in enumerate(shares):
        after = pipeline.draw(with_layer(before.record.recipe, rule, layer))
        assert (after.image.tobytes() == before.image.tobytes()) == (share == 0), layer


def test_only_layers_that_were_read_are_drawn_without_each_beside_the_rules_there_were(pipeline):
    before, rule = partly_read(pipeline)
    recipe = recipe_of(routes=("red!=1",))
    before, drawn = replace(before, record=before.record.model_copy(update={"recipe": recipe})), []

    def draw(recipe: Recipe) -> Image.Image:
        drawn.append(recipe)
        return Image.new("RGB", (32, 32))

    ablated = list(ablate(before, rule, draw))
    assert [one.layer for one in ablated] == list(range(LAYERS))
    read = [one.layer for one in ablated if one.read]
    assert [recipe.routes for recipe in drawn] == [("red!=1", str(replace(rule, layers=(layer,)))) for layer in read]
    assert all(recipe.model_copy(update={"routes": None}) == recipe_of() for recipe in drawn)
    for one in ablated:
        assert one.change == mean_difference(before.image, one.image)
        assert one.psnr == psnr(before.image, one.image)
        assert (one.psnr == float("inf")) == (one.read == 0)


def test_the_layers_are_ranked_by_what_they_change(picture):
    first, *layers, strip = events(picture, "--word", "Dog")
    assert first == {"event": "original", "exact": True}
    assert sorted(layer["layer"] for layer in layers) == list(range(LAYERS))
    changes = [layer["change"] for layer in layers if layer["read"]]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    assert all(layer["change"] == 0 and layer["psnr"] is None for layer in layers if not layer["read"])
    assert strip == {"event": "strip", "file": str(picture.with_name("dog_ablate-dog.png"))}


def test_the_table_says_what_json_says(picture, tmp_path):
    layers = [event for event in events(picture, "-w", "dog") if event["event"] == "layer"]
    code, out, err = run(picture, "-w", "dog", "-o", tmp_path / "strip.png")
    assert (code, err) == (0, "")
    note, head, *rows, strip = out.splitlines()
    assert note == "read: decisions that keep the layer, up to 2 each; change: mean of 0-255 levels"
    assert head.split()[:3] == ["layer", "read", "change"]
    assert strip == str(tmp_path / "strip.png")
    assert max(map(len, (note, head, *rows))) <= 80
    assert [int(row.split()[0]) for row in rows] == [layer["layer"] for layer in layers]
    for row, layer in zip(rows, layers, strict=True):
        assert f"{layer['read']:.1%}" in row.split()
        assert row.endswith("never read") if not layer["read"] else f"{layer['change']:.2f}" in row.split()


def test_the_strip_shows_the_picture_and_every_layer_and_takes_a_free_name(picture):
    for name in ("dog_ablate-dog.png", "dog_ablate-dog-2.png"):
        assert run(picture, "--word", "dog", "--quiet") == (0, "", "")
        with Image.open(picture.with_name(name)) as strip:
            assert strip.width == GAP + (1 + LAYERS) * (CELL + GAP)
            first = strip.crop((GAP, GAP, GAP + CELL, GAP + CELL))
        with Image.open(picture) as original:
            assert first.tobytes() == original.resize((CELL, CELL), FILTER).tobytes()


def test_blocks_and_steps_restrict_the_ban(picture):
    layers = [event for event in events(picture, "-w", "dog", "--block", "1:2", "--step", "0") if "layer" in event]
    recording = load_recording(picture)
    assert recording.routes is not None
    column = [token.text for token in recording.trace.branches["positive"].tokens].index("dog")
    kept = recording.routes["positive"].ids_SJTK[:1, 1:, column]
    for layer in layers:
        assert layer["read"] == pytest.approx((kept == layer["layer"]).any(axis=-1).mean())


def test_an_edit_needs_what_it_was_made_from(mos, editor, tmp_path):
    photo, edited = tmp_path / "photo.png", tmp_path / "edited.png"
    Image.new("RGB", (32, 32), "orange").save(photo)
    assert mos("edit", photo, "a green dog", "-s", 1, "-o", edited).exit_code == 0
    assert run(edited, "-w", "green")[0] == 3
    first, *_ = events(edited, "-w", "picture 1", "--input", photo)
    assert first == {"event": "original", "exact": True}


def test_routes_of_another_run_are_needed_too(mos, picture, tmp_path):
    other = tmp_path / "other.png"
    options = ["--route-from", picture, "--route-until", "50%"]
    assert mos("generate", "a red dog", "-s", 6, *options, "-o", other).exit_code == 0
    code, _, err = run(other, "-w", "dog")
    assert (code, err.count("\n")) == (2, 1)
    assert "name its trace with --route-from" in err
    first, *_ = events(other, "-w", "dog", "--route-from", picture)
    assert first["exact"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-w", "cat"], 2, "finds nothing in this prompt: its words are a, red, dog, [CLS], [SEP]"),
        (["-w", "dog", "--block", "0:9"], 2, "names blocks that are not there: they are 0 to 2"),
        (["-w", "dog", "--step", "3"], 2, "names steps that are not there: they are 0 to 2"),
        (["-w", "dog", "--step", "x"], 2, "write A:B"),
        (["-w", "dog", "-o", "strip.jpg"], 2, "name a .png of its own"),
        (["-w", "dog", "--input", "photo.png"], 2, "is no edit"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(picture, arguments, code, message):
    there = sorted(picture.parent.iterdir())
    got, out, err = run(picture, *arguments)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert message in err
    assert sorted(picture.parent.iterdir()) == there


def test_a_picture_is_not_written_over(picture):
    code, _, err = run(picture, "-w", "dog", "-o", picture.with_suffix(".JSON.png"))
    assert code == 0, err
    assert run(picture, "-w", "dog", "-o", picture)[0] == 2
    assert run(picture, "-w", "dog", "-o", picture.with_suffix(".JSON.png"))[0] == 3
    assert run(picture, "-w", "dog", "-o", picture.with_suffix(".JSON.png"), "--overwrite")[0] == 0


def test_one_layer_alone_equals_a_pin(pipeline):
    before = pipeline.draw(recipe_of())
    drawn = ablate(before, rule_of("dog=0"), lambda recipe: pipeline.draw(recipe).image)
    for one in drawn:
        pinned = pipeline.draw(recipe_of(routes=(f"dog={one.layer}",))).image
        assert one.image.tobytes() == pinned.tobytes()


def test_only_draws_every_layer_even_those_never_read(picture):
    layers = [event for event in events(picture, "--word", "dog", "--only") if event["event"] == "layer"]
    changes = [layer["change"] for layer in layers]
    assert len(layers) == LAYERS
    assert changes == sorted(changes, reverse=True)
    assert min(changes) > 0


def test_a_layer_that_the_rules_of_the_picture_leave_alone_is_said_and_the_others_are_drawn(mos, bundle, tmp_path):
    path = tmp_path / "pinned.png"
    assert mos("generate", "a red dog", "-s", 3, "-o", path, "--route", "dog=1-2").exit_code == 0
    layers = {event["layer"]: event for event in events(path, "-w", "dog", "--only") if event["event"] == "layer"}
    assert len(layers) == LAYERS
    assert {layer for layer, event in layers.items() if event["refused"] is not None} == {0, 3}
    other = tmp_path / "last.png"
    assert mos("generate", "a red dog", "-o", other, "--route", "last").exit_code == 0
    code, _, err = run(other, "-w", "dog")
    assert code == 2
    assert "drawn by the route rule last" in err
