"""`mos train-judge`: the detector that `mos eval` judges with."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.options import ArtFile
from mos_cli.cli.output import print_table, stdout
from mos_cli.cli.progress import stage_bars


def train_judge(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the judge to.")],
    art: ArtFile = None,
    steps: Annotated[int, typer.Option("--steps", min=10, help="Training steps.")] = 4000,
) -> None:
    """Train the judge of `mos eval` from the art file, and show how much of true scenes it detects.

    The same command gives another judge on another machine: tables compare only where the judge's hash is the same.
    """
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_writable
    from mos_cli.utils.quiet import quieten

    require("training the judge", "train", "inflect")
    check_writable(output)
    quieten()
    from mos_cli.datasets.art.file import data_folder, load_art
    from mos_cli.evaluation.examine import Examiner, TrueScenes
    from mos_cli.evaluation.judge import INDEX, SIDE, Judge
    from mos_cli.evaluation.judge_training import load_sprites
    from mos_cli.evaluation.judge_training import train_judge as run_training
    from mos_cli.evaluation.results import HEADINGS, table
    from mos_cli.evaluation.run import scores
    from mos_cli.evaluation.scenebench import bench_data, read_bench
    from mos_cli.utils.files import check_folder

    check_folder(output, INDEX)
    opened, entries = load_art(art or data_folder()), read_bench()
    with stage_bars("loss {task.fields[loss]:.3f}") as advance:
        run_training(
            load_sprites(opened, bench_data()),
            output,
            steps=steps,
            log=lambda step, loss: advance("training", step, steps, loss),
        )
    judge = Judge(output)
    passed = Examiner(judge, TrueScenes(opened), entries, SIDE).ceiling()
    print_table(HEADINGS, table(scores(entries, [takes[0] for takes in passed], passed)))
    stdout.print(f"{output}  sha256 {judge.hash}", markup=False, soft_wrap=True)
