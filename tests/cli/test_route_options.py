"""Steering from the command line: rules travel with a picture, are replayed exactly, and are refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mos_cli.images.outputs import read_drawing
from mos_cli.routing.trace import Recording, TraceBranch, load_recording

PROMPT = "a red apple"


def drawn(mos, path: Path, *options: object, prompt: str = PROMPT) -> Recording:
    result = mos("generate", prompt, "-s", 5, "-o", path, *options)
    assert result.exit_code == 0, result.output
    return load_recording(path)


def pixels(recording: Recording) -> np.ndarray:
    assert recording.picture is not None
    return np.asarray(Image.open(recording.picture))


def layers_of(recording: Recording, text: str, branch: str = "positive") -> set[int]:
    assert recording.routes is not None
    tokens = [token.text for token in recording.trace.branches[branch].tokens]
    return set(recording.routes[branch].ids_SJTK[:, :, tokens.index(text)].flatten().tolist())


def test_rules_steer_a_picture_and_travel_in_it(mos, bundle, tmp_path) -> None:
    free = drawn(mos, tmp_path / "free.png")
    mine = drawn(mos, tmp_path / "mine.png", "--route", "apple = 3,2", "--route", "red!=0")
    assert mine.trace.recipe.routes == ("apple=2-3", "red!=0")
    assert layers_of(mine, "apple") <= {2, 3}
    assert 0 not in layers_of(mine, "red")
    assert not np.array_equal(pixels(mine), pixels(free))
    branch: TraceBranch = mine.trace.branches["positive"]
    assert [(done.rule, done.tokens, done.decisions) for done in branch.steered or ()] == [
        ("apple=2-3", (3,), 9),
        ("red!=0", (2,), 9),
    ]
    assert branch.changed is not None
    assert 0 < branch.changed <= 18
    # The rules are counted in every branch; the negative prompt has none of their words.
    assert mine.trace.branches["negative"].changed == 0
    assert {branch.changed for branch in free.trace.branches.values()} == {None}
    verified = mos("replay", tmp_path / "mine.png", "--verify")
    assert verified.stdout.strip() == "exact"
    other = mos("replay", tmp_path / "mine.png", "--set", "seed=6", "-o", tmp_path / "other.png")
    assert other.exit_code == 0, other.output
    assert layers_of(load_recording(tmp_path / "other.png"), "apple") <= {2, 3}


def test_without_rules_no_byte_changes(mos, bundle, tmp_path) -> None:
    drawn(mos, tmp_path / "a.png")
    text = (tmp_path / "a.json").read_text()
    assert not {"routes", "route_from", "steered", "changed", "probabilities", "regions"} & set(json.loads(text))
    assert "routes" not in json.loads(text)["recipe"]
    # Biased by nothing, the rules' own path must decide as the router alone does.
    drawn(mos, tmp_path / "b.png", "--route", "*+=0@1")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))
    arrays = [(tmp_path / f"{name}.routing.safetensors").read_bytes() for name in "ab"]
    assert arrays[0] == arrays[1]


def test_the_routes_of_another_run_are_taken_over(mos, bundle, tmp_path) -> None:
    first = drawn(mos, tmp_path / "first.png")
    same = drawn(mos, tmp_path / "same.png", "--route-from", tmp_path / "first.json")
    assert np.array_equal(pixels(first), pixels(same))
    assert first.routes is not None
    assert same.routes is not None
    for name, routes in first.routes.items():
        assert np.array_equal(routes.ids_SJTK, same.routes[name].ids_SJTK)
        assert np.array_equal(routes.weights_SJTK, same.routes[name].weights_SJTK)

    pinned = drawn(mos, tmp_path / "pinned.png", "--route", "apple=1 steps 0", "--route", "apple=2 steps 1-2")
    prompt = "a green apple"
    other = drawn(mos, tmp_path / "other.png", "--route-from", tmp_path / "pinned.png", prompt=prompt)
    assert layers_of(other, "apple") == {1, 2}
    assert layers_of(other, "green") - layers_of(pinned, "apple")
    part = ("--route-from", tmp_path / "pinned.png", "--route-until", "30%")
    begun = drawn(mos, tmp_path / "begun.png", *part, prompt=prompt)
    assert begun.routes is not None
    assert set(begun.routes["positive"].ids_SJTK[0, :, 3].flatten().tolist()) == {1}
    assert begun.trace.recipe.route_from is not None
    assert begun.trace.recipe.route_from.until == pytest.approx(0.3)
    again = mos("replay", tmp_path / "begun.png", "--verify", "--route-from", tmp_path / "pinned.png")
    assert again.stdout.strip() == "exact"


def test_routes_that_cannot_be_taken_over_are_refused(mos, bundle, editor, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOS_MODEL", "tiny")
    drawn(mos, tmp_path / "first.png")
    drawn(mos, tmp_path / "small.png", "--trace", "summary")
    taken = drawn(mos, tmp_path / "taken.png", "--route-from", tmp_path / "first.png")
    assert taken.trace.recipe.route_from is not None

    def refused(*arguments: object) -> str:
        result = mos(*arguments)
        assert result.exit_code in (2, 3), result.output
        return result.stderr

    def new(*options: object) -> str:
        return refused("generate", "a dog", "-o", tmp_path / "new.png", *options)

    assert "mean nothing to editor" in new("-m", "editor", "--route-from", tmp_path / "first.png")
    assert "summary only" in new("--route-from", tmp_path / "small.png")
    assert "such as 40%" in new("--route-from", tmp_path / "first.png", "--route-until", "0.4")
    assert "--route-from" in new("--route-until", "40%")
    assert "cannot read the trace" in new("--route-from", tmp_path / "none.png")
    assert "name its trace with --route-from" in refused("replay", tmp_path / "taken.png", "--verify")
    other = ("--route-from", tmp_path / "taken.png")
    drawn(mos, tmp_path / "dog.png", prompt="a dog")
    assert "is not the run" in refused(
        "replay", tmp_path / "taken.png", "--verify", "--route-from", tmp_path / "dog.png"
    )
    assert "drop --route-from" in refused("replay", tmp_path / "first.png", "--verify", *other)


def test_mistakes_are_told_before_anything_is_loaded(mos, bundle, tmp_path) -> None:
    def refused(*options: object) -> str:
        result = mos("generate", PROMPT, "-o", tmp_path / "x.png", *options)
        assert result.exit_code == 2, result.output
        assert list(tmp_path.glob("x*")) == []
        return result.stderr

    assert "at character 7" in refused("--route", "apple=").replace("\n", " ")
    assert "its words are a, red, apple" in refused("--route", "dog=1")
    assert "layers that are not there" in refused("--route", "apple=9")
    assert "blocks that are not there" in refused("--route", "apple=1 blocks 9", "--dry-run")
    assert "leaves out" in refused("--regions", "--trace", "summary")
    assert "no router is used" in refused("--trace", "full", "--route", "last")


def test_baselines_are_recorded_as_what_was_read(mos, bundle, tmp_path) -> None:
    whole = drawn(mos, tmp_path / "uniform.png", "--route", "uniform")
    assert whole.trace.top_k == 4
    assert layers_of(whole, "apple") == {0, 1, 2, 3}
    last = drawn(mos, tmp_path / "last.png", "--route", "last")
    assert (last.trace.top_k, layers_of(last, "apple")) == (1, {3})
    for name in ("uniform", "last"):
        assert mos("inspect-routing", tmp_path / f"{name}.json").exit_code == 0
        assert mos("replay", tmp_path / f"{name}.png", "--verify").stdout.strip() == "exact"


def test_a_preset_can_hold_rules(mos, bundle, tmp_path, monkeypatch) -> None:
    (tmp_path / "config.toml").write_text('[generate]\nroutes = ["*!=0"]\n')
    assert 0 not in layers_of(drawn(mos, tmp_path / "a.png"), "apple")
    assert layers_of(drawn(mos, tmp_path / "b.png", "--route", "apple=0"), "apple") == {0}


def test_probabilities_regions_and_previews_are_recorded_on_request(mos, bundle, tmp_path) -> None:
    plain = drawn(mos, tmp_path / "plain.png")
    full = drawn(mos, tmp_path / "full.png", "--trace", "full", "--regions", "--preview-steps")
    assert np.array_equal(pixels(plain), pixels(full))
    assert full.routes is not None
    for name, routes in full.routes.items():
        tokens = len(full.trace.branches[name].tokens)
        assert routes.probabilities_SJTM is not None
        assert routes.probabilities_SJTM.shape == (3, 3, tokens, 4)
        np.testing.assert_allclose(routes.probabilities_SJTM.sum(axis=-1, dtype=np.float64), 1, atol=2e-3)
        best = np.sort(routes.probabilities_SJTM, axis=-1)[..., -2:]
        kept = np.take_along_axis(routes.probabilities_SJTM, routes.ids_SJTK.astype(np.int64), axis=-1)
        np.testing.assert_array_equal(np.sort(kept, axis=-1), best)
        shares = kept / kept.sum(axis=-1, keepdims=True, dtype=np.float32)
        np.testing.assert_allclose(shares, routes.weights_SJTK, atol=4e-3)
        assert routes.regions_JTN is not None
        assert routes.regions_JTN.shape == (3, tokens, 16)
        assert (routes.regions_JTN.sum(axis=1) <= 1).all()
        assert (routes.regions_JTN > 0).all()
    assert full.trace.regions is not None
    assert (full.trace.regions.rows, full.trace.regions.columns) == (4, 4)
    assert full.previews is not None
    with Image.open(full.previews) as frames:
        assert getattr(frames, "n_frames", 1) == 3
        frames.seek(2)
        previews = [frames.convert("L")]
        frames.seek(0)
        previews.append(frames.convert("L"))
    # The last step expects the picture itself, the first does not; WebP keeps little of such noise.
    last, first, whole = (
        np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float64).ravel()
        for image in (*previews, Image.fromarray(pixels(full)).convert("L"))
    )
    assert np.corrcoef(last, whole)[0, 1] > max(0.8, np.corrcoef(first, whole)[0, 1])
    assert plain.previews is None


def test_an_edit_records_regions_of_words_and_pictures(mos, editor, tmp_path) -> None:
    drawn(mos, tmp_path / "a.png")
    result = mos(
        "edit", tmp_path / "a.png", "a dog", "-o", tmp_path / "b.png", "--regions", "--route", '"picture 1"=1-2'
    )
    assert result.exit_code == 0, result.output
    recording = load_recording(tmp_path / "b.png")
    assert recording.routes is not None
    tokens = recording.trace.branches["positive"].tokens
    seen = [number for number, token in enumerate(tokens) if token.patch is not None]
    assert len(seen) == 16
    assert set(recording.routes["positive"].ids_SJTK[:, :, seen].flatten().tolist()) <= {1, 2}
    assert recording.routes["positive"].regions_JTN is not None
    assert recording.routes["positive"].regions_JTN.shape == (3, len(tokens), 16)
    assert read_drawing(tmp_path / "b.png")[1].recipe.routes == ('"picture 1"=1-2',)
    assert mos("replay", tmp_path / "b.png", "--verify").stdout.strip() == "exact"


def test_what_would_have_no_effect_is_refused(mos, bundle, tmp_path) -> None:
    drawn(mos, tmp_path / "first.png")
    drawn(mos, tmp_path / "all.png", "--route", "uniform")

    def refused(*options: object, prompt: str = PROMPT) -> str:
        result = mos("generate", prompt, "-s", 5, "-o", tmp_path / "x.png", *options)
        assert result.exit_code in (2, 3), result.output
        return result.stderr

    assert "drop it" in refused("--route-from", tmp_path / "first.png", "--route", "shuffle:3")
    assert "kept every layer" in refused("--route-from", tmp_path / "all.png")
    assert "no word in common" in refused("--route-from", tmp_path / "first.png", prompt="green dog")
    guided = ("--negative", "dog", "--cfg-interval", "0,0.5", "--route", "dog=1 steps 0")
    assert "has no effect" in refused(*guided)
    assert "such as 40%" in refused("--route-from", tmp_path / "first.png", "--route-until", "")


def test_replacing_a_picture_takes_its_trace_along_but_nothing_else(mos, bundle, tmp_path) -> None:
    (tmp_path / "package.json").write_text("mine")
    assert mos("generate", PROMPT, "-o", tmp_path / "package.png", "--overwrite", "--trace", "off").exit_code == 3
    assert (tmp_path / "package.json").read_text() == "mine"
    drawn(mos, tmp_path / "a.png")
    assert mos("generate", PROMPT, "-o", tmp_path / "a.png", "--overwrite", "--trace", "off").exit_code == 0
    assert not (tmp_path / "a.json").exists()


def test_rules_can_be_changed_in_a_replay(mos, bundle, tmp_path) -> None:
    drawn(mos, tmp_path / "a.png", "--route", "apple=1")
    changed = mos("replay", tmp_path / "a.png", "--set", "routes=apple=2", "-o", tmp_path / "b.png")
    assert changed.exit_code == 0, changed.output
    assert layers_of(load_recording(tmp_path / "b.png"), "apple") == {2}
    refused = mos("replay", tmp_path / "a.png", "--set", "route_from=x", "-o", tmp_path / "c.png")
    assert (refused.exit_code, "--route-from" in refused.stderr) == (2, True)
