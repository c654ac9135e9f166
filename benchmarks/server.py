"""How long a picture takes from a shell, without a server and with one, and what a server holds in memory.

python benchmarks/server.py [ROUNDS]

The shipped model. "Sampling" is what `mos generate -v` prints without a server: the picture alone. "Apart from it" is
what the command takes beside it. The CPU seconds are those of the command's process: with a server, all that it adds to
what the server does, also on a busy machine.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from mos_cli.server.state import read_state

MOS = [sys.executable, "-m", "mos_cli"]
ROOT = Path(__file__).parents[1]


def draw(folder: Path, seed: int, where: str) -> tuple[float, float, float]:
    """Seconds of the whole command, of its sampling as -v prints them, and of the processor."""
    line = [*MOS, "generate", "a cat and a dog", "-s", str(seed), "-v", "-o", f"{where}{seed}.png", "--server", where]
    started, before = time.perf_counter(), cpu_seconds()
    run = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    found = re.search(r"sampling +([\d.]+) s", run.stderr)
    assert found, run.stderr
    return time.perf_counter() - started, float(found[1]), cpu_seconds() - before


def cpu_seconds() -> float:
    """Those of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def held(process: psutil.Process) -> str:
    return f"{process.memory_info().rss / 2**20:.0f} MiB"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    # As a user's: modules are compiled once.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    idle = 5
    server = subprocess.Popen([*MOS, "serve", "--port", "0", "--idle", str(idle), "-q"])
    try:
        while (state := read_state()) is None or state.process != server.pid:
            time.sleep(0.1)
        with tempfile.TemporaryDirectory() as made:
            folder, process = Path(made), psutil.Process(server.pid)
            draw(folder, 0, "auto")
            draw(folder, 0, "off")
            here = [draw(folder, seed, "off") for seed in range(1, rounds + 1)]
            there = [draw(folder, seed, "auto") for seed in range(1, rounds + 1)]
            print("server with the model:", held(process))
            same = all(
                (folder / f"off{seed}.png").read_bytes() == (folder / f"auto{seed}.png").read_bytes()
                for seed in range(1, rounds + 1)
            )
            time.sleep(2 * idle)
            print("server after the model was released:", held(process))
    finally:
        server.terminate()
        server.wait()
    sampling = median(sampled for _, sampled, _ in here)
    for name, found in {"without": here, "with": there}.items():
        whole, cpu = median(seconds for seconds, _, _ in found), [used for _, _, used in found]
        apart = f"{whole:.2f} s, apart from sampling ({sampling:.2f} s): {whole - sampling:.2f} s"
        print(f"{name} a server: {apart}; of the processor: least {min(cpu):.2f}, median {median(cpu):.2f} s")
    print("same bytes:", same, "- load:", os.getloadavg()[0])


if __name__ == "__main__":
    main()
