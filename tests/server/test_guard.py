"""Who may use the server: this machine or the token, no other site; and how large a request may be."""

import socket
from urllib.parse import urlsplit

import pytest

from mos_cli.server.guard import MAX_BODY, is_loopback
from tests.helpers.running_server import RunningServer, running_server

GENERATIONS = "/v1/images/generations"


def test_other_sites_are_refused(gated: RunningServer) -> None:
    own = {"Origin": gated.url}
    foreign = [
        {"Host": "evil.example"},
        {"Host": "evil.example:8017"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": gated.url.replace("http:", "https:")},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]
    for headers in foreign:
        for method, path, body in (
            ("GET", "/v1/jobs", None),
            ("POST", GENERATIONS, {"prompt": "a dog", "wait": False}),
        ):
            answer = gated.ask(method, path, body, headers)
            assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error"), headers
    assert gated.ask("GET", "/v1/jobs", None, own | {"Sec-Fetch-Site": "same-origin"}).json == {"jobs": []}
    # A link of another site may lead to the page.
    assert gated.ask("GET", "/", None, {"Sec-Fetch-Site": "cross-site"}).status == 200
    assert (
        gated.ask("GET", "/v1/jobs", None, {"Origin": "http://evil.example"}).headers.get("access-control-allow-origin")
        is None
    )


def test_a_form_of_another_site_is_no_json(gated: RunningServer) -> None:
    answer = gated.ask("POST", GENERATIONS, b'{"prompt": "a dog"}', {"Content-Type": "text/plain"})
    assert answer.status == 415
    assert gated.ask("POST", "/v1/images/edits", {"prompt": "a dog"}).status == 415


def test_the_token_is_needed_for_all_but_the_page(bundle) -> None:
    with running_server(token="secret") as server:
        for path in ("/v1/models", "/v1/server", "/v1/jobs", "/v1/jobs/a/picture", "/nowhere"):
            for headers in (
                {},
                {"Authorization": "Bearer secre"},
                {"Authorization": "Basic secret"},
                {"Authorization": "Bearer é"},
            ):
                answer = server.ask("GET", path, None, {k: v.encode().decode("latin-1") for k, v in headers.items()})
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert server.ask("GET", "/v1/models", None, {"Authorization": "bearer secret"}).status == 200
        page = server.ask("GET", "/")
        assert (page.status, b"secret" in page.body) == (200, False)
        assert server.ask("GET", "/health").status == 200


def test_requests_that_are_too_large(gated: RunningServer) -> None:
    answer = gated.ask("POST", GENERATIONS, {"prompt": "a dog " * 200_000})
    assert answer.status == 413
    answer = gated.ask("POST", GENERATIONS, {"prompt": "a" * 10_001})
    assert (answer.status, "prompt" in answer.message) == (400, True)
    address = urlsplit(gated.url)
    for length in (str(MAX_BODY + 1), "-1", "x", "9" * 5000):
        with socket.create_connection((str(address.hostname), address.port)) as connection:
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert connection.recv(100).split()[1] in (b"413", b"400")
    assert gated.ask("GET", "/health").status == 200


def test_what_is_no_request_of_ours(gated: RunningServer) -> None:
    for path in ("/../../etc/passwd", "/v1/jobs/../../etc/passwd", "/v1/jobs/%2e%2e%2f/picture", "/page.html", "/v1"):
        assert gated.ask("GET", path).status == 404
    assert gated.ask("PUT", GENERATIONS).status == 405
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": 1}',
        b'{"prompt": "\\ud800"}',
    ):
        answer = gated.ask("POST", GENERATIONS, body)
        assert answer.status == 400, body[:20]
        assert len(answer.message.splitlines()) == 1
    for body in (b"", b"--x7x", b"--x7x\r\n\r\n", b"garbage"):
        answer = gated.ask("POST", "/v1/images/edits", body, {"Content-Type": "multipart/form-data; boundary=x7x"})
        assert answer.status == 400, body
    assert gated.ask("POST", "/v1/images/edits", b"", {"Content-Type": "multipart/form-data"}).status == 400


def test_answers_are_neither_kept_nor_shown_elsewhere(gated: RunningServer) -> None:
    for path in ("/", "/v1/jobs", "/nowhere"):
        headers = gated.ask("GET", path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    policy = gated.ask("GET", "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_beyond_loopback_a_token_is_needed(mos, bundle, host: str) -> None:
    result = mos("serve", "--host", host)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "--token" in result.stderr
    assert not is_loopback(host)


def test_mistakes_of_mos_serve(mos, bundle, gated: RunningServer, monkeypatch) -> None:
    port = urlsplit(gated.url).port
    for line, told in {
        f"--port {port}": f"port {port}: address already in use; choose",
        "--token=a\tb": "--token",
        "-m nowhere": "nowhere",
        "--queue 0": "--queue",
    }.items():
        result = mos("serve", *line.split(" "))
        assert result.exit_code in (2, 4), result.output
        assert told in result.stderr
        assert len(result.stderr.splitlines()) == 1
    import importlib.util

    monkeypatch.setattr(
        "mos_cli.utils.extras.find_spec", lambda name: None if name == "uvicorn" else importlib.util.find_spec(name)
    )
    result = mos("serve")
    assert (result.exit_code, "pip install 'mos-cli[serve]'" in result.stderr) == (2, True)
