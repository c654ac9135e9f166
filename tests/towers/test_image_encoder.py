"""The eyes: a token per cell, a state per layer."""

import torch

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.towers.efficientnet import STAGES
from mos_cli.towers.image_encoder import ImageEncoder


def test_a_token_is_a_cell_with_a_state_per_layer(tmp_path) -> None:
    torch.manual_seed(0)
    image_encoder = ImageEncoder()
    pictures = torch.rand(2, 3, 96, 64) * 2 - 1
    image_states = image_encoder.encode_images(pictures)
    assert image_states.shape == (2, IMAGE_GRID**2, len(STAGES), max(image_encoder.widths))
    for layer, width in enumerate(image_encoder.widths):
        assert image_states[:, :, layer, :width].any()
        assert not image_states[:, :, layer, width:].any()
    image_encoder.save_pretrained(tmp_path)
    assert torch.equal(ImageEncoder.from_pretrained(tmp_path).encode_images(pictures), image_states)


def test_each_picture_is_seen_alone_and_a_cell_is_where_it_is() -> None:
    torch.manual_seed(0)
    image_encoder, picture = ImageEncoder(), torch.zeros(1, 3, 128, 128)
    changed = picture.clone()
    changed[..., :32, 96:] = 1.0
    apart = (image_encoder.encode_images(torch.cat([picture, changed])).diff(dim=0) ** 2).sum(dim=(0, 3))
    # The first stage sees a few pixels: the top right cell has changed, hardly anything else has.
    assert apart[:, 0].argmax() == IMAGE_GRID - 1
    assert apart[IMAGE_GRID - 1, 0] > 10 * apart[2 * IMAGE_GRID :, 0].sum()


def test_states_are_spread_over_the_stages() -> None:
    assert ImageEncoder(layers=3).widths == (16, 80, 320)
    assert ImageEncoder(layers=31).widths[0] == 16
    assert len(ImageEncoder(layers=31).widths) == 31
