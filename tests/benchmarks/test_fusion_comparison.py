"""The fusion comparison's promises: nothing held out is trained on, variants are equally large, short cuts are exact.

Shapes: B batch, T context tokens, M layers, S width of a state, H x W a picture's size.
"""

from dataclasses import replace
from random import Random

import fusion
import pytest
import torch
from fusion_run import Bench, _drawn, _trained, handed_sizes, parameters
from fusion_world import CATEGORIES, Library, World

from mos_cli.datasets.scenes.description import held_out
from mos_cli.datasets.scenes.vocabulary import Vocabulary, VocabularyWord
from mos_cli.datasets.tables import DataTable
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.recipe import load_recipe

B, T, M, S = 2, 5, 7, 24


@pytest.fixture
def world() -> World:
    data = load_recipe(str(fusion.RECIPE)).data
    assert isinstance(data, DataTable)
    words = {word: VocabularyWord(names, dict.fromkeys(data.styles, 0)) for word, names in data.words.items()}
    return World(Vocabulary(words, data.styles, torch.zeros(1, 8, 8, 4, dtype=torch.uint8)))


def test_what_is_asked_for_is_never_trained_on(world: World) -> None:
    random = Random(0)
    for description in (world._described(random) for _ in range(500)):
        words = [thing.word for thing in description.things]
        assert len(words) == 1 or not held_out(*words)
        assert not any(thing.colour and held_out(thing.word, thing.colour) for thing in description.things)
    for entry in world.prompts(10):
        things = entry.description.things
        if entry.category == "colour":
            assert held_out(things[0].word, things[0].colour or "")
        elif entry.category != "single":
            assert held_out(*(thing.word for thing in things))


def test_prompts_are_always_the_same_ones(world: World) -> None:
    assert world.prompts(5) == world.prompts(5)
    assert [entry.category for entry in world.prompts(1)] == list(CATEGORIES)


def test_variants_of_a_tower_are_equally_large() -> None:
    sizes = {name: parameters(fusion.variant(name, 0, None).generation) for name in fusion.VARIANTS}
    for tower in ("MiniLM", "SmolLM2"):
        mine = [size for name, size in sizes.items() if name.startswith(tower)]
        assert max(mine) / min(mine) < 1.002


@pytest.mark.parametrize(
    ("choice", "context"), [("last", "joint"), ("last", "cross"), ("aligned", "kv"), ("mean", "kv")]
)
def test_states_that_no_block_reads_change_nothing(choice: str, context: str) -> None:
    sizes = {"width": 32, "depth": 3, "heads": 2, "hidden": 40, "patch": 4, "states_layers": M, "states_width": S}
    sizes |= {"fusion": choice, "context": context}
    torch.manual_seed(0)
    whole, short = GenerationTower(**sizes), GenerationTower(**handed_sizes(sizes))  # type: ignore[arg-type]
    weights = {name: torch.randn_like(weight) * 0.2 for name, weight in whole.state_dict().items()}
    whole.load_state_dict(weights)
    short.load_state_dict(weights)
    # Layers differ in scale, as those of real towers do.
    states = torch.randn(B, T, M, S) * torch.logspace(0, 2, M)[:, None]
    mask = torch.ones(B, T, dtype=torch.bool)
    handed = Library(states, mask, {}).handed(choice, 3).states_NTMS
    assert handed.shape[2] == {"last": 1, "aligned": 3, "mean": 1}[choice]
    z, t = torch.randn(B, 3, 8, 8), torch.rand(B)
    expected, _ = whole(z, t, whole.project_states(states, mask))
    found, _ = short(z, t, short.project_states(handed, mask))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["MiniLM: MoS", "MiniLM: mean of all layers"])
def test_a_variant_is_trained_and_draws(world: World, name: str) -> None:
    recipe = fusion.variant(name, 0, 31)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch": 2})})
    train, entries = world.scenes(8, 24, "train"), world.prompts(1)
    prompts = [entry.prompt for entry in entries]
    rows = {text: row for row, text in enumerate(dict.fromkeys(["", *train.captions, *prompts]))}
    library = Library(torch.randn(len(rows), T, M, 384), torch.ones(len(rows), T, dtype=torch.bool), rows)
    # What is judged is not looked at.
    bench = Bench(train, train, train, entries, {}, None, torch.device("cpu"))  # type: ignore[arg-type]
    handed = library.handed(recipe.generation.get("fusion", "routed"), recipe.generation["depth"])
    tower, _ = _trained(recipe, handed, bench, 1.0)
    torch.manual_seed(recipe.train.seed)
    fresh = GenerationTower(**handed_sizes(recipe.generation)).state_dict()  # type: ignore[arg-type]
    assert all(not torch.equal(weight, fresh[each]) for each, weight in tower.state_dict().items())
    pictures = _drawn(tower, recipe, handed, bench)
    assert pictures.shape == (len(entries), 3, 24, 24)
    # Each has its own prompt and seed.
    alone = _drawn(tower, recipe, handed, replace(bench, entries=entries[1:2]))
    torch.testing.assert_close(alone, pictures[1:2], rtol=0, atol=1e-4)
