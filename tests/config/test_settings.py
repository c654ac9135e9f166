"""Settings: where they come from, which one wins, and what a wrong one is told."""

import json
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image
from typer.models import OptionInfo

from mos_cli.cli.edit import edit
from mos_cli.cli.generate import generate
from mos_cli.config.settings import Settings, UserSettings, list_presets, resolve
from tests.helpers.printed import errors

PROMPT = "a red apple"


def test_every_preset_can_be_used(cache: Path) -> None:
    cards = ["gpu-12gb", "gpu-16gb", "gpu-24gb", "gpu-8gb"]
    assert [preset.name for preset in list_presets()] == ["auto", "cpu", "faithful", "fast", *cards, "quality"]
    for preset in list_presets():
        assert preset.description
        asked = preset.settings.model_dump(exclude_none=True)
        assert asked.items() <= resolve(Settings(), preset.name).model_dump().items()


def test_settings_rank_flag_environment_preset_config(mos, bundle, tmp_path, monkeypatch) -> None:
    def steps(*options: object) -> int:
        result = mos("generate", PROMPT, "--dry-run", "--json", *options)
        return json.loads(result.stdout.splitlines()[-1])["recipe"]["steps"]

    assert steps() == 3
    (tmp_path / "config.toml").write_text("[generate]\nsteps = 5\n")
    assert steps() == 5
    assert steps("--preset", "fast") == 6
    monkeypatch.setenv("MOS_STEPS", "7")
    assert steps("--preset", "fast") == 7
    assert steps("--preset", "fast", "--steps", 9) == 9


def test_a_config_file_that_is_named_has_to_be_there(mos, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOS_CONFIG", str(tmp_path / "none.toml"))
    result = mos("generate", PROMPT, "--dry-run")
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert "none.toml" in line
    monkeypatch.delenv("MOS_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nowhere"))
    assert mos("generate", PROMPT, "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("feature_cache = 2", "stand under [generate]"),
        ("", "stand under [generate]"),
        ("steps = 2\n[generate]", "stand under [generate]"),
        (
            "[generate]\nfeature_cach = 2",
            "feature_cach: unknown setting, did you mean feature_cache? (there are: model, seed,",
        ),
    ],
)
def test_a_config_file_that_is_wrong_says_where_settings_stand(mos, bundle, tmp_path, text: str, words: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    result = mos("generate", PROMPT, "--dry-run")
    assert result.exit_code == 2
    (line,) = errors(result)
    assert words in line
    assert "config.toml" in line


def test_what_has_a_variable_can_stand_in_the_config_file() -> None:
    options = [
        info
        for command in (generate, edit)
        for parameter in signature(command, eval_str=True).parameters.values()
        for info in get_args(parameter.annotation)
        if isinstance(info, OptionInfo) and info.envvar
    ]
    assert len(options) > 30
    assert {str(option.envvar).removeprefix("MOS_").lower() for option in options} <= UserSettings.model_fields.keys()


def test_seed_preset_and_image_guidance_of_a_config_file(mos, editor, tmp_path) -> None:
    (tmp_path / "config.toml").write_text('[generate]\nseed = 5\npreset = "fast"\nimage_cfg = 2.5\n')
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    recipe = json.loads(mos("edit", tmp_path / "a.png", "red", "--dry-run", "--json").stdout.splitlines()[-1])["recipe"]
    assert (recipe["seed"], recipe["steps"], recipe["edit"]["image_cfg"]) == (5, 6, 2.5)
    given = ("--seed", 6, "-p", "quality", "--image-cfg", 1.5)
    recipe = json.loads(mos("edit", tmp_path / "a.png", "red", "--dry-run", "--json", *given).stdout.splitlines()[-1])[
        "recipe"
    ]
    assert (recipe["seed"], recipe["steps"], recipe["edit"]["image_cfg"]) == (6, 24, 1.5)


def test_a_preset_of_the_users_own(mos, bundle, tmp_path) -> None:
    (tmp_path / "mine.toml").write_text('description = "mine"\n[generate]\nsteps = 9\n', encoding="utf-8-sig")
    result = mos("generate", PROMPT, "--dry-run", "--json", "-p", tmp_path / "mine.toml")
    assert json.loads(result.stdout.splitlines()[-1])["recipe"]["steps"] == 9
    assert mos("presets", "show", tmp_path / "mine.toml").stdout.splitlines() == ["mine", "  steps = 9"]


def test_the_size_of_a_file_may_be_a_number_as_the_others_are(mos, editor, tmp_path) -> None:
    def sizes(*arguments: object) -> list[tuple[int, int]]:
        events = [json.loads(line) for line in mos(*arguments, "--dry-run", "--json").stdout.splitlines()]
        return [(event["recipe"]["width"], event["recipe"]["height"]) for event in events if "recipe" in event]

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "config.toml").write_text("[generate]\nsize = 48\n")
    assert sizes("generate", PROMPT) == [(48, 48)]
    jobs = [{"size": 40}, {"size": "64x32"}, {"size": 64, "picture": str(tmp_path / "a.png")}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps({"prompt": PROMPT, **job}) + "\n" for job in jobs))
    assert sizes("run", tmp_path / "jobs.jsonl") == [(40, 40), (64, 32), (64, 64)]
    (tmp_path / "config.toml").write_text("[generate]\nsize = 48.5\n")
    assert "size '48.5' is not understood: write 256" in mos("generate", PROMPT).stderr


def test_a_limit_for_gpus_is_refused_on_a_cpu_wherever_it_comes_from(mos, bundle, tmp_path, monkeypatch) -> None:
    def refused(*options: str) -> None:
        drawn = ("generate", PROMPT, "--device", "cpu", "-o", tmp_path / "a.png", "--overwrite", *options)
        result = mos(*drawn)
        assert result.exit_code == 2, result.output
        (line,) = errors(result)
        assert "MOS_MAX_VRAM, a preset or the config file) needs a GPU" in line
        # The way out that is named leads out, from each of them.
        taken = mos(*drawn, "--max-vram", "auto")
        assert taken.exit_code == 0, taken.output

    refused("-p", "gpu-12gb")
    (tmp_path / "config.toml").write_text("[generate]\nmax_vram = 12.0\n")
    refused()
    (tmp_path / "config.toml").write_text("[generate]\n")
    monkeypatch.setenv("MOS_MAX_VRAM", "12")
    refused()
