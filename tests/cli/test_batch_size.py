"""Several pictures drawn at once: what is recorded, that each is replayed exactly, and what becomes of the others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import find_bundle
from mos_cli.config.recipe import BatchRecipe, PictureRecord
from mos_cli.config.settings import RunSettings
from mos_cli.images.outputs import png, read_drawing
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.inference.requests import batch_size
from mos_cli.planning.memory import Setting, largest_batch
from mos_cli.routing.trace import load_recording
from mos_cli.towers.generation import GenerationTower

PROMPTS = "a dog\na red apple\na green apple a dog a cat\ncat\na cat"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Five prompts of four lengths."""
    (tmp_path / "p.txt").write_text(PROMPTS)
    return tmp_path / "p.txt"


def batches(folder: Path) -> list[tuple[int, int] | None]:
    """The size and the place of the batch of every picture, by name."""
    recipes = [read_drawing(path)[1].recipe for path in sorted(folder.glob("*.png"))]
    return [None if recipe.batch is None else (recipe.batch.size, recipe.batch.place) for recipe in recipes]


def difference(first: Path, second: Path) -> int:
    """The largest difference of two pictures, in levels."""
    one, other = (np.asarray(Image.open(path), dtype=int) for path in (first, second))
    return int(abs(one - other).max())


def test_pictures_of_a_batch_are_recorded_and_replayed_exactly(mos, bundle, prompts, tmp_path, monkeypatch) -> None:
    rows, forward = [], GenerationTower.forward

    def counted(tower, z_BCHW, *inputs, **options):
        rows.append(len(z_BCHW))
        return forward(tower, z_BCHW, *inputs, **options)

    monkeypatch.setattr(GenerationTower, "forward", counted)
    line = ["generate", f"@{prompts}", "-s", 3, "--cfg", 3, "--cfg-interval", "0,0.9", "--steps", 4]
    assert mos(*line, "-o", f"{tmp_path}/alone/").exit_code == 0
    rows.clear()
    result = mos(*line, "--batch-size", 4, "-o", f"{tmp_path}/out/")
    assert result.exit_code == 0, result.stderr
    assert rows == [4, 8, 8, 8, 1, 2, 2, 2], "at t = 1 there is no guidance"
    assert batches(tmp_path / "out") == [(4, 0), (4, 1), (4, 2), (4, 3), None]
    for path in sorted((tmp_path / "out").glob("*.png")):
        assert difference(path, tmp_path / "alone" / path.name) <= 3
        verified = mos("replay", path, "--verify")
        assert verified.stdout == "exact\n", path
        recording, expected = load_recording(path), load_recording(tmp_path / "alone" / path.name)
        assert recording.routes is not None
        assert expected.routes is not None
        for name, routes in expected.routes.items():
            assert recording.routes[name].ids_SJTK.shape == routes.ids_SJTK.shape
            assert (recording.routes[name].ids_SJTK == routes.ids_SJTK).mean() > 0.99
    first = read_drawing(next((tmp_path / "out").glob("0001*.png")))[1].recipe
    assert first.batch is not None
    assert first.batch.tokens is not None
    assert first.batch.tokens[0] == (4, 2), "with their marks"
    last = next((tmp_path / "out").glob("0005*.png"))
    assert last.read_bytes() == (tmp_path / "alone" / last.name).read_bytes(), "it was drawn alone"


def test_a_variation_of_a_picture_of_a_batch_is_drawn_alone(mos, bundle, tmp_path) -> None:
    assert mos("generate", "a dog", "-n", 3, "-s", 1, "--batch-size", 3, "-o", tmp_path / "{seed}.png").exit_code == 0
    assert mos("generate", "a dog", "-s", 9, "-o", tmp_path / "alone.png").exit_code == 0
    assert mos("replay", tmp_path / "2.png", "--set", "seed=9", "-o", tmp_path / "nine.png").exit_code == 0
    assert (tmp_path / "nine.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_rules_weights_caching_and_what_is_recorded_come_apart(mos, bundle, tmp_path) -> None:
    more = ["--route", "apple=1,2", "--feature-cache", 2, "--steps", 8, "--trace", "full", "--preview-steps"]
    line = ["generate", "a (red:2) apple {a|a cat}", "-s", 1, "-n", 3, *more]
    assert mos(*line, "-o", f"{tmp_path}/alone/").exit_code == 0
    assert mos(*line, "--batch-size", 3, "-o", f"{tmp_path}/out/").exit_code == 0
    for path in sorted((tmp_path / "out").glob("*.png")):
        assert mos("replay", path, "--verify").stdout == "exact\n", path
        ours, theirs = load_recording(path), load_recording(tmp_path / "alone" / path.name)
        assert ours.previews is not None
        for name, branch in theirs.trace.branches.items():
            assert ours.trace.branches[name].tokens == branch.tokens
            assert ours.trace.branches[name].steered == branch.steered
            assert ours.trace.branches[name].changed == branch.changed
        assert ours.routes is not None
        assert theirs.routes is not None
        for name, routes in theirs.routes.items():
            np.testing.assert_allclose(
                ours.routes[name].probabilities_SJTM.astype(float), routes.probabilities_SJTM.astype(float), atol=2e-2
            )
    result = mos(
        "generate",
        "a (red:2) apple {a|a cat}",
        "-s",
        1,
        "-n",
        3,
        "--steps",
        2,
        "--regions",
        "--batch-size",
        3,
        "-o",
        f"{tmp_path}/regions/",
    )
    assert result.exit_code == 0, result.stderr
    for path in sorted((tmp_path / "regions").glob("*.png")):
        regions = load_recording(path).routes["positive"].regions_JTN
        assert regions.shape[1] == len(load_recording(path).trace.branches["positive"].tokens)


def test_a_prompt_that_cannot_be_drawn_leaves_the_others_of_its_batch(mos, bundle, tmp_path) -> None:
    (tmp_path / "p.txt").write_text(f"a dog\n{'apple ' * 40}\na cat\na {{x\n")
    manifest = tmp_path / "run.jsonl"
    line = ["generate", f"@{tmp_path / 'p.txt'}", "-s", 1, "--batch-size", 3, "-o", f"{tmp_path}/out/"]
    result = mos(*line, "--manifest", manifest)
    assert result.exit_code == 7
    assert "2 of 4 pictures failed" in result.stderr
    assert batches(tmp_path / "out") == [(3, 0), (3, 2)]
    for path in (tmp_path / "out").glob("*.png"):
        assert mos("replay", path, "--verify").stdout == "exact\n"


def test_a_run_that_goes_on_makes_the_same_batches(mos, bundle, prompts, tmp_path) -> None:
    manifest, out = tmp_path / "run.jsonl", tmp_path / "out"
    line = ["generate", f"@{prompts}", "-s", 1, "--batch-size", 2, "--manifest", manifest, "-o", f"{out}/"]
    assert mos(*line).exit_code == 0
    before = {path.name[4:]: path.read_bytes() for path in out.glob("*.png")}
    for lost in ("*a-red-apple*", "*_a-cat_*"):
        for path in out.glob(lost):
            path.unlink()
    resumed = mos(*line, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert len(resumed.stdout.splitlines()) == 2
    assert {path.name[4:]: path.read_bytes() for path in out.glob("*.png")} == before
    alone = mos(*line[:-4], "--manifest", manifest, "--resume", "-o", f"{tmp_path}/again/", "--batch-size", 1)
    assert len(alone.stdout.splitlines()) == 4, "the one that was drawn alone is the same"


def test_jobs_of_one_size_and_setting_share_a_batch(mos, editor, tmp_path) -> None:
    Image.new("RGB", (32, 32), "navy").save(tmp_path / "a.png")
    jobs = [
        {"prompt": "a dog"},
        {"prompt": "a cat", "steps": 2},
        {"prompt": "a red apple", "picture": str(tmp_path / "a.png")},
        {"prompt": "a cat", "negative": "a dog"},
        {"prompt": "a cat", "size": "64"},
        {"prompt": "an apple", "steps": 2},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    result = mos("run", tmp_path / "jobs.jsonl", "-s", 1, "--batch-size", 16, "-o", f"{tmp_path}/out/", "--json")
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["index"] for one in events if one["event"] == "picture"] == [1, 4, 2, 6, 3, 5]
    assert "edits are drawn alone" in result.stdout
    assert batches(tmp_path / "out") == [(2, 0), (2, 0), None, (2, 1), None, (2, 1)]


def test_sizes_of_batches_that_cannot_be(mos, bundle, tmp_path) -> None:
    for size in ("0", "65", "many", "-1"):
        refused = mos("generate", "a dog", "-o", tmp_path / "a.png", f"--batch-size={size}")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert mos("generate", "a dog", "-n", 2, "-s", 1, "-o", f"{tmp_path}/out/", "--batch-size", "auto").exit_code == 0
    assert batches(tmp_path / "out") == [None, None], "on a CPU it pays little"


def test_auto_takes_what_fits_a_gpu(monkeypatch) -> None:
    network = find_network("mos-s")
    found = [largest_batch(network, Setting(), (512, 512), gib) for gib in (4, 12, 16, 24, 80)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, 16)
    monkeypatch.setattr("mos_cli.inference.requests.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("mos_cli.inference.requests.network_of", lambda bundle, precision: network)
    settings = RunSettings(batch_size="auto", max_vram=80.0)
    assert batch_size(settings, find_bundle("emoji"), (256, 256), precision="bf16", quant=None) == 16


@pytest.mark.parametrize(
    "forged",
    [
        {"size": 2, "place": 2},
        {"size": 1, "place": 0},
        {"size": 10**9, "place": 0},
        {"size": 2, "place": 0, "tokens": [[4, 2]]},
        {"size": 2, "place": 0, "tokens": [[4], [4, 2]]},
        {"size": 2, "place": 0, "tokens": [[4, 2], [10**9, 2]]},
        {"size": 2, "place": 0, "tokens": [[4], [4]]},
    ],
)
def test_forged_batches_are_refused_in_one_line(mos, bundle, tmp_path, forged: dict) -> None:
    assert mos("generate", "a dog", "-s", 1, "-o", tmp_path / "a.png").exit_code == 0
    image, record = read_drawing(tmp_path / "a.png")
    data = json.loads(record.to_json())
    data["recipe"]["batch"] = forged
    made = PictureRecord.model_construct(**{**record.__dict__, "recipe": record.recipe})
    monkey = json.dumps(data)
    object.__setattr__(made, "to_json", lambda: monkey)
    (tmp_path / "forged.png").write_bytes(png(image, made))
    refused = mos("replay", tmp_path / "forged.png", "--verify")
    assert refused.exit_code == 3, refused.stderr
    assert len([line for line in refused.stderr.splitlines() if "error" in line]) == 1


def test_a_batch_is_computed_at_once_in_the_python_interface_too(bundle) -> None:
    import mos_cli

    pipeline: MoSPipeline = mos_cli.load("tiny").pipeline
    recipe = mos_cli.load("tiny").generate("a dog", seed=1).record.recipe
    recipes = [recipe.model_copy(update={"seed": seed, "batch": BatchRecipe(size=2, place=seed)}) for seed in range(2)]
    first, second = pipeline.draw_batch(recipes)
    again = pipeline.draw(second.record.recipe)
    assert again.record.sha256 == second.record.sha256 != first.record.sha256
