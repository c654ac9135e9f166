"""`mos replay`: the same picture from the PNG alone, variations of it, and how close it is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mos_cli.bundles.bundle import FORMER, find_bundle
from mos_cli.images.outputs import png, read_drawing
from mos_cli.towers.generation import GenerationTower
from mos_cli.utils.threads import cpu_threads
from tests.helpers.printed import errors

PROMPT = "a red apple"


def test_replay_makes_the_same_picture_from_the_png_alone(mos, bundle, tmp_path) -> None:
    original = tmp_path / "one.png"
    options = [
        "--steps",
        5,
        "--cfg",
        3.5,
        "--cfg-interval",
        "0.3,0.9",
        "--negative",
        "dog",
        "--size",
        "48x16",
    ]
    assert mos("generate", PROMPT, "-s", 3, *options, "-o", original).exit_code == 0
    (tmp_path / "one.json").unlink()
    result = mos("replay", original, "--verify")
    assert (result.exit_code, result.stdout.strip()) == (0, "exact")
    assert mos("replay", original, "-o", tmp_path / "two.png").exit_code == 0
    assert original.read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (
        mos("replay", original, "--set", "seed=4", "--set", "cfg_interval=0,1", "-o", tmp_path / "3.png").exit_code == 0
    )
    changed = read_drawing(tmp_path / "3.png")[1].recipe
    assert (changed.seed, changed.cfg_interval, changed.negative, changed.steps) == (4, (0.0, 1.0), "dog", 5)


def test_the_solver_is_in_the_recipe_and_is_euler_where_a_picture_does_not_say(mos, bundle, tmp_path) -> None:
    for solver in ("ab2", "euler"):
        drawn = mos("generate", PROMPT, "-s", 3, "--solver", solver, "-o", tmp_path / f"{solver}.png")
        assert drawn.exit_code == 0, drawn.stderr
        assert read_drawing(tmp_path / f"{solver}.png")[1].recipe.solver == solver
        assert mos("replay", tmp_path / f"{solver}.png", "--verify").stdout.strip() == "exact"
    mos("generate", PROMPT, "-s", 3, "-o", tmp_path / "default.png")
    assert (tmp_path / "default.png").read_bytes() == (tmp_path / "ab2.png").read_bytes()
    assert "Sampler: Euler," in Image.open(tmp_path / "euler.png").info["parameters"]
    assert mos("replay", tmp_path / "ab2.png", "--set", "solver=euler", "-o", tmp_path / "set.png").exit_code == 0
    assert (tmp_path / "set.png").read_bytes() == (tmp_path / "euler.png").read_bytes()
    # Pictures drawn before solvers were recorded were drawn by Euler's method.
    image, record = read_drawing(tmp_path / "euler.png")
    info, old = PngInfo(), json.loads(record.to_json())
    assert old["recipe"].pop("solver") == "euler"
    info.add_itxt("mos", json.dumps(old))
    image.save(tmp_path / "old.png", pnginfo=info)
    assert mos("replay", tmp_path / "old.png", "--verify").stdout.strip() == "exact"


def test_a_replay_takes_as_many_threads_as_the_picture_did(mos, bundle, tmp_path) -> None:
    original, replayed = tmp_path / "one.png", tmp_path / "two.png"
    with cpu_threads(2):
        mos("generate", PROMPT, "-s", 3, "-o", original)
    with cpu_threads(1):
        assert mos("replay", original, "-o", replayed).exit_code == 0
        assert torch.get_num_threads() == 1
    # The number is in the record, so that equal bytes mean an equal number.
    assert read_drawing(original)[1].made.threads == 2
    assert replayed.read_bytes() == original.read_bytes()


def test_the_number_of_threads_in_a_record(mos, bundle, tmp_path) -> None:
    original = tmp_path / "one.png"
    mos("generate", PROMPT, "-s", 3, "-o", original)
    record = json.loads(Image.open(original).info["mos"])

    def replay(made: dict) -> tuple[int, str]:
        info = PngInfo()
        info.add_itxt("mos", json.dumps(record | {"made": made}))
        Image.open(original).save(tmp_path / "edited.png", pnginfo=info)
        result = mos("replay", tmp_path / "edited.png", "--verify")
        return result.exit_code, result.stdout.strip() or result.stderr

    before_it_was_recorded = {key: value for key, value in record["made"].items() if key != "threads"}
    assert replay(before_it_was_recorded) == (0, "exact")
    assert replay(record["made"] | {"threads": None}) == (0, "exact")
    for absurd in (0, -1, 10**6, "all"):
        code, said = replay(record["made"] | {"threads": absurd})
        assert code == 3
        assert "made.threads" in said


def test_verify_tells_close_from_different(mos, bundle, tmp_path) -> None:
    original = tmp_path / "one.png"
    mos("generate", PROMPT, "-s", 3, "-o", original)
    image, verdicts = Image.open(original), {}
    for name, change in {"close": 1, "different": 90}.items():
        array = np.asarray(image).astype(int)
        array[..., 0] = np.where(array[..., 0] < 128, array[..., 0] + change, array[..., 0] - change)
        info = PngInfo()
        info.add_itxt("mos", image.info["mos"])
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / f"{name}.png", pnginfo=info)
        result = mos("replay", tmp_path / f"{name}.png", "--verify")
        verdicts[name] = (result.exit_code, result.stdout.split()[0])
    assert verdicts == {"close": (0, "close"), "different": (1, "different")}


def test_verifying_does_not_mind_the_environment(mos, bundle, tmp_path, monkeypatch) -> None:
    mos("generate", PROMPT, "-o", tmp_path / "one.png")
    monkeypatch.setenv("MOS_OUTPUT", str(tmp_path / "elsewhere.png"))
    assert mos("replay", tmp_path / "one.png", "--verify").stdout.strip() == "exact"
    assert mos("replay", tmp_path / "one.png", "--verify", "--trace", "off").exit_code == 2
    assert "sampling" in mos("replay", tmp_path / "one.png", "--verify", "-v").stderr


def test_an_unknown_setting_of_a_replay_is_called_that(mos, bundle, tmp_path) -> None:
    mos("generate", PROMPT, "-o", tmp_path / "one.png")
    result = mos("replay", tmp_path / "one.png", "--set", "feature_cach=2")
    assert result.exit_code == 2
    assert "feature_cach: unknown setting" in result.stderr


def test_a_change_without_effect_is_refused(mos, bundle, tmp_path) -> None:
    mos("generate", PROMPT, "--cfg", 1, "-o", tmp_path / "one.png")
    for change in ("negative=dog", "cfg_interval=0,0.5"):
        result = mos("replay", tmp_path / "one.png", "--set", change)
        assert result.exit_code == 2
        assert "no effect" in result.stderr
    changes = ["--set", "negative=dog", "--set", "cfg=2"]
    assert mos("replay", tmp_path / "one.png", *changes, "-o", tmp_path / "two.png").exit_code == 0


def test_a_replay_with_another_version_of_the_model_is_refused(mos, bundle, tmp_path) -> None:
    mos("generate", PROMPT, "-o", tmp_path / "one.png")
    index = bundle.folder / "model_index.json"
    index.write_text(index.read_text().replace("random weights", "other weights"))
    result = mos("replay", tmp_path / "one.png")
    assert result.exit_code == 4
    theirs, ours = read_drawing(tmp_path / "one.png")[1].made.bundle_hash, find_bundle("tiny").hash
    assert f"was made by tiny {theirs[:10]}; tiny is {ours[:10]} here" in result.stderr


@pytest.mark.parametrize("name", ["tiny", "emoji-nano"])
def test_a_picture_of_a_model_that_came_with_mos_once_is_refused_with_the_version(mos, bundle, tmp_path, name) -> None:
    mos("generate", PROMPT, "-o", tmp_path / "one.png")
    image, record = read_drawing(tmp_path / "one.png")
    for former, version in FORMER.items():
        update = {"recipe": record.recipe.model_copy(update={"model": name})}
        update["made"] = record.made.model_copy(update={"bundle_hash": former})
        (tmp_path / "old.png").write_bytes(png(image, record.model_copy(update=update)))
        for command in (["replay"], ["routing", "ablate", "--word", "apple"]):
            result = mos(*command, tmp_path / "old.png")
            assert result.exit_code == 4, result.stderr
            (line,) = errors(result)
            assert f"was made by {name} {former[:10]}, which came with mos {version}" in line
        drawn = mos("replay", tmp_path / "old.png", "--set", "model=tiny", "-o", tmp_path / "new.png", "--overwrite")
        assert drawn.exit_code == 0, drawn.stderr


def test_a_picture_with_a_damaged_recipe_is_refused(mos, bundle, tmp_path) -> None:
    for text in ("{", '{"schema": "mos-picture/9"}', "[]"):
        info = PngInfo()
        info.add_itxt("mos", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "bad.png", pnginfo=info)
        result = mos("replay", tmp_path / "bad.png")
        assert result.exit_code == 3
        assert len(result.stderr.strip().splitlines()) == 1


class Busier:
    """Stands in for `AdaptiveThreads`: takes two threads before the picture, and one from its third step on."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self, _step: object = None) -> None:
        self.looks += 1
        torch.set_num_threads(2 if self.looks < 4 else 1)


def test_a_replay_changes_the_number_of_threads_where_the_picture_did(mos, bundle, tmp_path, monkeypatch) -> None:
    original, replayed = tmp_path / "one.png", tmp_path / "two.png"
    used: list[int] = []
    forward = GenerationTower.forward

    def counted(*given, **named):
        used.append(torch.get_num_threads())
        return forward(*given, **named)

    monkeypatch.setattr(GenerationTower, "forward", counted)
    with cpu_threads(1):
        with monkeypatch.context() as busy:
            busy.setattr("mos_cli.utils.threads.AdaptiveThreads", Busier)
            assert mos("generate", PROMPT, "-s", 3, "--steps", 6, "--cfg", 1, "-o", original).exit_code == 0
        made = read_drawing(original)[1].made
        assert (made.threads, made.thread_changes) == (2, ((3, 1),))
        assert mos("replay", original, "-o", replayed).exit_code == 0
        assert mos("replay", original, "--verify").stdout.strip() == "exact"
        assert torch.get_num_threads() == 1
    assert used == [2, 2, 2, 1, 1, 1] * 3
    assert replayed.read_bytes() == original.read_bytes()


def test_a_picture_without_changes_of_threads_does_not_mention_them(mos, bundle, tmp_path) -> None:
    """Versions of mos that do not know the field can replay it."""
    mos("generate", PROMPT, "-s", 3, "-o", tmp_path / "one.png")
    assert "thread_changes" not in Image.open(tmp_path / "one.png").info["mos"]
