"""Many pictures in one run, as a user types it: alternatives, folders of pictures, job files, matrices."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mos_cli.images.outputs import read_drawing

PROMPT = "a red apple"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two pictures, and other files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in {"one.png": "orange", "two.jpg": "navy"}.items():
        Image.new("RGB", (32, 32), colour).save(folder / name)
    (folder / "notes.txt").write_text("nothing")
    Image.new("RGB", (8, 8)).save(folder / "one.steps.webp")
    Image.new("RGB", (8, 8)).save(folder / ".hidden.png")
    return folder


def jobs_file(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def names(folder: Path, suffix: str = ".png") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == suffix)


def test_the_choices_of_a_prompt_are_in_the_recipe_and_a_replay_makes_none(mos, bundle, tmp_path) -> None:
    text = "a {red|green} {apple|dog|cat}"
    assert mos("generate", text, "-n", 6, "-s", 1, "--trace", "off", "-o", tmp_path / "{seed}.png").exit_code == 0
    recipes = [read_drawing(tmp_path / f"{seed}.png")[1].recipe for seed in range(1, 7)]
    assert len({recipe.prompt for recipe in recipes}) > 1
    for recipe in recipes:
        assert recipe.template is not None
        assert recipe.template.text == text
        assert recipe.prompt == "a {} {}".format(*recipe.template.choices)
    alone = mos("generate", text, "-s", 4, "--trace", "off", "-o", tmp_path / "alone.png")
    assert alone.exit_code == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "4.png").read_bytes()
    assert mos("replay", tmp_path / "4.png", "--verify").stdout == "exact\n"
    assert mos("replay", tmp_path / "4.png", "--set", "seed=9", "-o", tmp_path / "nine.png").exit_code == 0
    assert read_drawing(tmp_path / "nine.png")[1].recipe.prompt == recipes[3].prompt
    assert mos("replay", tmp_path / "4.png", "--set", "prompt=a dog", "-o", tmp_path / "dog.png").exit_code == 0
    assert read_drawing(tmp_path / "dog.png")[1].recipe.template is None


def test_a_folder_a_list_and_several_files_are_edited(mos, editor, photos, tmp_path) -> None:
    (tmp_path / "list.txt").write_text(f"# the second\n{photos / 'two.jpg'}\n")
    out = tmp_path / "out"
    options = ["--steps", 1, "--trace", "off", "-s", 1]
    made = mos("edit", photos, PROMPT, *options, "-o", f"{out}/{{source}}.png")
    assert made.exit_code == 0, made.stderr
    assert names(out) == ["one.png", "two.png"]
    one = mos("edit", photos / "one.png", PROMPT, *options, "-o", tmp_path / "alone.png")
    assert one.exit_code == 0
    assert (tmp_path / "alone.png").read_bytes() == (out / "one.png").read_bytes()
    listed = mos("edit", photos / "one.png", f"@{tmp_path / 'list.txt'}", PROMPT, *options, "-o", f"{out}/")
    assert listed.exit_code == 0, listed.stderr
    assert len(listed.stdout.splitlines()) == 2
    recipe = read_drawing(Path(listed.stdout.splitlines()[1]))[1].recipe
    assert recipe.edit == read_drawing(out / "two.png")[1].recipe.edit


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(mos, editor, photos, tmp_path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    result = mos("edit", photos, PROMPT, "--steps", 1, "-o", f"{tmp_path}/out/{{source}}.png")
    assert result.exit_code == 7
    assert [line for line in result.stderr.splitlines() if "error" in line] == [
        line for line in result.stderr.splitlines() if "broken.png" in line or "1 of 3 pictures failed" in line
    ]
    assert names(tmp_path / "out") == ["one.png", "two.png"]
    alone = mos("edit", photos / "broken.png", PROMPT, "-o", tmp_path / "a.png")
    assert (alone.exit_code, len(alone.stderr.splitlines())) == (3, 1)


MISTAKES = {
    "no instruction": (["edit", "{photos}/one.png", "{photos}/two.jpg", "{photos}/one.png"], 2, "the last argument"),
    "instruction before the picture": (["edit", "make it red", "{photos}/one.png"], 2, "the last argument"),
    "instruction without quotes": (["edit", "{photos}/one.png", "make", "it", "red"], 3, "in quotes"),
    "folder without pictures": (["edit", "{tmp}/empty", PROMPT], 3, "has no pictures"),
    "source of a drawing": (["generate", PROMPT, "-o", "{tmp}/{source}.png"], 2, "{source}"),
    "vary nothing": (["generate", PROMPT, "--vary", "cfg"], 2, "NAME=VALUE"),
    "vary the model": (["generate", PROMPT, "--vary", "model=a,b"], 2, "one of seed, steps"),
    "vary out of range": (["generate", PROMPT, "--vary", "steps=0,3"], 2, "--vary steps: "),
    "vary twice": (["generate", PROMPT, "--vary", "cfg=2", "--vary", "cfg=3"], 2, "once"),
    "vary an edit's": (["generate", PROMPT, "--vary", "strength=0.5"], 2, "edits"),
    "brace": (["generate", "a {red apple"], 2, "not closed"),
    "word file": (["generate", "a __nothing__"], 2, "nothing.txt"),
    "no jobs": (["run", "{tmp}/config.toml"], 3, "has no jobs"),
    "empty jobs": (["run", "{tmp}/none.jsonl"], 3, "has no jobs"),
    "jobs that are not there": (["run", "{tmp}/nowhere.jsonl"], 3, "nowhere.jsonl"),
    "resume nothing": (["generate", PROMPT, "--resume"], 2, "--manifest"),
    "names that are always new": (["generate", PROMPT, "--skip-existing"], 2, "{number}"),
    "a manifest that is none": (["generate", PROMPT, "--manifest", "{tmp}/notes", "--resume"], 3, "no manifest"),
    "a manifest that is there": (["generate", PROMPT, "--manifest", "{tmp}/notes"], 3, "--resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mos, editor, photos, tmp_path, monkeypatch, mistake: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("# nothing\n")
    (tmp_path / "notes").write_text("the user's")
    monkeypatch.chdir(tmp_path / "empty")
    arguments, code, words = MISTAKES[mistake]
    result = mos(*(str(part).replace("{tmp}", str(tmp_path)).replace("{photos}", str(photos)) for part in arguments))
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.stderr
    assert words in result.stderr
    assert (tmp_path / "notes").read_text() == "the user's"
    assert list((tmp_path / "empty").iterdir()) == []


ONE_NAME = {
    "seeds": (["generate", PROMPT, "-n", "2", "-o", "a.png"], "{seed} or {number}"),
    "values of a setting": (["generate", PROMPT, "-n", "2", "-o", "{seed}.png", "--vary", "steps=4,8"], "{number}"),
    "prompts": (["generate", "-", "-s", "1", "-o", "a.png"], "{prompt} or {number}"),
    "edited pictures": (["edit", "{photos}", PROMPT, "-s", "1", "-o", "a.png"], "{source} or {number}"),
    "strengths": (["edit", "{photos}", PROMPT, "-o", "{source}_{seed}.png", "--vary", "strength=0.3,0.6"], "{number}"),
}


@pytest.mark.parametrize("case", ONE_NAME)
def test_several_pictures_of_one_name_are_told_what_would_tell_them_apart(mos, editor, photos, case: str) -> None:
    arguments, fields = ONE_NAME[case]
    result = mos(*(part.replace("{photos}", str(photos)) for part in arguments), input="a dog\na cat\n")
    assert result.exit_code == 2
    assert result.stderr.endswith(f".png: add {fields} to the name\n"), result.stderr


def test_jobs_have_their_own_options_over_those_of_the_run(mos, editor, photos, tmp_path) -> None:
    path = jobs_file(
        tmp_path,
        "# two drawings and an edit\n\n",
        {"prompt": PROMPT, "seed": 5, "output": str(tmp_path / "apple.png")},
        {"prompt": "a dog", "steps": 2, "cfg_interval": [0.1, 0.9], "count": 2},
        {"prompt": "a cat", "picture": str(photos / "one.png"), "strength": 0.5, "output": str(tmp_path / "cat.png")},
    )
    result = mos("run", path, "--steps", 1, "-s", 1, "-o", f"{tmp_path}/out/")
    assert result.exit_code == 0, result.stderr
    recipes = [read_drawing(Path(line))[1].recipe for line in result.stdout.splitlines()]
    assert [(recipe.prompt, recipe.seed, recipe.steps) for recipe in recipes] == [
        (PROMPT, 5, 1),
        ("a dog", 1, 2),
        ("a dog", 2, 2),
        ("a cat", 1, 1),
    ]
    assert recipes[3].edit is not None
    assert recipes[3].edit.strength == 0.5
    alone = mos("generate", PROMPT, "--steps", 1, "-s", 5, "-o", tmp_path / "alone.png")
    assert alone.exit_code == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "apple.png").read_bytes()


def test_a_wrong_job_gets_one_line_and_the_others_are_drawn(mos, editor, photos, tmp_path) -> None:
    path = jobs_file(
        tmp_path,
        {"prompt": PROMPT},
        "{nothing\n",
        {"prompt": PROMPT, "sped": 3},
        {"prompt": PROMPT, "model": "tiny"},
        {"prompt": PROMPT, "steps": 0},
        {"prompt": PROMPT, "size": "100000"},
        {"prompt": " "},
        {"prompt": PROMPT, "mask": "m.png"},
        {"prompt": "{a", "seed": 1},
        {"prompt": PROMPT, "picture": "nowhere.png"},
        {"prompt": PROMPT, "cfg": 1, "negative": "x"},
        {"prompt": "a dog", "output": "{sead}.png"},
        [1],
        {"prompt": "a dog"},
    )
    for more in (["--dry-run"], []):
        result = mos("run", path, "--steps", 1, "-s", 1, "-o", f"{tmp_path}/out/", *more)
        assert result.exit_code == 7
        lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert [line.split(" line ")[1].split(":")[0] for line in lines[:-1]] == [str(n) for n in range(2, 14)]
        assert lines[0] == f"error: {path} line 2: it is no JSON (key must be a string at column 2)"
        assert lines[5].endswith(" line 7: prompt: it is empty")
        assert "12 of 14 pictures failed" in lines[-1]
    assert names(tmp_path / "out") == ["0001_a-red-apple_s1.png", "0002_a-dog_s1.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\n\x00\n\xff\n",
        json.dumps([{"prompt": PROMPT}], indent=1).encode(),
        b'[{"prompt": "a dog"}]',
        b"a dog\na cat\n",
    ],
    ids=["a picture", "an array", "an array in a line", "prompts"],
)
def test_a_file_without_jobs_gets_one_line(mos, bundle, tmp_path, content: bytes) -> None:
    (tmp_path / "jobs.json").write_bytes(content)
    result = mos("run", tmp_path / "jobs.json")
    assert (result.exit_code, len(result.stderr.splitlines())) == (3, 1)
    assert 'has no jobs: write a line for each, such as {"prompt": "a red apple"}' in result.stderr


def test_jobs_come_from_stdin(mos, bundle, tmp_path) -> None:
    result = mos("run", "-", "-o", f"{tmp_path}/out/", "-s", 1, input=json.dumps({"prompt": PROMPT}))
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path / "out") == ["0001_a-red-apple_s1.png"]


def test_a_matrix_is_drawn_and_shown_with_axes(mos, bundle, tmp_path) -> None:
    matrix = ["--vary", "cfg=2,4,8", "--vary", "steps=1,2"]
    dry = mos("generate", PROMPT, "-s", 3, *matrix, "--dry-run", "-o", f"{tmp_path}/out/")
    assert dry.stderr.splitlines()[-1] == "6 pictures would be drawn"
    assert not any(line.startswith(("cfg ", "steps ")) for line in dry.stderr.splitlines()), "they are not shared"
    result = mos("generate", PROMPT, "-s", 3, *matrix, "-o", f"{tmp_path}/out/", "--sheet", tmp_path / "grid.png")
    assert result.exit_code == 0, result.stderr
    files = [Path(line) for line in result.stdout.splitlines()]
    recipes = [read_drawing(file)[1].recipe for file in files]
    assert [(recipe.cfg, recipe.steps) for recipe in recipes] == [(c, s) for c in (2, 4, 8) for s in (1, 2)]
    assert {recipe.seed for recipe in recipes} == {3}
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    left, top = grid.shape[1] - 3 * 136, grid.shape[0] - 2 * 136
    assert left < 68, "labels take the room that they need"
    for index, file in enumerate(files):
        column, row = divmod(index, 2)
        x, y = left + 136 * column, top + 136 * row
        shown = np.asarray(Image.open(file).resize((128, 128), Image.Resampling.BICUBIC))
        assert np.array_equal(grid[y : y + 128, x : x + 128], shown), file
    assert (grid[:12] < 100).any(), "the prompt above all"
    assert (grid[20:top, left:] < 100).any(), "labels above"
    assert (grid[top:, : left - 8] < 100).any(), "labels beside"


def test_a_matrix_of_several_prompts_and_pictures_has_a_row_for_each(mos, editor, photos, tmp_path) -> None:
    line = [
        "edit",
        photos,
        "-",
        "-s",
        1,
        "--vary",
        "steps=1,2",
        "-o",
        f"{tmp_path}/out/",
        "--sheet",
        tmp_path / "a.png",
    ]
    assert mos(*line, input="red\nblue\n").exit_code == 0
    assert Image.open(tmp_path / "a.png").height == 44 + 4 * 136
    assert mos(*line[:2], "red", *line[3:-1], tmp_path / "b.png").exit_code == 0
    assert Image.open(tmp_path / "b.png").height == 12 + 44 + 2 * 136


def test_a_folder_is_edited_without_its_sheets(mos, editor, tmp_path) -> None:
    options = ["--steps", 1, "--trace", "off", "-o", f"{tmp_path}/out/"]
    drawn = mos("generate", PROMPT, "-n", 2, *options, "--sheet", f"{tmp_path}/out/sheet.png")
    assert drawn.exit_code == 0
    edited = mos("edit", f"{tmp_path}/out", "red", *options, "--dry-run", "-q")
    assert len(edited.stdout.splitlines()) == 2
    named = mos("edit", f"{tmp_path}/out/sheet.png", "red", *options, "--dry-run", "-q")
    assert len(named.stdout.splitlines()) == 1, "one that is named is a picture as any"
