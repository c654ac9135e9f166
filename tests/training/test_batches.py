"""Training batches: a function of seed, step and index."""

from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
from PIL import Image

from mos_cli.datasets.captioned import bucket_shape
from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.errors import InputError, UsageError
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.training import batches as training_batches
from mos_cli.training import sources as training_sources
from mos_cli.training.picks import Mixture, Picked, Share
from mos_cli.training.sources import captioned_source
from tests.helpers import tiny_training as tiny


def test_a_step_always_has_the_same_batch(understanding) -> None:
    batches = tiny.batches(tiny.recipe(), understanding)
    first, again, other = batches.make(3), batches.make(3), batches.make(4)
    for name in ("z0_BCHW", "z_BCHW", "t_B", "states_BTMS", "mask_BT"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.z_BCHW, other.z_BCHW)
    assert first.states_BTMS.shape == (8, 24, 4, 32)
    streamed = list(batches.stream(3))
    assert len(streamed) == 5
    assert torch.equal(streamed[0].z_BCHW, first.z_BCHW)


def test_other_processes_pick_the_same(understanding, monkeypatch) -> None:
    batches = tiny.batches(tiny.recipe(), understanding)
    alone = [batch.z_BCHW for batch in batches.stream(2)]
    monkeypatch.setattr(training_batches, "_workers", lambda _: 2)
    assert all(torch.equal(a, b.z_BCHW) for a, b in zip(alone, batches.stream(2), strict=True))

    def unreadable(random, canvas):
        raise InputError("cannot read the picture red.png")

    sources = {kind: replace(source, pick=unreadable) for kind, source in batches.sources.items()}
    batches.picks = replace(batches.picks, sources=sources)
    with pytest.raises(InputError, match=r"^cannot read the picture red\.png$"):
        next(batches.stream(0))


def test_what_other_processes_pick_are_tensors(understanding) -> None:
    """The process that has the device does nothing for each picture."""
    picks = tiny.batches(tiny.recipe(), understanding).picks
    picked, with_vision = picks[0], replace(picks, tokenizer=None)[0]
    assert isinstance(picked, Picked)
    assert isinstance(with_vision, Picked)
    assert (picked.pictures.dtype, len(picked.pictures)) == (torch.float32, 8)
    assert isinstance(picked.captions, torch.Tensor)
    ids_BT, mask_BT = picked.captions
    states = understanding.encode(with_vision.captions)
    assert torch.equal(understanding.states(ids_BT, mask_BT), states.states_BTMS)
    assert torch.equal(mask_BT.bool(), states.mask_BT)


def test_captions_are_read_before_anything_is_drawn(understanding, monkeypatch) -> None:
    """What reads them waits for the device, and so for what is queued there."""
    batches, order = tiny.batches(tiny.recipe(), understanding), []

    def noting(what, function):
        return lambda *given: (order.append(what), function(*given))[1]

    monkeypatch.setattr(understanding, "states", noting("read", understanding.states))
    kind, source = next(iter(batches.sources.items()))
    batches.sources[kind] = replace(source, draw=noting("draw", source.draw))
    batches.make(0)
    assert order == ["read", "draw"]


@pytest.mark.parametrize("spare", [0.0, 1.0])
def test_scenes_are_drawn_where_the_sprites_fit(art_folder, monkeypatch, spare: float) -> None:
    """A device without values stands for a GPU."""
    data, device, places, said = bench_data(), torch.device("meta"), [], []

    def placed(sprites_VHW4, *, compiled):
        places.append(sprites_VHW4.device.type)
        return Compositor(sprites_VHW4, compiled=compiled)

    monkeypatch.setattr(training_sources, "Compositor", placed)
    for source in training_sources.find_sources(data, art_folder, device, spare=spare, say=said.append):
        # Workers get what picks: no copy of the sprites.
        assert not source.pick.writer.vocabulary.sprites_VHW4.numel()
        picked = source.collate([source.pick(Random(0), 32)[0]])
        drawn = source.draw(picked, 32)
        assert (drawn.device.type, tuple(drawn.shape)) == ("meta", (1, 1 + source.edits, 3, 32, 32))
    assert places == ["meta" if spare else "cpu"]
    assert len(said) == (not spare)
    assert all("do not fit into the GPU" in line for line in said)


def test_shares_make_up_the_whole_batch(understanding) -> None:
    whole = tiny.batches(tiny.recipe(), understanding).make(2)
    parts = [tiny.batches(tiny.recipe(), understanding, Share(rank, 4)).make(2) for rank in range(4)]
    for name in ("z0_BCHW", "z_BCHW", "t_B", "mask_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    states = torch.cat([part.states_BTMS for part in parts])
    torch.testing.assert_close(states[whole.mask_BT], whole.states_BTMS[whole.mask_BT])
    with pytest.raises(UsageError, match="cannot be shared by 3"):
        tiny.batches(tiny.recipe(), understanding, Share(0, 3))


@pytest.mark.parametrize("room", [4, 24])
def test_a_caption_that_is_too_long_is_named(understanding, room: int) -> None:
    batches = tiny.batches(tiny.recipe(context_tokens=room), understanding)
    with pytest.raises(UsageError, match=r"'a (dog ){15,}.* has 42 tokens.*context_tokens"):
        batches.picks.readable(["a cat", "a " + "dog " * 39])


def test_a_step_has_pictures_of_one_shape_and_mixed_scenes_are_steps_of_their_own(understanding, tmp_path) -> None:
    for number, size in enumerate(((40, 40), (80, 40), (40, 80))):
        Image.new("RGB", size, (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    captioned = load_captioned(tmp_path, caption="a dog")
    shape = partial(bucket_shape, canvas=16, multiple=8, smallest=8, largest=32)
    own = captioned_source(captioned, torch.device("cpu"), shape)
    batches = tiny.batches(tiny.recipe(steps=40, drop_caption=0.0), understanding)
    batches.sources["train", False] = Mixture(own, tiny.scenes(), 0.5).source()
    made = [(tuple(batches.make(step).z0_BCHW.shape), batches.names(step)) for step in range(40)]
    assert {shape for shape, _ in made} == {(8, 3, 16, 16), (8, 3, 8, 24), (8, 3, 24, 8)}
    of_files = [all(name.endswith(".png") for name in names) for _, names in made]
    assert 10 < sum(of_files) < 30
    for (shape, names), files in zip(made, of_files, strict=True):
        assert files == any(name.endswith(".png") for name in names)
        assert files or shape == (8, 3, 16, 16)


def test_a_run_trains_on_pictures_of_several_shapes(understanding, tmp_path) -> None:
    for number, size in enumerate(((40, 40), (80, 40), (40, 80))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    shape = partial(bucket_shape, canvas=16, multiple=8, smallest=8, largest=32)
    trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path / "run")
    captioned = load_captioned(tmp_path, caption="a dog", held_out=0.4)
    trainer.batches.sources["train", False] = captioned_source(captioned, trainer.device, shape)
    assert len(tiny.run(trainer)) == 8
    assert len(list(trainer.batches.validation(8))) == 4
