"""A recipe is checked whole before anything is built, and what is wrong is said in one line."""

import re
from pathlib import Path

import pytest

from mos_cli.errors import MosError, UsageError
from mos_cli.training.recipe import load_recipe, recipe_path
from tests.helpers import tiny_training as tiny

SMOKE = recipe_path("train-smoke").read_text()
WRONG = {
    "heads = 3": "width cannot be 128: with 3 heads it must be a multiple of 48",
    "depth = 0": "depth: Input should be greater than 0",
    'batch = "16"': "train.batch: '16' is no whole number",
    "batch = 1.5": "train.batch",
    "warmup = 10000": "warmup = 10000 is no less than the steps of the run, 200",
    "decay = nan": "train.decay",
    "clip = -1.0": "train.clip",
    "router_heads = 5": "router_width cannot be 64",
    "seed = 1000000000000000000000": "train.seed: Input should be less than",
    "muon_lr = nan": "train.muon_lr: Input should be a finite number",
    "save_every = 0": "train.save_every",
    "heads = 0": "heads: Input should be greater than 0",
    "width = 33": "width cannot be 33",
}


@pytest.mark.parametrize("line", WRONG)
def test_values_that_cannot_be_are_refused(tmp_path: Path, line: str) -> None:
    key = line.partition(" = ")[0]
    path = tmp_path / "r.toml"
    path.write_text(re.sub(rf"^{key} = .*$", line, SMOKE, count=1, flags=re.MULTILINE))
    with pytest.raises(UsageError, match=re.escape(WRONG[line])) as raised:
        load_recipe(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "stray"), [("muon_lr", "mounlr"), ("depth", "deepth"), ("license", "licence")])
def test_a_stray_name_is_named_with_the_one_that_was_meant(tmp_path: Path, name: str, stray: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(SMOKE.replace(f"{name} =", f"{stray} =", 1))
    with pytest.raises(UsageError, match=rf"{stray}: unknown setting, did you mean {name}\?") as raised:
        load_recipe(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"states_layers": 9, "width": 32}, "states_layers = 9, states_width = 32: tiny-encoder has 4 and 32"),
        ({"patch": 7}, "canvas.multiple is 8, no multiple of 7 pixels"),
        ({"channels": 4}, "channels must be 3"),
        ({"width": 1280000, "heads": 2}, "needs about"),
    ],
)
def test_a_network_that_does_not_fit_the_other_parts_is_refused(
    mos, tmp_path: Path, encoder_folder: Path, changes: dict, words: str
) -> None:
    path = tiny.write_recipe(tmp_path, encoder_folder)
    text = path.read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
        assert count
    path.write_text(text)
    result = mos("train", path, "--run", tmp_path / "run")
    assert result.exit_code in (2, 5), result.stderr
    assert words in result.stderr
    assert [line[:6] for line in result.stderr.splitlines() if line.startswith(("error", "Trace"))] == ["error:"]


def test_a_wrong_kind_of_data_is_said_without_names_of_the_code(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(SMOKE.replace("[data]\n", '[data]\nkind = "folder"\n'))
    with pytest.raises(UsageError, match=r"data: kind is neither scenes nor captioned$"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('background = "nocolour"', "'nocolour' is no colour"),
        ("repeats = { discs = 0 }", ": data.repeats.discs: "),
        ("held_out = 1.0", ": data.held_out: Input should be less than 1"),
        ("flips = true", ": data.flips: unknown setting"),
        ("scenes = { share = 2.0 }", ": data.scenes.styles: Field required"),
        ("edits = 0.5", "steps that edit need image_encoder"),
    ],
)
def test_wrong_settings_of_captioned_pictures_are_refused(
    tmp_path: Path, encoder_folder: Path, line: str, words: str
) -> None:
    path = tiny.write_recipe(tmp_path, encoder_folder)
    path.write_text(path.read_text().replace("held_out = 0.2", line))
    with pytest.raises(UsageError, match=re.escape(words)) as raised:
        load_recipe(str(path))
    assert "\n" not in str(raised.value)


def test_shipped_recipes_have_short_names() -> None:
    assert recipe_path("finetune") == recipe_path("train-finetune")
    with pytest.raises(MosError, match="no recipe 'nothing'"):
        recipe_path("nothing")
