"""Wall times of the commands: median of several runs, and the stages of `mos generate`.

python benchmarks/cli.py [RUNS]
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOS = [sys.executable, "-c", "from mos_cli.__main__ import main; main()"]


def seconds(arguments: list[str], runs: int) -> tuple[float, list[str]]:
    """Median wall time after one warm-up, and what each counted run printed on stderr."""
    times, printed = [], []
    for _ in range(runs + 1):
        started = time.perf_counter()
        result = subprocess.run([*MOS, *arguments], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
        printed.append(result.stderr)
    return statistics.median(times[1:]), printed[1:]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("| command | seconds |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "a.png")
        draw = ["generate", "a dog", "-s", "1", "-v", "--overwrite", "-o", picture]
        for arguments in (["--help"], ["models", "ls"], ["presets", "ls"]):
            print(f"| `mos {' '.join(arguments)}` | {seconds(arguments, runs)[0]:.2f} |")
        whole, printed = seconds(draw, runs)
        print(f'| `mos generate "a dog"` | {whole:.2f} |')
        stages: dict[str, list[float]] = {}
        for text in printed:
            for name, value in re.findall(r"^\s+(\w+)\s+([\d.]+) s$", text, re.MULTILINE):
                stages.setdefault(name, []).append(float(value))
        for name, values in stages.items():
            print(f"|   {name} | {statistics.median(values):.2f} |")
        print(f"| `mos inspect-routing` | {seconds(['inspect-routing', picture], runs)[0]:.2f} |")


if __name__ == "__main__":
    main()
