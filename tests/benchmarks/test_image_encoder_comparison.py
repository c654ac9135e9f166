"""The comparison of image encoders: the truth about cells, what is kept from the trained one, and that all of it runs.

Shapes: V image tokens.
"""

import json
import re
from itertools import combinations
from pathlib import Path

import image_encoders
import pytest
import torch
from image_encoder_scenes import UNMET_EVERY, World
from image_encoder_trained import Encoder

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.datasets.scenes.backgrounds import WHITE
from mos_cli.datasets.scenes.description import DEFAULT_STYLE, held_out, held_out_style
from mos_cli.datasets.scenes.layout import Placed, Scene
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary, VocabularyWord
from mos_cli.towers.image_encoder import ImageEncoder

STYLES = (DEFAULT_STYLE, "noto")
WORDS = 40


@pytest.fixture(scope="module")
def world() -> World:
    """Things are opaque squares, so that their boxes are the truth."""
    words = {
        f"thing{row}": VocabularyWord((f"thing{row}",), {style: 2 * row + at for at, style in enumerate(STYLES)})
        for row in range(WORDS)
    }
    sprites = torch.randint(0, 256, (2 * WORDS, 1, 1, 4), generator=torch.Generator().manual_seed(0))
    sprites[..., 3] = 255
    return World(Vocabulary(words, STYLES, sprites.byte().expand(-1, 16, 16, -1).contiguous()))


def test_a_cell_shows_what_covers_most_of_it_and_is_not_hidden(world: World) -> None:
    red = COLOURS["red"][0]
    scene = Scene((Placed(2, 0.25, 0.5, 0.5), Placed(7, 0.25, 0.375, 0.25, red)), WHITE)
    things_BV, paints_BV, styles_BV, present_BQ = world.truth([scene, Scene((), WHITE)])
    # The box behind is cells of the left half, rows 1 and 2; that in front is the upper half of it, in the middle.
    assert things_BV[0].view(4, 4).tolist() == [
        [0, 0, 0, 0],
        [2, 2, 0, 0],
        [2, 2, 0, 0],
        [0, 0, 0, 0],
    ]
    front = Scene((Placed(2, 0.25, 0.5, 0.5), Placed(7, 0.125, 0.375, 0.25, red)), WHITE)
    things_BV, paints_BV, styles_BV, present_BQ = world.truth([front, Scene((), WHITE)])
    assert things_BV[0].view(4, 4).tolist() == [
        [0, 0, 0, 0],
        [4, 2, 0, 0],
        [2, 2, 0, 0],
        [0, 0, 0, 0],
    ]
    assert paints_BV[0, 4:6].tolist() == [list(COLOURS).index("red"), -1]
    assert styles_BV[0, 3:6].tolist() == [-1, 1, 0]
    assert present_BQ[0].nonzero().flatten().tolist() == [1, 3]
    assert not things_BV[1].any()
    assert not present_BQ[1].any()


def test_the_encoder_never_meets_what_it_is_asked_about(world: World) -> None:
    for caption in world.lesson(300)[1]:
        rows = {int(number) for number in re.findall(r"thing(\d+)", caption)}
        assert all(row % UNMET_EVERY for row in rows)
        assert not any(held_out(f"thing{a}", f"thing{b}") for a, b in combinations(rows, 2))


def test_new_scenes_show_held_out_combinations_alone(world: World) -> None:
    sheet = world.sheet("new", 40)
    for things_V, styles_V, present_Q in zip(sheet.things_BV, sheet.styles_BV, sheet.present_BQ, strict=True):
        words = [f"thing{row}" for row in present_Q.nonzero().flatten()]
        if len(words) == 2:
            assert held_out(*words)
        else:
            assert held_out_style(words[0], STYLES[int(styles_V[things_V > 0][0])])


def test_both_pairs_of_eyes_give_tokens_of_one_shape() -> None:
    pictures = torch.rand(2, 3, 128, 128) * 2 - 1
    for each in (ImageEncoder(), Encoder().eval()):
        seen = each.encode_images(pictures)
        assert seen.shape == (2, IMAGE_GRID**2, 7, max(each.widths))
        assert not seen[:, :, 0, each.widths[0] :].any()
    assert 0.8e6 < sum(weight.numel() for weight in Encoder().parameters()) < 1.2e6


def test_a_probe_reads_what_is_there_and_no_more() -> None:
    features, classes = torch.randn(900, 6) * torch.logspace(-3, 3, 6), torch.arange(900) % 2
    features[:, 0] += 0.01 * classes
    right = image_encoders.fitted(features[:600], classes[:600], 2, 200)(features[600:]).argmax(1) == classes[600:]
    assert right.float().mean() > 0.95
    blind = (
        image_encoders.fitted(features[:600, 1:], classes[:600], 2, 200)(features[600:, 1:]).argmax(1) == classes[600:]
    )
    assert blind.float().mean() < 0.6


def test_trains_and_probes(
    world: World,
    editor: Bundle,
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(image_encoders, "make_world", lambda _art: world)
    monkeypatch.setattr(image_encoders, "understanding_of", lambda *_: (None, encoder_folder))
    monkeypatch.setattr(image_encoders, "find_bundle", lambda _name: editor)
    image_encoders.train(tmp_path, tmp_path, steps=4, scenes=16)
    kept = json.loads((tmp_path / "training.json").read_text())
    assert [entry["step"] for entry in kept] == [0, 1, 2, 4]
    image_encoders.probe(tmp_path, tmp_path, scenes=24, steps=2)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert sum(line.startswith(("| (a) ", "| (b) ")) for line in table) == 5 + 4 + 7 + 2
