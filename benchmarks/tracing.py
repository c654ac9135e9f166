"""The cost of recording and steering, as shares of the time of a picture without them.

Pictures are drawn in turn, one of each kind, so that whatever else the machine does slows all alike. The first row is
what recording every decision takes, measured separately: the observer at every step and the one copy at the end.

python benchmarks/tracing.py [ROUNDS]
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from sampling import recipe_of

from mos_cli.bundles.bundle import find_bundle
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.config.settings import RunSettings
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions
from mos_cli.utils.devices import choose_device, choose_precision, device_name
from mos_cli.utils.quiet import quieten


def watched(pipeline: MoSPipeline, draw: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a picture, and of these the seconds spent in the recorder."""
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal spent
            started = _now(pipeline)
            try:
                return method(*arguments, **named)
            finally:
                spent += _now(pipeline) - started

        return call

    originals = {name: getattr(Recorder, name) for name in ("__call__", "routes")}
    for name, method in originals.items():
        setattr(Recorder, name, timed(method))
    started = _now(pipeline)
    draw()
    whole = _now(pipeline) - started
    for name, method in originals.items():
        setattr(Recorder, name, method)
    return whole, spent


def _now(pipeline: MoSPipeline) -> float:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    quieten()
    bundle, device = find_bundle(RunSettings().model), choose_device("auto")
    precision = choose_precision(device)
    pipeline = MoSPipeline(bundle, fetch_with_progress(bundle.index.understanding), device=device, precision=precision)
    plain = recipe_of(bundle, precision, 0)
    ruled = plain.model_copy(update={"routes": ("dog!=0-2", f"*+=0.5@4 steps 0-{plain.steps - 1}")})
    kinds: dict[str, Callable[[], Any]] = {
        "nothing but the decisions": lambda: pipeline.draw(plain),
        "two rules": lambda: pipeline.draw(ruled),
        "--trace full": lambda: pipeline.draw(plain, record_options=RecordOptions(probabilities=True)),
        "--regions": lambda: pipeline.draw(plain, record_options=RecordOptions(regions=True)),
        "--preview-steps": lambda: pipeline.draw(plain, record_options=RecordOptions(previews=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    shares: list[float] = []
    for number in range(rounds + 1):
        for name, draw in kinds.items():
            whole, spent = watched(pipeline, draw)
            # The first round is the warm-up.
            if number:
                seconds[name].append(whole)
            if number and name == "nothing but the decisions":
                shares.append(spent / whole)

    base = seconds["nothing but the decisions"]
    print(f"{bundle.ref} {plain.width}x{plain.height}, {plain.steps} steps, {precision}, ", end="")
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, median of {rounds}: {statistics.median(base):.3f} s"
    )
    print("\n| | more time, median |\n| --- | ---: |")
    print(f"| every decision (`--trace topk`) | {statistics.median(shares):.2%} |")
    for name in list(kinds)[1:]:
        more = statistics.median(other / own - 1 for other, own in zip(seconds[name], base, strict=True))
        print(f"| {name} | {more:+.1%} |")


if __name__ == "__main__":
    main()
