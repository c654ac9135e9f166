"""Understanding towers: a state of every layer for every token of a prompt."""

import pytest
import torch

from mos_cli.bundles.bundle import load_tower_spec
from mos_cli.errors import InputError
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.understanding import UnderstandingTower


@pytest.mark.parametrize(("kind", "layers"), [("encoder_folder", 4), ("decoder_folder", 5)])
def test_an_understanding_tower_hands_over_every_layer(kind: str, layers: int, request) -> None:
    tower = UnderstandingTower(request.getfixturevalue(kind))
    reading = tower.encode(["a red apple", "dogs"])
    assert reading.states_BTMS.shape[2:] == (layers, 32) == (tower.layers, tower.width)
    spans = [(t.start, t.end) for t in reading.tokens[0] if t.end]
    assert [reading_text("a red apple", span) for span in spans] == ["a", "red", "apple"]
    assert [t.text for t in reading.tokens[1] if t.end] == ["dog", "##s"]
    assert reading.mask_BT.sum(1).tolist() == [len(tokens) for tokens in reading.tokens]
    # Neither padding nor the other prompt shows in a prompt's states.
    alone = tower.encode(["dogs"]).states_BTMS[0]
    torch.testing.assert_close(reading.states_BTMS[1, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def reading_text(prompt: str, span: tuple[int, int]) -> str:
    return prompt[slice(*span)]


def test_the_last_state_of_a_decoder_is_raw(decoder_folder) -> None:
    tower = UnderstandingTower(decoder_folder)
    states = tower.encode(["a red apple"]).states_BTMS[0]
    ids = tower.tokenizer("a red apple", return_tensors="pt")["input_ids"]
    normed = tower.model(ids).last_hidden_state[0]
    assert not torch.allclose(states[:, -1], normed, atol=1e-3)
    torch.testing.assert_close(tower.model.norm(states[:, -1]), normed)


def test_no_words_is_still_something_to_read(encoder_folder, decoder_folder) -> None:
    for folder in (encoder_folder, decoder_folder):
        reading = UnderstandingTower(folder).encode(["", "a dog"])
        assert len(reading.tokens[0]) >= 1
        assert all((t.start, t.end) == (0, 0) for t in reading.tokens[0])
        assert reading.states_BTMS.isfinite().all()


def test_a_prompt_too_long_is_refused(encoder_folder) -> None:
    with pytest.raises(InputError, match="the model reads 24"):
        UnderstandingTower(encoder_folder).encode(["apple " * 30])


@pytest.mark.slow
def test_a_decoder_language_model_serves_as_understanding_tower() -> None:
    from mos_cli.bundles.sources import fetch_tower

    understanding = UnderstandingTower(fetch_tower(load_tower_spec("smollm2-135m")))
    reading = understanding.encode(["a red apple left of a dog"])
    assert reading.states_BTMS.shape[2:] == (31, 576)
    spans = [(token.start, token.end) for token in reading.tokens[0]]
    assert ["a red apple left of a dog"[slice(*span)].strip() for span in spans] == [
        "a",
        "red",
        "apple",
        "left",
        "of",
        "a",
        "dog",
    ]
    tower = GenerationTower(states_layers=31, states_width=576)
    z, t = torch.randn(1, 3, 64, 64), torch.tensor([0.5])
    _, route = tower(z, t, tower.project_states(reading.states_BTMS))
    assert route.ids_BTJK.shape == (1, 7, 8, 2)
    assert route.ids_BTJK.max() < 31
