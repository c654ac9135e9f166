"""What stays whole when a run or a server is killed, its disk fills up, its pipe closes, or two runs share a folder.

python benchmarks/reliability.py kills [COUNT]       SIGKILL at random moments, new names and --overwrite in turn
python benchmarks/reliability.py full [COUNT]        a tmpfs of random size fills up (needs leave to mount)
python benchmarks/reliability.py read-only [COUNT]   a tmpfs goes read-only at a random moment (needs leave to mount)
python benchmarks/reliability.py pipes [COUNT]       the reader of the paths closes the pipe after a random number
python benchmarks/reliability.py two [COUNT]         two runs at once in one folder, with the same names
python benchmarks/reliability.py train-kills [COUNT] SIGKILL at random moments of a training, which goes on each time
python benchmarks/reliability.py train-full [COUNT]  a tmpfs of random size fills up during a training, and grows
python benchmarks/reliability.py resumed [COUNT]     a run with a manifest, killed COUNT times and resumed to its end
python benchmarks/reliability.py server [COUNT]      SIGKILL at random moments of a server that commands and clients use
python benchmarks/reliability.py clients [COUNT]     COUNT clients of a server at once, which ask again when refused

A tiny model with random weights draws batches of pictures. After every run all files in the folder are read: every
picture must be whole and be that of its trace, and the user's files be as they were. It is no test of the suite: the
moments are random, and it takes minutes.
"""

import base64
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPT, PICTURES = "a red apple", 12
USERS = {"3.json": b'{"caption": "mine"}', "notes.txt": b"mine", "0.steps.webp": b"mine", ".hidden": b"mine"}
Counts = Counter[str]


def prepare(folder: Path) -> None:
    """Makes the tiny model and everything that a first run makes, and loads all libraries: a fork starts at once."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MOS_CACHE": str(folder / "cache"),
        "MOS_DATA": str(folder / "data"),
        "MOS_MODELS": str(folder / "models"),
        "MOS_MODEL": "tiny",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import BertConfig, BertModel

    from tests.helpers.tiny_bundle import WORDS, save_tokenizer, write_bundle

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder = folder / "encoder"
    BertModel(
        BertConfig(vocab_size=len(WORDS), intermediate_size=64, max_position_embeddings=24, **sizes)
    ).save_pretrained(encoder)
    save_tokenizer(encoder, marks=True)
    torch.manual_seed(0)
    write_bundle(folder / "models" / "tiny", encoder)
    run_here("generate", PROMPT, "-q", "-o", str(folder / "warm") + "/")


def run_here(*arguments: str) -> int:
    """Runs `mos` in this process; returns its exit code."""
    from mos_cli.cli.app import app

    try:
        app(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def start(*arguments: str, log: Path) -> int:
    """Runs `mos` in a fork of this process, which prints into a file; returns its process id."""
    process = os.fork()
    if process:
        return process
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = run_here(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(process: int) -> int:
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def add_users_files(folder: Path) -> None:
    for name, data in USERS.items():
        (folder / name).write_bytes(data)


def examine(folder: Path, log: Path, *, replaced: bool = False) -> Counts:
    """Reads all files of a folder; raises AssertionError if something is lost or damaged."""
    from mos_cli.config.recipe import pixels_hash
    from mos_cli.errors import InputError
    from mos_cli.images.companions import companions
    from mos_cli.images.outputs import read_drawing
    from mos_cli.routing.trace import load_recording

    found: Counts = Counter()
    for name, data in USERS.items():
        assert (folder / name).read_bytes() == data, f"{name} is not as it was"
    pictures = {path for path in folder.glob("*.png") if not path.name.startswith(".")}
    for path in pictures:
        image, record = read_drawing(path)
        assert record.sha256 == pixels_hash(image), f"{path} is damaged"
        found["pictures whole"] += 1
        try:
            assert load_recording(path).checked
            found["with their trace"] += 1
        except InputError:
            # Killed between two files of a picture that is replaced: the old one, and a trace that is not its own.
            if not replaced:
                raise
            found["replaced in part, and said so"] += 1
    beside = {other for path in pictures for other in companions(path)}
    for path in folder.iterdir():
        if path.name in USERS or path in pictures or path in beside:
            continue
        kind = "hidden files left" if path.name.startswith(".") else "traces without a picture"
        found[kind] += 1
        assert path.name.startswith(".") or path.stat().st_size, f"{path} is empty"
    text = log.read_text(encoding="utf-8", errors="replace")
    assert "Traceback" not in text, text
    for line in text.splitlines():
        if line.endswith(".png") and line.startswith(str(folder)):
            assert Path(line) in pictures, f"{line} was printed and is not there"
            found["paths printed"] += 1
    return found


def kills(count: int, folder: Path) -> Counts:
    """SIGKILL at a random moment of a batch; the folder is kept, so that runs go on after those that were killed."""
    found: Counts = Counter()
    log = folder / "log"
    started = time.monotonic()
    batch = ["generate", PROMPT, "-n", str(PICTURES), "-s", "1", "-q", "--preview-steps"]
    new, replaced = folder / "new", folder / "replaced"
    for place in (new, replaced):
        place.mkdir()
        add_users_files(place)
    template = str(replaced / "p{seed}.png")
    finish(start(*batch, "-o", template, log=log))
    longest = time.monotonic() - started
    for number in range(count):
        place = (new, replaced)[number % 2]
        names = [f"{new}/"] if place == new else [template, "--overwrite"]
        if place == replaced and number % 20 == 1:
            # The pictures of a killed run may have lost their traces: the replaced ones are to have all files.
            for path in place.glob("p*"):
                path.unlink()
            finish(start(*batch, "-o", template, log=log))
        process = start(*batch, "-o", *names, log=log)
        time.sleep(random.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        found["killed" if finish(process) < 0 else "done before the signal"] += 1
        state = examine(place, log, replaced=place == replaced)
        found["paths printed"] += state["paths printed"]
    for place in (new, replaced):
        state = examine(place, log, replaced=place == replaced)
        del state["paths printed"]
        found += state
    assert finish(start(*batch, "-o", f"{new}/", log=log)) == 0, "the next run goes on"
    examine(new, log)
    return found


@contextmanager
def tmpfs(folder: Path, kib: int) -> Iterator[Path]:
    """A small disk in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def full(count: int, folder: Path) -> Counts:
    """A disk that is full after some of the pictures, or some of the files of one."""
    found: Counts = Counter()
    log = folder / "log"
    for _ in range(count):
        with tmpfs(folder / "disk", random.randrange(28, 320, 4)) as disk:
            add_users_files(disk)
            batch = ["generate", PROMPT, "-n", str(PICTURES), "-q", "--preview-steps", "-o", f"{disk}/"]
            code = finish(start(*batch, log=log))
            state = examine(disk, log)
            assert code == (0 if state["pictures whole"] == PICTURES else 7), code
            assert code == 0 or "No space left on device" in log.read_text()
            assert not state["hidden files left"] + state["traces without a picture"], state
            found += state + Counter({f"exit code {code}": 1})
    return found


def read_only(count: int, folder: Path) -> Counts:
    """A disk that goes read-only in the middle of a batch."""
    found: Counts = Counter()
    log = folder / "log"
    for _ in range(count):
        with tmpfs(folder / "disk", 4096) as disk:
            add_users_files(disk)
            batch = ["generate", PROMPT, "-n", str(PICTURES), "-q", "--preview-steps", "-o", f"{disk}/"]
            process = start(*batch, log=log)
            while not any(disk.glob("*.png")):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.2))
            # It is refused while a file is being written.
            while subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False).returncode:
                pass
            code = finish(process)
            state = examine(disk, log)
            assert code == (0 if state["pictures whole"] == PICTURES else 7), code
            found += state + Counter({f"exit code {code}": 1})
    return found


def pipes(count: int, folder: Path) -> Counts:
    """A reader that closes the pipe after some of the paths, as `head` does."""
    found: Counts = Counter()
    for number in range(count):
        place, log = folder / f"pipe{number}", folder / "log"
        place.mkdir()
        add_users_files(place)
        command = [sys.executable, "-m", "mos_cli", "generate", PROMPT, "-n", str(PICTURES), "-o", f"{place}/"]
        with log.open("wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
            assert process.stdout is not None
            for _ in range(random.randrange(PICTURES)):
                assert Path(process.stdout.readline().rstrip()).is_file()
            process.stdout.close()
            process.wait()
        found += examine(place, log) + Counter({f"exit code {process.returncode}": 1})
    return found


def two(count: int, folder: Path) -> Counts:
    """Two runs with the same seeds in one folder."""
    found: Counts = Counter()
    for number in range(count):
        place, logs = folder / f"two{number}", [folder / "a", folder / "b"]
        place.mkdir()
        add_users_files(place)
        batch = ["generate", PROMPT, "-n", str(PICTURES), "-s", "1", "-q", "-o", f"{place}/"]
        processes = [start(*batch, log=log) for log in logs]
        assert [finish(process) for process in processes] == [0, 0]
        examined = [examine(place, log) for log in logs]
        assert examined[0]["pictures whole"] == 2 * PICTURES, examined
        assert sum(state["paths printed"] for state in examined) == 2 * PICTURES
        assert not examined[0]["hidden files left"] + examined[0]["traces without a picture"], examined
        found += examined[0] + Counter({"paths printed": PICTURES, "pairs of runs": 1})
    return found


def train_recipe(folder: Path, **settings: Any) -> Path:
    """A recipe of a tiny network on discs."""
    from tests.helpers.tiny_training import write_recipe

    return write_recipe(folder, folder / "encoder", sample_every=10**6, **settings)


def examine_run(folder: Path, log: Path) -> int:
    """Reads all states of a training; the step of the newest, 0 without one. AssertionError if one is damaged."""
    from mos_cli.training.checkpoint import found, step_of, verify

    assert "Traceback" not in log.read_text(encoding="utf-8", errors="replace"), log.read_text()
    for path in found(folder):
        verify(path)
    return max(map(step_of, found(folder)), default=0)


def train_kills(count: int, folder: Path) -> Counts:
    """SIGKILL at a random moment of a training that saves at every second step; the next run goes on with it."""
    counts: Counts = Counter()
    log, run = folder / "log", folder / "run"
    command = ["train", str(train_recipe(folder, steps=10**6, save_every=2)), "--run", str(run)]
    step = 0
    for _ in range(count):
        process = start(*command, log=log)
        time.sleep(random.uniform(2, 12))
        os.kill(process, signal.SIGKILL)
        assert finish(process) < 0, log.read_text()
        now = examine_run(run, log)
        assert now >= step, f"the state of step {step} is lost, the newest is {now}"
        counts += Counter({"killed": 1, "went on since the last": int(now > step), "steps": now - step})
        step = now
    return counts


def train_full(count: int, folder: Path) -> Counts:
    """A disk that is full during a training, grows, and the run goes on from its last state to the end."""
    counts: Counts = Counter()
    log = folder / "log"
    recipe = str(train_recipe(folder, steps=12, save_every=2))
    for _ in range(count):
        with tmpfs(folder / "disk", random.randrange(200, 4000, 4)) as disk:
            command = ["train", recipe, "--run", str(disk / "run")]
            code = finish(start(*command, log=log))
            text = log.read_text(encoding="utf-8", errors="replace")
            step = examine_run(disk / "run", log)
            assert code in (0, 3), (code, text)
            assert sum(line.startswith("error: ") for line in text.splitlines()) == (code == 3), text
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            assert finish(start(*command, log=log)) == 0, log.read_text()
            assert examine_run(disk / "run", log) == 12
            counts += Counter({f"exit code {code}": 1, "with a state to go on from": int(step > 0)})
    return counts


def resumed(count: int, folder: Path) -> Counts:
    """Runs with a manifest that are killed at random moments and resumed: nothing is missing or there twice."""
    found: Counts = Counter()
    log, number = folder / "log", 0
    while found["killed"] < count:
        place, number = folder / f"resumed{number}", number + 1
        place.mkdir()
        # A random seed: only the manifest has it.
        batch = ["generate", PROMPT, "-n", str(4 * PICTURES), "-q", "--preview-steps", "-o", f"{place}/"]
        batch += ["--manifest", str(folder / f"{place.name}.jsonl"), "--resume"]
        code = -1
        while code < 0:
            process = start(*batch, log=log)
            if found["killed"] < count:
                time.sleep(random.uniform(0.2, 1.5))
                os.kill(process, signal.SIGKILL)
            code = finish(process)
            found["killed"] += code < 0
        assert code == 0, log.read_text()
        pictures = [path for path in place.glob("*.png") if not path.name.startswith(".")]
        seeds = {path.stem.rpartition("_s")[2] for path in pictures}
        assert len(pictures) == len(seeds) == 4 * PICTURES, (len(pictures), len(seeds))
        add_users_files(place)
        found += examine(place, log) + Counter({"runs": 1})
        del found["paths printed"]
    return found


def start_server(log: Path, *, queue: int) -> tuple[int, str]:
    """The process and the address of a server that runs."""
    from mos_cli.server.state import read_state

    process = start("serve", "--port", "0", "--queue", str(queue), log=log)
    while (state := read_state()) is None or state.process != process:
        time.sleep(0.01)
    return process, state.url


def ask(url: str, seed: int) -> str:
    """Asks a server for a picture; what came of it. AssertionError if a picture came that is not whole."""
    from io import BytesIO

    from mos_cli.config.recipe import pixels_hash
    from mos_cli.images.outputs import read_drawing

    body = json.dumps({"prompt": PROMPT, "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            (told,) = json.loads(answer.read())["data"]
    except urllib.error.HTTPError as error:
        return {429: "refused"}.get(error.code, f"status {error.code}")
    except (OSError, http.client.HTTPException, ValueError):
        return "cut off"
    image, record = read_drawing(BytesIO(base64.b64decode(told["b64_json"])))
    assert (record.recipe.seed, record.sha256) == (seed, pixels_hash(image))
    return "answered"


def server(count: int, folder: Path) -> Counts:
    """A server that is killed while three commands draw with it and ten clients ask for pictures."""
    from mos_cli.server.state import read_state

    found: Counts = Counter()
    for number in range(count):
        place, logs = folder / f"server{number}", [folder / f"log{name}" for name in range(3)]
        place.mkdir()
        add_users_files(place)
        process, url = start_server(folder / "log", queue=4)
        batch = ["generate", PROMPT, "-n", "4", "-q", "--server", "auto", "-o", f"{place}/"]
        commands = [start(*batch, log=log) for log in logs]
        with ThreadPoolExecutor(10) as clients:
            answers = [clients.submit(ask, url, seed) for seed in range(30)]
            time.sleep(random.uniform(0.1, 1.5))
            os.kill(process, signal.SIGKILL)
            told = Counter(answer.result() for answer in answers)
        assert finish(process) < 0
        assert read_state() is None
        codes = [finish(command) for command in commands]
        assert set(codes) <= {0, 4, 7}, codes
        found += told + Counter({"servers killed": 1, "requests": len(answers)})
        found += Counter(f"commands with exit code {code}" for code in codes)
        states = [examine(place, log) for log in logs]
        printed = sum(state.pop("paths printed", 0) for state in states)
        assert printed == states[0]["pictures whole"], (printed, states[0])
        found += states[0]
    return found


def clients(count: int, folder: Path) -> Counts:
    """Clients that ask a server with a queue of 16 all at once, until each has its picture; then SIGTERM."""
    process, url = start_server(folder / "log", queue=16)
    barrier = threading.Barrier(count)

    def until_answered(seed: int) -> Counts:
        told: Counts = Counter()
        barrier.wait()
        while not told["answered"]:
            told[ask(url, seed)] += 1
            time.sleep(random.uniform(0.1, 0.5))
        return told

    with ThreadPoolExecutor(count) as pool:
        found = sum(pool.map(until_answered, range(count)), Counter())
    assert found["answered"] == count
    assert set(found) <= {"answered", "refused"}, found
    os.kill(process, signal.SIGTERM)
    assert finish(process) == 0
    assert "Traceback" not in (folder / "log").read_text()
    return found + Counter({"clients": count, "requests": found.total()})


KINDS = {
    "kills": (kills, 200),
    "full": (full, 50),
    "read-only": (read_only, 50),
    "pipes": (pipes, 10),
    "two": (two, 50),
    "train-kills": (train_kills, 100),
    "train-full": (train_full, 20),
    "resumed": (resumed, 50),
    "server": (server, 50),
    "clients": (clients, 200),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in KINDS:
        sys.exit(__doc__)
    run, count = KINDS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        found = run(int(sys.argv[2]) if len(sys.argv) > 2 else count, folder)
    print(json.dumps(found, indent=1), "lost or damaged: 0", sep="\n")


if __name__ == "__main__":
    main()
