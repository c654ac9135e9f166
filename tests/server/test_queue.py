"""The queue: its limit, its order, cancellation, clients that go, and memory that is released."""

import asyncio
import json
import socket
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from mos_cli.errors import MemoryLimitError
from mos_cli.server.app import make_app
from tests.helpers.running_server import Gate, RunningServer, running_server, until

GENERATIONS = "/v1/images/generations"


def submit(server: RunningServer, prompt: str = "a dog", **more) -> str:
    """A job that is not waited for."""
    answer = server.ask("POST", GENERATIONS, {"prompt": prompt, "wait": False} | more)
    assert answer.status == 202, answer.body
    return answer.json["jobs"][0]["id"]


def status(server: RunningServer, job: str) -> str:
    return server.ask("GET", f"/v1/jobs/{job}").json["status"]


def test_what_does_not_fit_is_refused_and_the_rest_is_drawn_in_order(gated: RunningServer, gate: Gate) -> None:
    jobs = [submit(gated, "a dog")]
    until(lambda: gate.begun)
    jobs += [submit(gated, f"{colour} dog") for colour in ("red", "green", "a")]
    refused = gated.ask("POST", GENERATIONS, {"prompt": "a cat"})
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert refused.json["error"]["type"] == "rate_limit_error"
    events = gated.open("GET", f"/v1/jobs/{jobs[3]}/events")[1]
    gate.open.set()
    told = [line for line in events.read().decode().splitlines() if line.startswith("data:") and "position" in line]
    assert [line.rpartition(" ")[2] for line in told] == ["3}", "2}", "1}"]
    until(lambda: status(gated, jobs[3]) == "done")
    assert gate.drawn == ["a dog", "red dog", "green dog", "a dog"]


def test_pictures_of_one_request_are_taken_all_or_none(gated: RunningServer, gate: Gate) -> None:
    answer = gated.ask("POST", GENERATIONS, {"prompt": "a dog", "n": 4})
    assert answer.status == 429
    assert "holds 3" in answer.message
    assert gated.ask("GET", "/v1/jobs").json["jobs"] == []


def test_two_hundred_clients_at_once(bundle) -> None:
    """Each is answered: with its picture, or that the queue is full."""
    gate, barrier = Gate(), threading.Barrier(200)
    gate.open.set()
    with running_server(draw=gate, limit=20) as server:

        def ask(number: int) -> tuple[int, int]:
            barrier.wait()
            answer = server.ask("POST", GENERATIONS, {"prompt": f"dog {number}", "seed": number})
            return answer.status, answer.json["data"][0]["seed"] if answer.status == 200 else number

        with ThreadPoolExecutor(200) as clients:
            answers = list(clients.map(ask, range(200)))
    counts = Counter(code for code, _ in answers)
    assert set(counts) <= {200, 429}
    assert [seed for _, seed in answers] == list(range(200))
    assert len(gate.drawn) == counts[200] >= 20


def test_a_job_is_cancelled_while_it_waits_and_while_it_is_drawn(gated: RunningServer, gate: Gate) -> None:
    first, second = submit(gated), submit(gated)
    until(lambda: gate.begun)
    assert gated.ask("DELETE", f"/v1/jobs/{second}").json["status"] == "cancelled"
    gated.ask("DELETE", f"/v1/jobs/{first}")
    until(lambda: status(gated, first) == "cancelled")
    events = gated.ask("GET", f"/v1/jobs/{first}/events").events
    assert events[-1]["type"] == "cancelled"
    assert gated.ask("GET", f"/v1/jobs/{first}/picture").status == 409
    third = submit(gated)
    gate.open.set()
    until(lambda: status(gated, third) == "done")
    assert gated.ask("DELETE", f"/v1/jobs/{third}").json["status"] == "done"
    assert gate.begun == 2


def test_what_a_client_that_has_gone_waited_for_is_not_drawn(gated: RunningServer, gate: Gate) -> None:
    waiting = threading.Thread(target=lambda: hang_up(gated, {"prompt": "a dog"}))
    waiting.start()
    until(lambda: gate.begun == 1)
    waiting.join()
    streaming = gated.open("POST", GENERATIONS, {"prompt": "red dog", "stream": True})
    streaming[1].close()
    streaming[0].close()
    until(lambda: [job.status for job in gated.queue.jobs.values()] == ["cancelled", "cancelled"])
    job = submit(gated)
    gate.open.set()
    until(lambda: status(gated, job) == "done")
    assert gate.drawn == ["a dog"]


def test_what_a_client_that_goes_before_its_stream_begins_asked_for_is_not_drawn(
    gated: RunningServer, gate: Gate
) -> None:
    body = json.dumps({"prompt": "a dog", "stream": True}).encode()
    messages = iter([{"type": "http.request", "body": body}])
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "query_string": b"", "headers": headers}

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(_message) -> None:
        # As a connection that cannot be written to: nothing of the answer is sent.
        await asyncio.sleep(30)

    app = make_app(gated.served, gated.queue, host="127.0.0.1", token=None)
    asyncio.run_coroutine_threadsafe(app(scope, receive, send), gated.loop).result(30)
    until(lambda: [(job.status, job.watched) for job in gated.queue.jobs.values()] == [("cancelled", 0)])
    assert gate.drawn == []


def hang_up(server: RunningServer, body: dict) -> None:
    """Sends a request and closes the connection when it is being drawn."""
    address, data = urlsplit(server.url), json.dumps(body).encode()
    with socket.create_connection((str(address.hostname), address.port)) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        until(lambda: server.queue.current is not None)


def test_an_error_of_the_model_ends_one_job(bundle) -> None:
    def draw(request, on_step):
        raise ZeroDivisionError("a secret of the server")

    with running_server(draw=draw) as server:
        for _ in range(2):
            answer = server.ask("POST", GENERATIONS, {"prompt": "a dog"})
            assert (answer.status, answer.message) == (500, "the server failed: ZeroDivisionError")


def test_the_memory_of_the_model_is_released_after_a_picture_that_failed(bundle) -> None:
    class Activations:
        pass

    kept = []

    def draw(request, on_step):
        activations = Activations()
        kept.append(weakref.ref(activations))
        try:
            raise MemoryError
        except MemoryError:
            raise MemoryLimitError("out of memory: take a smaller size") from None

    with running_server(draw=draw, idle=0.05) as server:
        answer = server.ask("POST", GENERATIONS, {"prompt": "a dog"})
        assert (answer.status, answer.message) == (503, "out of memory: take a smaller size")
        until(lambda: kept[0]() is None)
        assert [job.status for job in server.queue.jobs.values()] == ["failed"]


def test_the_last_pictures_are_kept(bundle) -> None:
    gate = Gate()
    gate.open.set()
    with running_server(draw=gate, limit=100) as server:
        answer = server.ask("POST", GENERATIONS, {"prompt": "a dog", "n": 10})
        first = answer.json["data"][0]["job"]
        for _ in range(4):
            server.ask("POST", GENERATIONS, {"prompt": "a dog", "n": 10})
        assert server.ask("GET", f"/v1/jobs/{first}/picture").status == 404
        assert len(server.queue.jobs) <= 42


def test_the_memory_of_the_model_is_released_when_it_is_idle(editor) -> None:
    with running_server(idle=0.05) as server:
        one = server.ask("POST", GENERATIONS, {"prompt": "a dog", "seed": 1, "steps": 1}).json["data"][0]
        pipeline = weakref.ref(server.served.pipeline) if server.served.pipeline else lambda: None
        until(lambda: server.served.pipeline is None)
        until(lambda: pipeline() is None)
        assert server.ask("GET", "/v1/server").json["loaded"] is False
        again = server.ask("POST", GENERATIONS, {"prompt": "a dog", "seed": 1, "steps": 1}).json["data"][0]
        assert again["b64_json"] == one["b64_json"]


def test_a_server_that_stops_finishes_what_a_client_waits_for(gated: RunningServer, gate: Gate) -> None:
    answers = []

    def ask(prompt: str) -> None:
        answers.append((prompt, gated.ask("POST", GENERATIONS, {"prompt": prompt}).status))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("a dog", "a cat")]
    threads[0].start()
    until(lambda: gate.begun)
    threads[1].start()
    until(lambda: gated.queue.waiting)
    gated.call(gated.queue.stop)
    threads[1].join()
    assert gated.ask("POST", GENERATIONS, {"prompt": "red dog"}).status == 503
    assert gated.ask("GET", "/health").json == {"status": "stopping"}
    gate.open.set()
    threads[0].join()
    assert sorted(answers) == [("a cat", 503), ("a dog", 200)]


def test_a_server_that_stops_cancels_what_nobody_waits_for(gated: RunningServer, gate: Gate) -> None:
    job = submit(gated)
    until(lambda: gate.begun)
    gated.call(gated.queue.stop)
    until(lambda: gated.queue.jobs[job].status == "cancelled")
    assert gate.drawn == []
