"""Feature caching: fewer blocks are computed, nothing is kept between pictures, and the recipe says all of it."""

from typing import Any

import pytest
import torch
from PIL import Image

from mos_cli.bundles.bundle import Bundle, find_bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.images.differences import psnr
from mos_cli.images.inputs import describe_edit, read_inputs
from mos_cli.images.outputs import read_drawing
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.planning.memory import Setting
from mos_cli.sampling.feature_cache import caching
from mos_cli.towers.generation import GenerationTower
from mos_cli.utils.validation import DEFAULT_SOLVER
from tests.helpers.tiny_bundle import randomised

STEPS = 12
COMPUTED = {2: {0, 1, 2, 4, 6, 8, 10, 11}, 3: {0, 1, 2, 4, 7, 10, 11}, 11: {0, 1, 2, 4, 11}}
"""The steps at which blocks are computed: the first quarter, every so-manieth, the last."""


def loaded(bundle: Bundle, **setting: Any) -> MoSPipeline:
    tower = fetch_tower(bundle.index.understanding)
    return MoSPipeline(bundle, tower, device=torch.device("cpu"), precision="fp32", setting=Setting(**setting))


def asked(bundle: Bundle, prompt: str = "a red apple", **fields: Any) -> Recipe:
    size = {"width": 32, "height": 32, "precision": "fp32", "seed": 1, "solver": DEFAULT_SOLVER}
    settings = bundle.index.defaults.model_dump() | size | {"steps": STEPS}
    return make_recipe(prompt=prompt, model=bundle.ref, **(settings | fields))


class Passes:
    """A pipeline, and at how many blocks' passes each step of a picture stood when it ended."""

    def __init__(self, pipeline: MoSPipeline) -> None:
        self.pipeline, self.count = pipeline, 0
        for block in pipeline.tower.blocks:
            block.mlp.register_forward_pre_hook(self._add)  # type: ignore[operator, union-attr]

    def _add(self, *_: object) -> None:
        self.count += 1

    def of(self, recipe: Recipe, inputs: Any = None) -> list[int]:
        """The passes at each step."""
        ends: list[int] = []

        def observe(_: object) -> None:
            ends.append(self.count)
            self.count = 0

        self.pipeline.draw(recipe, [observe], inputs)
        return ends


@pytest.mark.parametrize("batched_guidance", [True, False])
@pytest.mark.parametrize("every", COMPUTED)
def test_blocks_are_computed_at_the_steps_that_were_asked_for(
    bundle: Bundle, every: int, batched_guidance: bool
) -> None:
    passes = Passes(loaded(bundle, batched_guidance=batched_guidance)).of(asked(bundle, feature_cache=every))
    assert {step for step, count in enumerate(passes) if count} == COMPUTED[every]
    assert set(passes) == {0, 3 if batched_guidance else 6}


def test_where_guidance_ends_the_count_begins_anew(bundle: Bundle) -> None:
    """The example of docs/caching.md: guidance at the first five of eight steps."""
    passes = Passes(loaded(bundle)).of(asked(bundle, steps=8, feature_cache=2, cfg_interval=(0.45, 1.0)))
    assert {step for step, count in enumerate(passes) if count} == {0, 1, 3, 5, 6}


@pytest.mark.parametrize("batched_guidance", [True, False])
def test_a_picture_is_close_and_a_wider_distance_is_further_off(bundle: Bundle, batched_guidance: bool) -> None:
    """Random blocks say something new at every step: made quieter, they come within 15 dB."""
    pipeline = loaded(bundle, batched_guidance=batched_guidance)
    for block in pipeline.tower.blocks:
        for parameter in block.parameters():
            parameter.data *= 0.3
    plain = pipeline.draw(asked(bundle)).image
    near, far = (psnr(plain, pipeline.draw(asked(bundle, feature_cache=every)).image) for every in (2, 11))
    assert float("inf") > near > 15 > far
    assert pipeline.draw(asked(bundle, feature_cache=1)).image.tobytes() == plain.tobytes()


@pytest.mark.slow
def test_the_default_bundle_draws_nearly_the_same() -> None:
    """The lowest of the benchmark's eight prompts: 41.8 dB at every second step."""
    bundle = find_bundle("emoji")
    pipeline, native = loaded(bundle), dict(zip(("width", "height"), bundle.index.canvas.native, strict=True))
    recipe = asked(bundle, "a dog", **native, steps=24)
    cached = recipe.model_copy(update={"feature_cache": 2})
    assert psnr(pipeline.draw(recipe).image, pipeline.draw(cached).image) > 36


def test_pictures_and_their_order_do_not_matter(bundle: Bundle) -> None:
    pipeline = loaded(bundle)
    recipes = [
        asked(bundle, feature_cache=3),
        asked(bundle, "a dog", feature_cache=2),
        asked(bundle),
        asked(bundle, width=48, feature_cache=3),
    ]
    forth = [pipeline.draw(recipe).image.tobytes() for recipe in recipes]
    back = [pipeline.draw(recipe).image.tobytes() for recipe in reversed(recipes)]
    alone = [loaded(bundle).draw(recipe).image.tobytes() for recipe in recipes]
    assert forth == back[::-1] == alone


def test_a_picture_that_was_broken_off_leaves_nothing(bundle: Bundle) -> None:
    pipeline = loaded(bundle)
    expected = pipeline.draw(asked(bundle)).image.tobytes()

    def stop(step: Any) -> None:
        if step.index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.draw(asked(bundle, "a dog", feature_cache=3), [stop])
    assert pipeline.draw(asked(bundle)).image.tobytes() == expected


def test_where_guidance_begins_or_ends_all_branches_begin_anew(bundle: Bundle) -> None:
    """Guidance acts in the middle third. A picture with branches apart is the same, but for rounding."""
    recipe = asked(bundle, feature_cache=4, cfg_interval=(0.35, 0.7))
    joined, apart = loaded(bundle, batched_guidance=True), loaded(bundle, batched_guidance=False)
    assert psnr(joined.draw(recipe).image, apart.draw(recipe).image) > 60
    # As many steps are computed from step 4, and from step 8, as at the beginning: the first quarter's worth.
    assert Passes(joined).of(recipe) == [3, 3, 3, 0] * 3
    assert Passes(apart).of(recipe) == [3, 3, 3, 0, 6, 6, 6, 0, 3, 3, 3, 0]


@pytest.mark.parametrize("batched_guidance", [True, False])
def test_edits_with_a_branch_that_sees_nothing(editor: Bundle, tmp_path, batched_guidance: bool) -> None:
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "in.png")
    inputs = read_inputs([tmp_path / "in.png"])
    edit = describe_edit(inputs, canvas=(32, 32), image_cfg=1.5, strength=1.0, mask=None, composite=False)
    passes = Passes(loaded(editor, batched_guidance=batched_guidance)).of(
        asked(editor, edit=edit, feature_cache=3), inputs
    )
    assert {step for step, count in enumerate(passes) if count} == COMPUTED[3]
    # Before the first step the picture passes the blocks, to be remembered.
    assert set(passes[1:]) == {0, 6 if batched_guidance else 9}


def test_blocks_that_are_fetched_say_the_same(bundle: Bundle) -> None:
    recipe = asked(bundle, feature_cache=3)
    expected = loaded(bundle).draw(recipe).image.tobytes()
    assert loaded(bundle, offload="blocks").draw(recipe).image.tobytes() == expected


def test_routes_are_chosen_at_every_step(bundle: Bundle) -> None:
    drawing = loaded(bundle).draw(asked(bundle, feature_cache=3))
    assert drawing.routes["positive"].ids_SJTK.shape[:2] == (STEPS, 3)
    assert drawing.trace.recipe.feature_cache == 3


def test_the_picture_replays_from_its_recipe(mos, bundle, tmp_path, monkeypatch) -> None:
    picture = tmp_path / "a.png"
    monkeypatch.setenv("MOS_FEATURE_CACHE", "3")
    result = mos("generate", "a red apple", "-s", 1, "--steps", STEPS, "-o", picture)
    assert result.exit_code == 0, result.output
    monkeypatch.delenv("MOS_FEATURE_CACHE")
    assert read_drawing(picture)[1].recipe.feature_cache == 3
    assert mos("replay", picture, "--verify").stdout.strip() == "exact"
    assert mos("replay", picture, "--set", "feature_cache=1", "-o", tmp_path / "b.png").exit_code == 0
    mos("generate", "a red apple", "-s", 1, "--steps", STEPS, "-o", tmp_path / "c.png")
    assert "feature_cache" not in Image.open(tmp_path / "c.png").info["mos"]
    assert Image.open(tmp_path / "b.png").tobytes() == Image.open(tmp_path / "c.png").tobytes()
    assert Image.open(tmp_path / "a.png").tobytes() != Image.open(tmp_path / "c.png").tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--feature-cache", "0"], "--feature-cache"),
        (["--feature-cache", "4", "--steps", "4"], "feature_cache 4 needs more than 4 steps, and there are 4"),
        (["--feature-cache", "2", "--regions"], "--regions does not go with --feature-cache"),
        (["--feature-cache", "2", "--compile"], "--compile does not go with --feature-cache"),
    ],
)
def test_what_makes_no_sense_is_refused(mos, bundle, tmp_path, options: list[str], said: str) -> None:
    result = mos("generate", "a dog", *options, "-o", tmp_path / "out" / "a.png")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_tower_of_one_block_can_be_cached_too() -> None:
    tower = randomised(GenerationTower(width=32, depth=1, heads=2, hidden=48, states_layers=2, states_width=8))
    bank, z_BCHW = tower.project_states(torch.randn(1, 5, 2, 8)), torch.randn(1, 3, 16, 16)
    computed: list[object] = []
    tower.blocks[0].mlp.register_forward_pre_hook(lambda *_: computed.append(_))  # type: ignore[operator, union-attr]
    with caching(tower, 2, 4) as (predict, _):
        for t in (1.0, 0.75, 0.5, 0.25):
            predict(z_BCHW, torch.tensor([t]), bank, steering=None)
    assert len(computed) == 3
