"""Distillation of guidance: the network learns the guided prediction of the model it starts from, with the scale as an
input, and draws with one branch instead of two."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import Bundle, read_bundle, write_index
from mos_cli.bundles.shapes import read_config, read_generation
from mos_cli.bundles.sources import fetch_tower
from mos_cli.errors import UsageError
from mos_cli.sampling.flow import velocity_loss
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.batches import Batch
from mos_cli.training.objective import Objective
from mos_cli.training.recipe import TrainRecipe, load_recipe, recipe_path
from mos_cli.training.start import guidance_teacher
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_bundle import randomised

SIZES = {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "states_layers": 4, "states_width": 32}
SIZES |= {"router_width": 32, "router_heads": 2}
WIDTHS = (8, 8, 16, 16)
"""Widths of the states of image tokens."""
B, T = 4, 5


def random_tower(guidance_max: float | None = None, **sizes) -> GenerationTower:
    torch.manual_seed(1)
    tower = GenerationTower(**(SIZES | sizes), guidance_max=guidance_max)
    for name, parameter in tower.named_parameters():
        if "guidance_in" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()  # type: ignore[return-value]


def student_of(teacher: GenerationTower, **sizes) -> GenerationTower:
    student = GenerationTower(**(SIZES | sizes), guidance_max=5.0)
    fresh = {name: weight for name, weight in student.state_dict().items() if "guidance_in" in name}
    student.load_state_dict(dict(teacher.state_dict()) | fresh)
    return student


def batch(scale: float, *, edits: bool = False) -> Batch:
    torch.manual_seed(2)
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    mask_BT[0, 3:] = False
    empty_mask_BT = torch.zeros(B, T, dtype=torch.bool)
    empty_mask_BT[:, :2] = True
    images = (torch.randn(B, 3, 16, 16), torch.randn(B, 16, 4, 16)) if edits else (None, None)
    return Batch(
        torch.randn(B, 3, 16, 16),
        torch.randn(B, 3, 16, 16),
        torch.tensor([0.2, 0.5, 0.8, 0.9]),
        torch.randn(B, T, 4, 32),
        mask_BT,
        *images,
        guidance_B=torch.full((B,), scale),
        empty_BTMS=torch.randn(1, T, 4, 32).expand(B, -1, -1, -1),
        empty_mask_BT=empty_mask_BT,
    )


@pytest.mark.parametrize("edits", [False, True])
@torch.no_grad()
def test_the_loss_compares_with_both_branches_of_the_teacher(edits: bool) -> None:
    """At the start the network predicts as without guidance, whatever the scale: at 1 nothing is left to learn."""
    sizes = {"image_state_widths": WIDTHS} if edits else {}
    teacher = random_tower(**sizes)
    objective = Objective(student_of(teacher, **sizes), 0.0, teacher)
    assert objective(batch(1.0, edits=edits))[0] < 1e-9
    each = batch(3.0, edits=edits)

    def predicted(states_BTMS: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        bank = teacher.project_states(states_BTMS, mask_BT)
        if each.references_BCHW is not None and each.image_states_BVMZ is not None:
            bank = teacher.add_image_tokens(
                bank, each.image_states_BVMZ, teacher.cache_references([each.references_BCHW])
            )
        return teacher(each.z_BCHW, each.t_B, bank)[0]

    assert each.empty_BTMS is not None
    assert each.empty_mask_BT is not None
    positive, negative = predicted(each.states_BTMS, each.mask_BT), predicted(each.empty_BTMS, each.empty_mask_BT)
    guided = negative + 3.0 * (positive - negative)
    loss = objective(each)[0]
    if not edits:
        torch.testing.assert_close(loss, velocity_loss(positive, guided, each.t_B), rtol=1e-4, atol=0)
    # What an edit changes has a larger weight.
    assert loss >= 0.99 * velocity_loss(positive, guided, each.t_B) > 0


@torch.no_grad()
def test_the_teacher_sees_the_patches_at_the_same_places() -> None:
    """Also on the smaller canvas of a stage."""
    teacher = random_tower()
    objective = Objective(student_of(teacher), 0.0, teacher)
    objective.tower.patch_spacing = 2.0
    assert objective(batch(1.0))[0] < 1e-9


def test_the_network_learns_guidance_at_all_scales() -> None:
    teacher = random_tower()
    objective = Objective(student_of(teacher), 0.0, teacher)
    optimiser = torch.optim.AdamW(objective.tower.parameters(), lr=3e-3)
    scales = (1.0, 2.0, 4.0)

    def losses() -> list[float]:
        with torch.no_grad():
            return [objective(batch(scale))[0].item() for scale in scales]

    before = losses()
    for step in range(150):
        optimiser.zero_grad()
        objective(batch(scales[step % 3]))[0].backward()
        optimiser.step()
    after = losses()
    assert all(parameter.grad is None for parameter in teacher.requires_grad_(False).parameters())
    assert after[1] < 0.2 * before[1]
    assert after[2] < 0.2 * before[2]


@torch.no_grad()
def test_without_a_scale_the_network_predicts_as_at_scale_1() -> None:
    tower = random_tower(guidance_max=5.0)
    assert tower.guidance_in is not None
    torch.nn.init.normal_(tower.guidance_in.mlp.linear_2.weight, std=0.2)
    each = batch(1.0)
    bank = tower.project_states(each.states_BTMS, each.mask_BT)
    without, at_1, at_3 = (
        tower(each.z_BCHW, each.t_B, bank, guidance_B=scale)[0]
        for scale in (None, torch.ones(B), torch.full((B,), 3.0))
    )
    assert torch.equal(without, at_1)
    assert not torch.allclose(without, at_3)


@pytest.fixture
def recipe(tmp_path: Path, editor: Bundle) -> Path:
    """The shipped recipe, with two pictures a step, in one precision on every CPU."""
    text = recipe_path("distil-guidance").read_text()
    words = json.dumps(str(recipe_path("distil-guidance").parent / "words" / "emoji.toml"))
    changes = {"warmup = 20": "warmup = 0", "batch = 16": "batch = 2", 'precision = "auto"': 'precision = "fp32"'}
    for old, new in {'"words/emoji.toml"': words, **changes}.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "distil.toml").write_text(text)
    return tmp_path / "distil.toml"


@pytest.fixture
def distilled(editor: Bundle, tmp_path: Path) -> Bundle:
    """The model "editor" with the scale as an input."""
    folder = tmp_path / "models" / "distilled"
    shutil.copytree(editor.folder, folder)
    config = {key: value for key, value in read_config(folder / "generation").items() if not key.startswith("_")}
    randomised(GenerationTower(**config | {"guidance_max": 5.0})).save_pretrained(folder / "generation")
    fields = ("description", "license", "understanding", "canvas", "defaults", "edits")
    return write_index(folder, name="distilled", **{name: getattr(editor.index, name) for name in fields})


def branches_of(trace: Path) -> list[str]:
    return list(json.loads(trace.read_bytes())["branches"])


@pytest.mark.slow
def test_a_model_is_distilled_draws_with_one_branch_and_replays(
    mos, editor: Bundle, recipe: Path, art_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = mos("train", recipe, "--from", "editor", "--art", art_folder, "--run", run, "--steps", 2)
    assert result.exit_code == 0, result.stderr
    made = read_bundle(run / "bundle")
    assert read_generation(made.folder / "generation").guidance_max == 5.0
    assert made.index.defaults == editor.index.defaults
    picture = tmp_path / "p.png"
    assert mos("generate", "a dog", "-m", made.folder, "-o", picture, "-s", 1).exit_code == 0
    assert branches_of(tmp_path / "p.json") == ["positive"]
    assert mos("replay", picture, "--verify").stdout.strip() == "exact"
    changed = tmp_path / "e.png"
    assert mos("edit", picture, "a cat", "-m", made.folder, "-o", changed, "-s", 1).exit_code == 0
    assert branches_of(tmp_path / "e.json") == ["positive"]
    assert mos("replay", changed, "--verify").stdout.strip() == "exact"


@pytest.mark.slow
def test_a_sharded_run_is_taught_by_a_sharded_teacher(
    mos, editor: Bundle, recipe: Path, art_folder: Path, tmp_path: Path
) -> None:
    """Two processes with a picture each (FSDP2) follow one process with both."""
    line = ("train", recipe, "--from", "editor", "--art", art_folder, "--steps", 2)
    one = mos(*line, "--run", tmp_path / "one")
    assert one.exit_code == 0, one.stderr
    process = tiny.start_mos(*line, folder=tmp_path / "sharded", processes=2, shard=True)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    (run,) = (tmp_path / "sharded" / "runs").iterdir()
    losses = [[float(row["loss"]) for row in tiny.rows(folder)] for folder in (tmp_path / "one", run)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert read_generation(read_bundle(run / "bundle").folder / "generation").guidance_max == 5.0


@pytest.mark.parametrize(
    ("options", "branches"),
    [
        ((), ["positive"]),
        (("--cfg", 5), ["positive"]),
        (("--cfg", 5.5), ["positive", "negative"]),
        (("--negative", "a cat"), ["positive", "negative"]),
        (("--cfg", 1), ["positive"]),
    ],
)
def test_two_branches_are_left_for_what_is_not_distilled(
    mos, distilled: Bundle, tmp_path: Path, options: tuple[object, ...], branches: list[str]
) -> None:
    """A negative prompt, and scales above those that were trained."""
    result = mos("generate", "a dog", "-m", "distilled", "-o", tmp_path / "p.png", "-s", 1, *options)
    assert result.exit_code == 0, result.stderr
    assert branches_of(tmp_path / "p.json") == branches
    assert mos("replay", tmp_path / "p.png", "--verify").stdout.strip() == "exact"


def test_the_scale_matters_and_only_inside_the_interval(mos, distilled: Bundle, tmp_path: Path) -> None:
    pictures = {}
    for name, options in {
        "none": ("--cfg", 1),
        "two": ("--cfg", 2),
        "three": ("--cfg", 3),
        "never": ("--cfg", 3, "--cfg-interval", "0,0.01"),
    }.items():
        file = tmp_path / f"{name}.png"
        result = mos("generate", "a dog", "-m", "distilled", "-o", file, "-s", 1, *options)
        assert result.exit_code == 0, result.stderr
        pictures[name] = Image.open(file).tobytes()
    assert pictures["never"] == pictures["none"]
    assert len({pictures[name] for name in ("none", "two", "three")}) == 3


def test_guidance_towards_the_picture_takes_its_branches(mos, distilled: Bundle, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    assert mos("generate", "a dog", "-m", "distilled", "-o", picture, "-s", 1).exit_code == 0
    edited = mos("edit", picture, "a cat", "-m", "distilled", "-o", tmp_path / "e.png", "-s", 1, "--image-cfg", 1.5)
    assert edited.exit_code == 0, edited.stderr
    assert branches_of(tmp_path / "e.json") == ["positive", "negative", "unseen"]


def test_a_model_into_which_guidance_is_distilled_is_no_teacher(distilled: Bundle, recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"distilled into .* already: start from the model before that"):
        guidance_teacher(load_recipe(str(recipe), start_from="distilled"))


def test_a_distilled_model_is_planned_with_one_branch(editor: Bundle, distilled: Bundle) -> None:
    fetch_tower(editor.index.understanding)
    assert find_network("editor").guided
    assert not find_network("distilled").guided
    assert not find_network("distilled", references=1).guided


def test_what_cannot_be_distilled_is_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "[lora]\nrank = 4\n")
    with pytest.raises(UsageError, match="a LoRA cannot"):
        load_recipe(str(recipe))
    with pytest.raises(ValueError, match="name it with start_from"):
        TrainRecipe.model_validate(tiny.TABLE | {"distil": {"guidance_max": 5.0}})
