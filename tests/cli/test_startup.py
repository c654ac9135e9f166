"""Starting `mos` loads no heavy library."""

import subprocess
import sys


def test_help_and_looking_at_traces_need_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "diffusers", "huggingface_hub", "bitsandbytes", "xformers", "accelerate"]
    script = (
        "import sys; from mos_cli.cli import app; "
        f"print([m for m in {heavy} + ['numpy', 'pydantic', 'PIL'] if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
