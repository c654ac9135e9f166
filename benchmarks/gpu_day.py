"""What a short rental of a GPU is used for, in order of worth, each part within a time limit of its own.

python benchmarks/gpu_day.py OUT [--minutes 15] [--model MODEL] [--recipe train-emoji] [--parts A,B] [--tiny]

tests          the tests marked `cuda`
command line   a picture with every attention, precision, quantisation and offload; edits; each replayed with --verify
bench          `mos bench`
performance    the parts of performance.py, and its caps one by one
host           training.py: what the processors do for a batch
throughput     training.py: images/s of the recipe beside those of a repeated batch
train          `mos train --time` for what is left, in OUT/run: a run that ends with its learning rates

docs/gpu-day.md says how to go on where the machine has no network, with a training beside the other parts.

Each part writes what it prints to OUT/<part>.txt while it runs. OUT/results.json is replaced after every part: its
command, seconds, exit code ("timeout" if it was ended), and the JSON that it printed. A part that fails or is ended
does not stop the others. `--tiny` runs the same commands with small networks on any machine, which shows that they
work.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a cat and a dog"
WAYS: dict[str, list[str]] = {
    "plain": [],
    "sdpa": ["--attention", "sdpa"],
    "xformers": ["--attention", "xformers"],
    "nf4": ["--quant", "nf4"],
    "int8": ["--quant", "int8"],
    "offload-blocks": ["--offload", "blocks"],
    "offload-towers": ["--offload", "towers"],
    "rule": ["--route", "cat=2,3"],
    "full-trace": ["--trace", "full", "--regions"],
    "feature-cache": ["--feature-cache", "2"],
    "auto": ["-p", "auto"],
}
"""Ways to draw the same picture."""
CUDA_ONLY = {"xformers", "offload-blocks", "offload-towers"}
PERFORMANCE = ("share", "router", "nf4", "attention", "sync", "graphs", "batched_guidance", "compile", "rivals")
STOPS = 20.0
"""Seconds that a part gets after SIGINT to save what it has."""
BESIDE = 90.0
"""Seconds of a training that are not in its --time: loading before, the last state and the bundle after."""


@dataclass
class Part:
    """A command with its time limit in seconds, and what came of it.

    With `takes_time` the command gets what is left as its --time.
    """

    name: str
    command: list[str]
    limit: float
    takes_time: bool = False
    seconds: float = 0.0
    exit_code: int | str = "not run"
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, folder: Path, left: float) -> None:
        """Runs the command for at most `limit` and `left` seconds; its output goes to a file as it comes."""
        path, began = folder / f"{self.name}.txt", time.monotonic()
        if self.takes_time:
            self.command = [*self.command, "--time", f"{max(1.0, min(self.limit, left) - BESIDE):.0f}s"]
        with path.open("wb") as output:
            process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
            try:
                self.exit_code = process.wait(min(self.limit, left))
            except subprocess.TimeoutExpired:
                self.exit_code = "timeout"
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOPS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self.seconds = round(time.monotonic() - began, 1)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        self.rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts in order of worth."""
    python, tiny = sys.executable, ["--tiny"] if options.tiny else []
    device = ["--device", "cpu" if options.tiny else "cuda"]
    mos = [python, "-m", "mos_cli"]
    model = ["-m", options.model] if options.model else []
    fast = ["--steps", "2"] if options.tiny else []
    # Other tests import packages that such a machine need not have.
    tests = ["-m", "cuda", "--continue-on-collection-errors", "--rootdir", str(ROOT), str(ROOT / "tests")]
    listed = [Part("tests", [python, "-m", "pytest", *tests], 180)]
    ways = {name: way for name, way in WAYS.items() if not (options.tiny and name in CUDA_ONLY)}
    for name, way in ways.items():
        draw = [*mos, "generate", PROMPT, "--seed", "3", "-o", f"{name}.png", "--overwrite", *way, *model, *fast]
        listed.append(Part(f"draw-{name}", [*draw, *([] if name == "auto" else device), "-v"], 60))
        listed.append(Part(f"verify-{name}", [*mos, "replay", f"{name}.png", "--verify"], 60))
    edit = [*mos, "edit", "plain.png", "make the dog blue", "--seed", "3", "-o", "edit.png", "--overwrite"]
    listed.append(Part("edit", [*edit, *device, *model, *fast], 60))
    listed.append(Part("verify-edit", [*mos, "replay", "edit.png", "--verify"], 60))
    rounds = ["--rounds", "1", "--steps", "2"] if options.tiny else []
    listed.append(Part("bench", [*mos, "bench", "-p", "fast", "-p", "quality", "--json", *device, *model, *rounds], 90))
    performance = [python, str(ROOT / "benchmarks" / "performance.py")]
    listed += [Part(name, [*performance, name, *tiny], 60) for name in PERFORMANCE]
    listed += [Part(f"cap-{gib}", [*performance, "caps", "--gib", str(gib), *tiny], 90) for gib in (8, 12, 16, 24)]
    training = [python, str(ROOT / "benchmarks" / "training.py")]
    listed.append(Part("host", [*training, "host", options.recipe], 40))
    listed.append(Part("throughput", [*training, "throughput", options.recipe], 180))
    listed.append(Part("train", [*mos, "train", options.recipe, "--run", "run"], float("inf"), takes_time=True))
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--model", help="a model other than the default")
    parser.add_argument("--recipe", default="train-emoji", help="what to train (train-emoji)")
    parser.add_argument("--parts", help="the names of some parts, joined by commas; a name covers those it begins")
    parser.add_argument("--tiny", action="store_true", help="small networks, on any machine: does the script work?")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print("error: there is no CUDA device here: --tiny shows that the script works", file=sys.stderr)
        return 6
    end = time.monotonic() + 60 * options.minutes - STOPS
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = tuple((options.parts or "").split(","))
    todo = [part for part in parts(options) if part.name.startswith(chosen)]
    for part in todo:
        left = end - time.monotonic()
        if left > 0:
            part.run(options.out, left)
        print(f"{part.name}: exit code {part.exit_code}, {part.seconds:.1f} s", flush=True)
        results = json.dumps([asdict(each) for each in todo], indent=1)
        (options.out / "results.json").write_text(results.replace("Infinity", "null") + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
