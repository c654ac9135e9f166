"""Guidance swept over EditBench: how often edits succeed and what they leave alone, by both scales.

python benchmarks/guidance.py [--model NAME] [--limit EDITS_PER_KIND] [--art DIR] [--cfg 1 2 3] [--image-cfg 1 1.5]
"""

import argparse
import tempfile
from pathlib import Path

from rich.progress import track

from mos_cli.bundles.bundle import edit_defaults, find_bundle
from mos_cli.bundles.specs import Defaults
from mos_cli.cli.loading import load_with_progress
from mos_cli.cli.output import Report
from mos_cli.config.settings import RunSettings, make_settings
from mos_cli.datasets.art.file import data_folder, load_art
from mos_cli.evaluation.edit_run import EditEvaluation, evaluate_edits
from mos_cli.evaluation.editbench import read_edit_bench
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.evaluation.judge import Judge, judge_folder
from mos_cli.inference.requests import recipe_fields
from mos_cli.utils.quiet import quieten


def line(cfg: float, image_cfg: float, found: EditEvaluation) -> str:
    """A row of the table; the standard error is that of the raw score as a share of its ceiling."""
    whole = found.scores[-1]
    nothing = next(one for one in found.scores if one.category == "nothing")
    error = whole.error / whole.ceiling
    kept = f"{nothing.raw:.2f} | {whole.outside:.1f} | {found.no_op_error:.1f}"
    return f"| {cfg:g} | {image_cfg:g} | {whole.relative:.3f} ({error:.3f}) | {kept} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--art", type=Path)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--image-cfg", type=float, nargs="+", default=[1.0, 1.5])
    arguments = parser.parse_args()
    quieten()
    settings = RunSettings(**make_settings(model=arguments.model).model_dump(exclude_none=True))
    bundle = find_bundle(settings.model)
    defaults: Defaults = edit_defaults(bundle)
    judge, true = Judge(judge_folder()), TrueScenes(load_art(arguments.art or data_folder()))
    common = recipe_fields(settings, bundle, defaults)
    common["width"], common["height"] = bundle.index.canvas.native
    pipeline = load_with_progress(bundle, settings, Report(), precision=common["precision"], quant=None)
    entries = read_edit_bench(arguments.limit)
    print(f"{bundle.ref} ({bundle.hash[:10]}), {len(entries)} edits, {common['steps']} steps\n")
    print("| cfg | image cfg | success (error) | nothing changed | dB outside | no-op error, levels |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    grid = [(cfg, image_cfg) for image_cfg in arguments.image_cfg for cfg in arguments.cfg]
    for cfg, image_cfg in track(grid, "sweeping", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            settings_here = common | {"cfg": cfg}
            found = evaluate_edits(
                pipeline, entries, judge, true, Path(folder), settings_here, image_cfg, lambda *_: None
            )
        print(line(cfg, image_cfg, found), flush=True)


if __name__ == "__main__":
    main()
