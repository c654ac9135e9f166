"""The time for inspecting a large trace: 28 steps x 512 tokens x 40 blocks, top 2 of 33 layers, random numbers.

Prints the size of the files per guidance branch, and the seconds to open, sum up, print and export the trace. The
limits are 4 MB per branch, and one second for the whole of `mos inspect-routing`, which is single-threaded: on an idle
machine its wall time is that of the processor.

python benchmarks/inspecting.py [RUNS]
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from mos_cli.config.recipe import Provenance, make_recipe
from mos_cli.routing.export import export_decisions
from mos_cli.routing.section import cut, cut_all
from mos_cli.routing.trace import Routes, Trace, TraceToken, load_recording, make_branch, trace_files
from mos_cli.routing.views.terminal import RoutesView
from mos_cli.utils.files import write_all

STEPS, TOKENS, BLOCKS, LAYERS, TOP_K = 28, 512, 40, 33, 2
MOST_BYTES, MOST_SECONDS = 4e6, 1.0
MOS = [sys.executable, "-c", "from mos_cli.__main__ import main; main()"]


def random_routes(seed: int) -> Routes:
    """Decisions of random logits: the layers kept differ, their weights sum to 1."""
    logits = np.random.default_rng(seed).normal(size=(STEPS, BLOCKS, TOKENS, LAYERS)).astype(np.float32)
    ids = logits.argpartition(-TOP_K, axis=-1)[..., -TOP_K:]
    weights = np.exp(np.take_along_axis(logits, ids, axis=-1))
    return Routes(ids.astype(np.uint8), (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float16))


def write_trace(path: Path) -> None:
    """A trace of both branches, each with a prompt of one token a word."""
    prompt = " ".join(f"word{number}" for number in range(TOKENS))
    starts = np.cumsum([0, *(len(word) + 1 for word in prompt.split())])
    tokens = [
        TraceToken(text=w, start=s, end=s + len(w)) for w, s in zip(prompt.split(), starts.tolist(), strict=False)
    ]
    routes = {name: random_routes(seed) for seed, name in enumerate(("positive", "negative"))}
    fields = {"model": "random", "seed": 0, "cfg": 4, "cfg_interval": "0,1", "width": 1024, "height": 1024}
    versions = dict.fromkeys(("bundle_hash", "mos", "torch", "diffusers", "transformers", "device", "attention"), "")
    trace = Trace(
        schema="mos-trace/2",
        picture="0" * 64,
        recipe=make_recipe(prompt=prompt, steps=STEPS, precision="bf16", **fields),
        made=Provenance(**versions),
        layers=("embeddings", *(f"layer {number}" for number in range(1, LAYERS))),
        blocks=BLOCKS,
        top_k=TOP_K,
        times=tuple(1 - step / STEPS for step in range(STEPS)),
        branches={name: make_branch(prompt, tokens, range(STEPS), held, LAYERS) for name, held in routes.items()},
    )
    write_all(trace_files(trace, routes, path))


def seconds(action: Callable[[], object], runs: int) -> tuple[float, float]:
    """Medians of the wall time and of the processor's, children included, after one warm-up."""
    times = []
    for _ in range(runs + 1):
        before, started = os.times(), time.perf_counter()
        action()
        times.append((time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])))
    wall, processor = zip(*times[1:], strict=True)
    return statistics.median(wall), statistics.median(processor)


def verdict(holds: bool) -> str:
    return "within the limit" if holds else "BEYOND THE LIMIT"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        write_trace(path)
        recording = load_recording(path)
        assert recording.trace.arrays is not None
        size = sum(file.stat().st_size for file in (path, path.with_name(recording.trace.arrays.file)))
        per_branch = size / len(recording.trace.branches)
        print(f"files: {per_branch / 1e6:.2f} MB per branch, {verdict(per_branch <= MOST_BYTES)} of 4 MB\n")

        section = cut(recording, "positive")
        sections = [(section, section.words) for section in cut_all(recording, "positive")]
        measured = {
            "open and check": lambda: load_recording(path),
            "sum up a range of steps and blocks": lambda: cut(recording, "positive", "4:20", "3:30"),
            "print the tables": lambda: Console(file=io.StringIO(), width=80).print(RoutesView(section)),
            "export both branches as parquet": lambda: export_decisions(sections, path.with_suffix(".parquet"), True),
            "export both branches as csv": lambda: export_decisions(sections, path.with_suffix(".csv"), True),
        }
        print("| what | seconds | of processor |\n| --- | --- | --- |")
        for what, action in measured.items():
            print("| {} | {:.2f} | {:.2f} |".format(what, *seconds(action, runs)))
        inspect = [*MOS, "inspect-routing", str(path)]
        wall, processor = seconds(lambda: subprocess.run(inspect, capture_output=True, check=True), runs)
        print(f"| `mos inspect-routing`, shell to end | {wall:.2f} | {processor:.2f} |")
        print(f"\n`mos inspect-routing` of an idle machine: {verdict(processor <= MOST_SECONDS)} of one second")


if __name__ == "__main__":
    main()
