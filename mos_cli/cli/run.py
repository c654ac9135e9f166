"""`mos run`: pictures from a file of jobs, each with options of its own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.batches import draw_requests
from mos_cli.cli.jobs import RefusedJob
from mos_cli.cli.options import DrawOptions, with_draw_options
from mos_cli.cli.output import Report
from mos_cli.cli.requests import Request
from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.utils.files import expand

if TYPE_CHECKING:
    from mos_cli.config.settings import Settings


@with_draw_options
def run(
    jobs: Annotated[
        Path, typer.Argument(metavar="JOBS", help="A file of jobs, a JSON object a line; - reads them from stdin.")
    ],
    *,
    options: DrawOptions,
) -> None:
    """Draw and edit pictures from a file of jobs, each with its own options over those given here.

    A line is a JSON object: {"prompt": "a red apple", "seed": 1, "steps": 12, "output": "apple.png"}. With "picture"
    the prompt is an instruction, and the picture is edited. A line that is wrong does not stop the others.
    """
    report = Report(json=options.json, quiet=options.quiet, verbose=options.verbose)
    flags = options.settings()
    draw_requests(read_jobs(jobs, flags, options.count), flags, options, report)


def read_jobs(path: Path, flags: "Settings", count: int) -> list[Request | RefusedJob]:
    """The requests of a jobs file; a line that is wrong is a refused one.

    Args:
        flags, count: what a line does not set.

    Raises:
        InputError: the file cannot be read, or has no jobs.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise InputError("stdin is closed: name a file of jobs")
        data = sys.stdin.buffer.read()
    else:
        data = path.read_bytes()
    from pydantic import ValidationError

    from mos_cli.config.job_line import JobLine
    from mos_cli.utils.validation import first_problem

    requests: list[Request | RefusedJob] = []
    has_objects = False
    name = "stdin" if str(path) == "-" else str(path)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        subject = f"{name} line {number}"
        try:
            requests.append(_request(line, subject, flags, count))
            has_objects = True
        except ValidationError as error:
            # What is no object at all has no field that is wrong.
            has_objects = has_objects or bool(error.errors()[0]["loc"])
            # The line of the file is named already.
            problem = first_problem(error, JobLine).replace(" at line 1 column ", " at column ")
            requests.append(RefusedJob(subject, InputError(problem)))
        except MosError as error:
            has_objects = True
            requests.append(RefusedJob(subject, error))
    if not has_objects:
        raise InputError(f'{name} has no jobs: write a line for each, such as {{"prompt": "a red apple"}}')
    return requests


def _request(line: bytes, subject: str, flags: "Settings", count: int) -> Request:
    from mos_cli.config.job_line import OF_EDITS, SETTINGS, JobLine
    from mos_cli.config.settings import make_settings
    from mos_cli.images.expansion import parse_expansion
    from mos_cli.inference.requests import EditRequest

    job = JobLine.model_validate_json(line)
    prompt = job.prompt.strip()
    if not prompt:
        raise InputError("prompt: it is empty")
    values = job.model_dump(exclude_none=True)
    own = {name: value for name, value in values.items() if name in SETTINGS}
    edits = {name: value for name, value in values.items() if name in OF_EDITS}
    sources, edit = (), None
    if job.picture is not None:
        files = [expand(name) for name in (job.picture, *(job.references or ()))]
        if any(name == "-" for name in (job.picture, job.mask, *(job.references or ()))):
            raise UsageError("- is standard input, which a job cannot read: name a file")
        mask = None if job.mask is None else expand(job.mask)
        sides = None if job.expand is None else parse_expansion(job.expand)
        sources, edit = tuple(files), EditRequest(size=job.size, mask=mask, expand=sides, **edits)
    else:
        for name in (*edits, *(values.keys() & {"references", "mask", "image_cfg", "expand"})):
            raise UsageError(f"{name}: this is for edits, name the picture to edit")
        if job.size is not None:
            own["size"] = job.size
    merged = make_settings(**flags.model_dump(exclude_none=True) | own)
    return Request(prompt, subject, merged, job.count or count, sources, edit, job.output, own=True)
