"""Base models on the command line, from a diffusers folder on the disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import Result

from mos_cli.errors import InputError, MemoryLimitError, UsageError
from mos_cli.routing.trace import load_recording
from tests.helpers.adapted import PROMPT

pytestmark = pytest.mark.usefixtures("in_fp32")
Mos = Callable[..., Result]
Folders = Callable[[str], Path]


@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_a_folder_is_drawn_replayed_and_inspected(mos: Mos, base_folders: Folders, tmp_path: Path, name: str) -> None:
    folder, picture = base_folders(name), tmp_path / "a.png"
    drawn = mos("generate", PROMPT, "-m", folder, "--size", "64", "--steps", "2", "-s", "5", "-o", picture, "-q")
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(picture).size == (64, 64)
    trace = load_recording(picture).trace
    assert trace.recipe.model == name
    assert trace.recipe.solver == "euler"
    assert [token.text.strip() for token in trace.branches["positive"].tokens] == PROMPT.split()
    verified = mos("replay", picture, "--verify")
    assert (verified.exit_code, verified.output.strip().splitlines()[-1]) == (0, "exact")
    shown = mos("inspect-routing", picture)
    assert "its adapter is untrained" in " ".join(shown.output.split())
    facts = json.loads(mos("inspect-routing", picture, "--json").output)
    assert facts["overview"]["adapter"]["trained"] is False
    assert [slot["own_layer"] for slot in facts["slots"]] == facts["overview"]["adapter"]["own_layers"]
    assert all(slot["layer_use"][slot["own_layer"]] == 1 for slot in facts["slots"])


def test_a_rule_opens_the_gate_of_its_tokens_alone(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    folder = base_folders("klein")
    common = ("generate", PROMPT, "-m", folder, "--size", "64", "--steps", "2", "-s", "5", "-q")
    assert mos(*common, "-o", tmp_path / "plain.png").exit_code == 0
    assert mos(*common, "-o", tmp_path / "ruled.png", "--route", "fox=10,11").exit_code == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "ruled.png").read_bytes()
    recording = load_recording(tmp_path / "ruled.png")
    assert recording.routes is not None
    trace, routes = recording.trace, recording.routes["positive"]
    assert routes.slots_SJTK is not None
    for number, token in enumerate(trace.branches["positive"].tokens):
        ids, weights = routes.ids_SJTK[:, :, number], routes.weights_SJTK[:, :, number]
        read = {int(layer) for layer in ids[weights > 0]}
        assert read == ({10, 11, 18, 27} if token.text.strip() == "fox" else {9, 18, 27})
    assert trace.branches["positive"].changed == 2 * 5
    assert mos("replay", tmp_path / "ruled.png", "--verify").exit_code == 0


def test_weights_in_prompts_are_refused(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    for words in (["a (fox:1.3)"], [PROMPT, "--cfg", "2", "--negative", "(fox:1.3)"]):
        refused = mos("generate", *words, "-m", base_folders("prx"), "-o", tmp_path / "a.png")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
        assert "weights in prompts" in refused.stderr


def test_a_written_slot_is_taken(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    rule = "fox=2 blocks 1 slots 2"
    drawn = mos(
        "generate",
        PROMPT,
        "-m",
        base_folders("klein"),
        "--size",
        64,
        "--steps",
        1,
        "-o",
        picture,
        "--route",
        rule,
        "-q",
    )
    assert drawn.exit_code == 0, drawn.output
    recording = load_recording(picture)
    assert recording.routes is not None
    routes = recording.routes["positive"]
    assert routes.slots_SJTK is not None
    fox = 2
    kept = set(zip(routes.ids_SJTK[0, 1, fox].tolist(), routes.slots_SJTK[0, 1, fox].tolist(), strict=True))
    assert kept == {(9, 0), (18, 1), (2, 2)}
    assert str(recording.trace.recipe.routes) == f"('{rule}',)"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--solver", "ab2"], "--solver ab2"),
        (["--feature-cache", "2"], "--feature-cache"),
        (["--cfg-interval", "0.1,0.9"], "--cfg-interval"),
        (["--cfg", "3"], "distilled"),
        (["--cfg", "0.5"], "--cfg 0.5"),
        (["--regions"], "--regions"),
        (["--trace", "full"], "--trace full"),
        (["--compile"], "--compile"),
        (["--attention", "xformers"], "--attention xformers"),
        (["--route", "fox=31"], "layers that are not there"),
        (["--route", "fox=3 slots 3"], "slots that are not there"),
        (["--route", "horse=3"], "horse"),
        (["--size", "100"], "multiples of 16"),
    ],
)
def test_what_has_no_effect_is_refused_in_one_line(
    mos: Mos, base_folders: Folders, tmp_path: Path, options: list[str], told: str
) -> None:
    common = ("generate", PROMPT, "-m", base_folders("klein"), "-o", tmp_path / "a.png", "--steps", "1")
    refused = mos(*common, *(() if "--size" in options else ("--size", "64")), *options)
    assert refused.exit_code == 2
    assert told in " ".join(refused.output.split())
    assert not (tmp_path / "a.png").exists()


def test_slots_are_refused_where_there_are_none(mos: Mos, bundle: object, tmp_path: Path) -> None:
    refused = mos("generate", "a red apple", "--route", "apple=1 slots 0", "-o", tmp_path / "a.png")
    assert refused.exit_code == 2
    assert "slots" in refused.output


def test_a_prompt_that_is_too_long_is_refused(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    refused = mos("generate", "fox " * 600, "-m", base_folders("klein"), "-o", tmp_path / "a.png", "--size", 64)
    assert refused.exit_code == 3
    assert "too long" in refused.output


@pytest.mark.parametrize("prompt", ["assistant", "user", "a  fox,\u00e9 \U0001f98a!", "fox\nfox", "a"])
def test_tokens_have_their_characters(loaded: Callable[..., object], prompt: str) -> None:
    """Also where the template has the same words, and for characters outside of ASCII."""
    encoded = loaded("klein").encode(prompt)  # type: ignore[attr-defined]
    assert encoded.prompt == prompt
    covered = {n for token in encoded.tokens for n in range(token.start, token.end)}
    assert covered == set(range(len(prompt)))


def test_layers_are_ablated_and_routes_compared(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    common = ("generate", PROMPT, "-m", base_folders("z-image"), "--size", "64", "--steps", "1", "-s", "5", "-q")
    assert mos(*common, "-o", tmp_path / "a.png").exit_code == 0
    assert mos(*common, "-o", tmp_path / "b.png", "--route", "fox=2").exit_code == 0
    ablated = mos("routing", "ablate", tmp_path / "a.png", "--word", "fox", "--only", "-o", tmp_path / "strip.png")
    assert ablated.exit_code == 0, ablated.output
    assert (tmp_path / "strip.png").is_file()
    compared = mos("routing", "diff", tmp_path / "a.png", tmp_path / "b.png", "--json")
    assert compared.exit_code == 0, compared.output
    report = mos("inspect-routing", tmp_path / "b.png", "--html", tmp_path / "r.html")
    assert report.exit_code == 0, report.output
    assert "its adapter is untrained" in (tmp_path / "r.html").read_text()


def test_routes_of_another_run_are_taken_over(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    common = ("-m", base_folders("klein"), "--size", "64", "--steps", "2", "-s", "5", "-q")
    assert mos("generate", PROMPT, *common, "-o", tmp_path / "a.png", "--route", "fox=2 slots 1").exit_code == 0
    taken = ("--route-from", tmp_path / "a.png")
    followed = mos("generate", "a fox", *common, "-o", tmp_path / "b.png", *taken)
    assert followed.exit_code == 0, followed.output
    recording = load_recording(tmp_path / "b.png")
    assert recording.routes is not None
    routes = recording.routes["positive"]
    assert routes.slots_SJTK is not None
    kept = set(zip(routes.ids_SJTK[0, 0, 1].tolist(), routes.slots_SJTK[0, 0, 1].tolist(), strict=True))
    assert kept == {(9, 0), (2, 1), (27, 2)}
    assert mos("replay", tmp_path / "b.png", "--verify", *taken).exit_code == 0


def test_several_prompts_and_presets(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na dog\n")
    (tmp_path / "mine.toml").write_text("[generate]\nsteps = 1\nsize = '64'\n")
    drawn = mos(
        *("generate", f"@{tmp_path / 'prompts.txt'}", "-m", base_folders("prx"), "-p", tmp_path / "mine.toml"),
        *("-n", "2", "-s", "1", "-q", "-o", tmp_path / "out"),
    )
    assert drawn.exit_code == 0, drawn.output
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    auto = mos("generate", "a fox", "-m", base_folders("prx"), "-p", "auto", "--size", 64, "--steps", 1, "--dry-run")
    assert auto.exit_code == 0, auto.output


@pytest.mark.slow
def test_bench_measures_a_base_model(mos: Mos, base_folders: Folders) -> None:
    measured = mos("bench", "-m", base_folders("prx"), "--size", "64", "--steps", "2", "--rounds", "1", "--json")
    assert measured.exit_code == 0, measured.output
    row = json.loads(measured.output.strip().splitlines()[-1])
    assert row["step_seconds"] > 0
    assert row["decode_seconds"] > 0


def test_the_python_interface_draws_and_edits(base_folders: Folders) -> None:
    import mos_cli
    from tests.helpers.adapted import random_picture

    model = mos_cli.load(base_folders("klein"), device="cpu", precision="fp32")
    drawing = model.generate(PROMPT, seed=5, steps=1, size=(64, 64), routes=["fox=10"])
    edited = model.edit(drawing, "make it snow", references=[random_picture(1).image], steps=1, max_pixels=64 * 64)
    assert edited.record.earlier[0].sha256 == drawing.record.sha256


def test_the_python_interface_fits_a_base_model_to_the_memory(
    base_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mos_cli

    refused: list[dict[str, Any]] = [{"max_vram": 8}, {"offload": "understanding"}]
    for given in refused:
        with pytest.raises(UsageError, match="needs a GPU"):
            mos_cli.load(base_folders("klein"), device="cpu", **given)
    with pytest.raises(InputError, match=r"no\.safetensors"):
        mos_cli.load(base_folders("klein"), device="cpu", loras="no.safetensors")
    monkeypatch.setattr("mos_cli.inference.requests.available_memory", lambda _device: 0.5)
    with pytest.raises(MemoryLimitError, match="nothing fits"):
        mos_cli.load(base_folders("klein"), device="cpu", max_vram="auto")


def test_a_dry_run_says_that_prompts_are_not_checked(mos: Mos, base_folders: Folders) -> None:
    result = mos("generate", PROMPT, "-m", base_folders("prx"), "--size", "64", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "the prompts are not checked" in result.stderr
