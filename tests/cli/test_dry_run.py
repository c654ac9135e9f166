"""`--dry-run` refuses what the run refuses, as far as that can be known without weights."""

import pytest

from tests.helpers.printed import errors
from tests.helpers.terminals import in_terminal

PROMPT = "a red apple"
LONG = "apple " * 40
REFUSED = {
    "too long": [LONG],
    "negative too long": [PROMPT, "--negative", LONG],
    "no such word": [PROMPT, "--route", "zebra=1"],
    "no such occurrence": [PROMPT, "--route", "apple#2=1"],
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_prompts_and_words_of_rules_are_checked_as_the_run_does(mos, editor, tmp_path, options) -> None:
    first = mos("generate", PROMPT, "--dry-run", "-o", tmp_path / "a.png")
    assert first.exit_code == 0
    assert "the prompts are not checked" in first.stderr, "before the language model is there"
    assert mos("generate", PROMPT, "-o", tmp_path / "in.png").exit_code == 0
    for command in (["generate"], ["edit", tmp_path / "in.png"]):
        run, dry = (mos(*command, *options, "-o", tmp_path / "a.png", *more) for more in ([], ["--dry-run"]))
        assert run.exit_code in (2, 3), run.output
        assert (dry.exit_code, dry.stderr) == (run.exit_code, run.stderr)
        assert dry.stdout == ""


def test_of_several_prompts_those_that_would_fail_are_named(mos, bundle, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{LONG}\na dog\n")
    assert mos("generate", PROMPT, "-o", tmp_path / "in.png").exit_code == 0
    line = ["generate", f"@{tmp_path / 'prompts.txt'}", "-s", 1, "-o", f"{tmp_path / 'out'}/"]
    dry, run = mos(*line, "--dry-run"), mos(*line)
    assert dry.exit_code == run.exit_code == 7
    assert [line for line in errors(dry) if "error" in line] == errors(run)
    assert dry.stdout == run.stdout


def test_what_can_be_drawn_passes(mos, editor, tmp_path) -> None:
    assert mos("generate", PROMPT, "-o", tmp_path / "in.png").exit_code == 0
    for rules in (["*=1"], ["apple+=1@1"], ["[CLS]=1"], ['"red apple"=1']):
        options = [part for rule in rules for part in ("--route", rule)]
        dry = mos("generate", PROMPT, *options, "--dry-run", "-o", tmp_path / "a.png")
        assert dry.exit_code == 0, dry.stderr
    dry = mos("edit", tmp_path / "in.png", PROMPT, "--route", '"picture 1"=1', "--dry-run", "-o", tmp_path / "a.png")
    assert dry.exit_code == 0, dry.stderr


def test_a_terminal_has_the_settings_and_the_pictures(bundle, tmp_path) -> None:
    shown = in_terminal(["generate", PROMPT, "--dry-run", "-n", 2, "-s", 7, "-o", f"{tmp_path}/here/"])
    lines = shown.text.splitlines()
    assert {"steps          3", "size           32x32", "attention      auto"} <= set(lines)
    assert lines[-2:] == [
        f"{tmp_path}/here/0002_a-red-apple_s8.png  (seed 8: a red apple)",
        "2 pictures would be drawn",
    ]


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_a_pipe_has_the_paths_alone_as_those_of_the_run(mos, bundle, tmp_path, options) -> None:
    line = ["generate", PROMPT, "-n", 2, "-s", 7, "-o", f"{tmp_path}/{{seed}}.png", *options]
    dry, run = mos(*line, "--dry-run"), mos(*line)
    assert dry.stdout == run.stdout == f"{tmp_path}/7.png\n{tmp_path}/8.png\n"
    again = mos(*line, "--dry-run", "--skip-existing")
    assert (again.exit_code, again.stdout) == (0, "")
    assert ("steps          3" in dry.stderr) == (options == []) == (f"{tmp_path}/7.png  is there" in again.stderr)
    assert options == [] or dry.stderr == again.stderr == ""
