"""Runs every command once where no extra is installed: each works, or ends in one line that names the extra.

A script of its own, so that CI can run it with the Python of an environment that has the wheel and no pytest:
`python tests/helpers/every_command.py`. It works in a temporary folder, with the default model.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from mos_cli.cli.app import app
from mos_cli.config.settings import RunSettings

WORKS = [
    "generate dog -s 1 --steps 2 -o a.png --trace full --regions",
    "generate dog -s 2 --steps 2 -o b.png",
    "edit a.png dog -s 1 --steps 2 -o c.png",
    "show a.png",
    "inspect-routing a.png",
    "inspect-routing a.png --html a.html",
    "replay a.png --verify",
    "logs",
    "gallery .",
    "logs dog -n 1 --json",
    "plan",
    "bench --steps 2 --rounds 1",
    "doctor",
    "routing diff a.json b.json",
    "routing ablate a.png --word dog --only -o ablated.png",
    "models ls",
    "models show {model}",
    "models pull {model}",
    "models verify {model}",
    "models quantize {model} --quant nf4 --out small",
    "loras ls",
    "presets ls",
    "presets show fast",
    "train train-smoke --show",
]
NEEDS = {
    "inspect-routing a.png --export a.csv": "inspect",
    "inspect-routing a.png --plot a.pdf": "inspect",
    "inspect-routing a.png --regions regions.png": "inspect",
    "train train-smoke": "train",
    "train-judge -o judge": "train",
    "train-enlarger -o enlarger": "train",
    "eval": "train",
    "eval --suite edit": "train",
    "data build -o art": "train",
    "models export run": "train",
    "serve": "serve",
    "show a.png --preview": "terminal",
}
REFUSED = {
    "models init mos-s --out NO/fresh": "not a folder",
    "models rm nothing --yes": "nothing",
    "loras rm nothing --yes": "nothing",
    "data show nowhere": "mos data build",
    "data look nowhere": "nowhere is not a folder",
    "run nowhere.jsonl": "nowhere.jsonl",
}
"""What cannot be done here for another reason, and what its one line says: a large model, files that are not there."""


def commands(command: Any, *path: str) -> Iterator[str]:
    """The names of all commands."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path)
        return
    for name, child in children.items():
        yield from commands(child, *path, name)


def main() -> None:
    """Runs all; raises AssertionError at the first that ends otherwise than it should."""
    lines = [*WORKS, *NEEDS, *REFUSED]
    names = commands(typer.main.get_command(app))
    missing = [name for name in names if not any(f"{line} ".startswith(f"{name} ") for line in lines)]
    assert not missing, f"not run: {missing}"
    model = os.environ.get("MOS_MODEL") or RunSettings().model
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("NO").touch()
        for line in dict.fromkeys(lines):
            result = CliRunner().invoke(app, line.format(model=model).split())
            said = result.stderr.strip().splitlines()
            told = f"mos-cli[{NEEDS[line]}]" if line in NEEDS else REFUSED.get(line)
            print(f"mos {line}: {result.exit_code} {said[-1] if told and said else ''}", flush=True)
            if told is None:
                assert result.exit_code == 0, (line, result.output, result.exception)
            else:
                assert isinstance(result.exception, SystemExit), (line, result.exception)
                assert result.exit_code in (2, 3, 4), (line, result.exit_code)
                assert len(said) == 1, (line, said)
                assert told in said[0], (line, said)
        # Windows removes no folder that a process is in.
        os.chdir(Path(folder).parent)


if __name__ == "__main__":
    main()
