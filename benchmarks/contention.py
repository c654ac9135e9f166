"""Seconds of sampling for one default picture beside other work: as it is, with PyTorch's own threads, and with one.

python benchmarks/contention.py [--minutes 4]

Every picture is drawn by a `mos generate` of its own, and the "sampling" that it prints with -v is counted. The kinds
are drawn in turn, so that what else the machine does slows all alike, in as many rounds as the time allows. A run that
takes longer than 20 s is ended, and counts as so long. A busy process counts in Python. The training is `mos
train train-smoke` without these variables; it needs an art file (`mos data build`). Of two `mos` at once the slower
counts. For figures worth keeping nothing else should run: what did run is in the first line.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

HERE = Path(__file__).resolve().parents[1]
MOS = [sys.executable, "-m", "mos_cli"]
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""They would change what is measured, so that the programs do not get them."""

PYTORCH = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""How long waiting threads spin by default: turns of GCC's library, milliseconds of LLVM's and Intel's."""

LONGEST = 20.0
"""Seconds after which a run is ended."""


@dataclass(frozen=True)
class Kind:
    """A way to draw: environment variables for the threads."""

    variables: dict[str, str]

    def start(self, arguments: list[str], folder: Path, *, threads_too: bool = True) -> subprocess.Popen[str]:
        """Starts `mos` with arguments."""
        inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        environment = inherited | {"PYTHONPATH": str(HERE)} | (self.variables if threads_too else {})
        command, none = [*MOS, *arguments], subprocess.DEVNULL
        return subprocess.Popen(command, stdout=none, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)

    def draw(self, folder: Path, at_once: int = 1) -> float:
        """Seconds of sampling of one picture; of several at once those of the slowest."""
        draw = ["generate", "a dog", "-s", "1", "-v", "--overwrite", "--trace", "off", "-o"]
        runs = [self.start([*draw, f"{number}.png"], folder) for number in range(at_once)]
        seconds = []
        for run in runs:
            try:
                printed = run.communicate(timeout=LONGEST)[1]
            except subprocess.TimeoutExpired:
                run.kill()
                run.communicate()
                seconds.append(LONGEST)
                continue
            found = re.search(r"^\s+sampling\s+([\d.]+) s$", printed, re.MULTILINE)
            if found is None:
                raise SystemExit(printed)
            seconds.append(float(found[1]))
        return max(seconds)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def training(kind: Kind) -> Iterator[None]:
    """A training that has made its first steps."""
    with tempfile.TemporaryDirectory() as name:
        run, started = Path(name) / "run", time.monotonic()
        trainer = kind.start(["train", "train-smoke", "--run", str(run)], Path(name), threads_too=False)
        try:
            while not (run / "metrics.csv").exists():
                if trainer.poll() is not None or time.monotonic() - started > 120:
                    trainer.kill()
                    raise SystemExit(f"the training did not start: {trainer.communicate()[1]}")
                time.sleep(0.2)
            yield
        finally:
            trainer.kill()
            trainer.communicate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=4)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    kinds = {
        "PyTorch's threads": Kind(PYTORCH | {"OMP_NUM_THREADS": str(torch.get_num_threads())}),
        "adapted": Kind({}),
        "one thread": Kind({"OMP_NUM_THREADS": "1"}),
    }
    psutil.cpu_percent()
    time.sleep(1)
    used = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
    print(f"{psutil.cpu_count()} cores, of which other programs used {used:.1f} at the start", flush=True)
    seconds: dict[str, dict[str, list[float]]] = {
        work: {kind: [] for kind in kinds}
        for work in ("nothing", "one busy process", "two busy processes", "another `mos generate`", "a training")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def draw(work: str, kind: str, until: float, at_once: int = 1) -> None:
            if time.monotonic() < until:
                seconds[work][kind].append(kinds[kind].draw(folder, at_once))

        # The training starts once for each kind, since that takes longest.
        trained = end - 0.7 * 60 * options.minutes
        for number, (kind_name, kind) in enumerate(kinds.items(), start=1):
            share = trained - (trained - time.monotonic()) * (len(kinds) - number) / (len(kinds) - number + 1)
            with training(kind):
                draw("a training", kind_name, end)
                while time.monotonic() < share:
                    draw("a training", kind_name, share)
        while time.monotonic() < end:
            for count, work in enumerate(list(seconds)[:3]):
                for kind_name in kinds:
                    with busy(count):
                        draw(work, kind_name, end)
            for kind_name in kinds:
                draw("another `mos generate`", kind_name, end, at_once=2)
    print(f"\n| beside | {' | '.join(kinds)} |\n| --- |{' ---: |' * len(kinds)}")
    for work, cells in seconds.items():
        shown = (
            f"{statistics.median(cell):.2f} ({min(cell):.2f} to {max(cell):.2f}, {len(cell)})" if cell else "-"
            for cell in cells.values()
        )
        print(f"| {work} | {' | '.join(shown)} |")
    print("\nSeconds: median (least to most, number of runs).")


if __name__ == "__main__":
    main()
