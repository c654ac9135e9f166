"""A run in two processes of a launcher: the jobs are divided, the pictures are the same, and a killed run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mos_cli.cli.job_sharing import Processes, join_processes
from mos_cli.images.outputs import read_drawing

PROMPTS = ("a dog", "a red apple", "a cat", "a green apple")


def start(*arguments: object, processes: int = 2) -> subprocess.Popen[str]:
    """`mos` in processes of PyTorch's launcher, which accelerate's uses, each with one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, "-m", "mos_cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments: object, processes: int = 2) -> tuple[int, str, str]:
    process = start(*arguments, processes=processes)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def jobs_file(folder: Path, count: int, **more: object) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps({"prompt": PROMPTS[n % 4], **more}) + "\n" for n in range(count)))
    return path


def last(manifest: Path) -> dict[str, dict]:
    return {line["job"]: line for line in map(json.loads, manifest.read_text().splitlines()[1:])}


def test_items_are_divided() -> None:
    shares = [Processes(number, 3).share(range(7)) for number in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) == 1


def test_without_a_launcher_there_is_one(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join_processes()
    assert (alone.number, alone.count, alone.several) == (0, 1, False)
    assert (alone.agreed(3), alone.total(4), alone.device("cuda")) == (3, 4, "cuda")
    # A launcher of one process.
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert not join_processes().several


@pytest.mark.slow
def test_two_processes_make_what_one_does(bundle, tmp_path) -> None:
    jobs = jobs_file(tmp_path, 6)
    jobs.write_text(jobs.read_text() + '{"prompt": "a dog", "sped": 1}\n')
    line = ["run", jobs, "--batch-size", 2, "--trace", "off"]
    # Some CPUs round by the number of threads, which is one in each.
    code, output, errors = finish(*line, "-s", 5, "-o", f"{tmp_path}/one/", processes=1)
    assert code != 0
    assert len(output.splitlines()) == 6, errors
    code, output, errors = finish(*line, "-o", f"{tmp_path}/two/", "--manifest", tmp_path / "run.jsonl", "-s", 5)
    assert code != 0
    assert "1 of 7 pictures failed" in errors
    assert len(output.splitlines()) == 6, errors
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("one", "two"))
    assert one == two
    lines = last(tmp_path / "run.jsonl")
    assert sorted(line["index"] for line in lines.values()) == list(range(1, 8))
    assert sorted(line["status"] for line in lines.values()) == ["done"] * 6 + ["failed"]


@pytest.mark.slow
def test_one_of_two_is_killed_and_the_run_goes_on(mos, bundle, tmp_path) -> None:
    manifest, out, count = tmp_path / "run.jsonl", tmp_path / "out", 30
    # Random seeds: both processes have the same, and so has the run that goes on.
    line = ["run", jobs_file(tmp_path, count, steps=20), "-o", f"{out}/", "--manifest", manifest, "--resume"]
    process = start(*line)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.png"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    second = next(child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1")
    second.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(list(out.glob("*.png"))) < count
    code, _, errors = finish(*line)
    assert code == 0, errors
    lines = last(manifest)
    assert sorted(one["index"] for one in lines.values()) == list(range(1, count + 1))
    assert {one["status"] for one in lines.values()} == {"done"}
    # A killed process leaves a hidden file.
    pictures = sorted(out.glob("[0-9]*.png"))
    assert len(pictures) == count
    assert {path.with_suffix(".json").exists() for path in pictures} == {True}
    for one in lines.values():
        picture = tmp_path / next(iter(one["files"]))
        assert read_drawing(picture)[1].recipe.seed == one["seed"]
    again = mos(*line)
    assert (again.exit_code, again.stdout) == (0, ""), "nothing is missing"


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_all(bundle, tmp_path) -> None:
    manifest = tmp_path / "run.jsonl"
    manifest.write_text('{"schema":"mos-manifest/1","seed":1}\n')
    code, output, errors = finish("run", jobs_file(tmp_path, 2), "-o", f"{tmp_path}/out/", "--manifest", manifest)
    assert (code != 0, output) == (True, "")
    assert errors.count("go on with it by --resume") == 1
    assert not (tmp_path / "out").exists()


def test_a_sheet_needs_all_pictures_in_one_process(mos, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mos_cli.cli.batches.join_processes", lambda: Processes(0, 2))
    refused = mos("generate", "a dog", "-n", 2, "-o", f"{tmp_path}/out/", "--sheet", tmp_path / "a.png")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "made by one process" in refused.stderr
