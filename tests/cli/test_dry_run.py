"""`--dry-run` refuses what the run refuses, as far as that can be known without weights."""

import pytest

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
        assert "would" not in dry.stdout


def test_of_several_prompts_those_that_would_fail_are_named(mos, bundle, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{LONG}\na dog\n")
    assert mos("generate", PROMPT, "-o", tmp_path / "in.png").exit_code == 0
    line = ["generate", f"@{tmp_path / 'prompts.txt'}", "-s", 1, "-o", f"{tmp_path / 'out'}/"]
    dry, run = mos(*line, "--dry-run"), mos(*line)
    assert dry.exit_code == run.exit_code == 7
    assert dry.stderr == run.stderr
    assert dry.stdout.count("(seed 1:") == 2


def test_what_can_be_drawn_passes(mos, editor, tmp_path) -> None:
    assert mos("generate", PROMPT, "-o", tmp_path / "in.png").exit_code == 0
    for rules in (["*=1"], ["apple+=1@1"], ["[CLS]=1"], ['"red apple"=1']):
        options = [part for rule in rules for part in ("--route", rule)]
        dry = mos("generate", PROMPT, *options, "--dry-run", "-o", tmp_path / "a.png")
        assert (dry.exit_code, dry.stderr) == (0, ""), dry.stderr
    dry = mos("edit", tmp_path / "in.png", PROMPT, "--route", '"picture 1"=1', "--dry-run", "-o", tmp_path / "a.png")
    assert dry.exit_code == 0, dry.stderr
