"""Starting `mos` loads no heavy library."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "diffusers", "huggingface_hub", "bitsandbytes", "xformers", "accelerate")
EVERY_HELP = """
import sys
import typer.main
from typer.testing import CliRunner
from mos_cli.cli.app import app

def commands(command, *path):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, *path, name)

for path in commands(typer.main.get_command(app)):
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0 and "--help" in result.output, path
    print(" ".join(path), [name for name in sys.argv[1:] if name in sys.modules], sep=": ")
"""


def test_help_loads_no_heavy_library() -> None:
    """That of `mos` first, then that of every command, in one process."""

    def loaded(*libraries: str) -> list[str]:
        run = [sys.executable, "-c", EVERY_HELP, *libraries]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()

    lines = loaded(*HEAVY)
    assert {"generate: []", "models quantize: []", "inspect-routing: []"} <= set(lines)
    assert [line for line in lines if not line.endswith(": []")] == []
    assert loaded("numpy", "PIL", "pydantic")[0] == ": []"
