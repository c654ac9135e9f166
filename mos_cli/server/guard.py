"""What a request must be before it is answered: from this machine or with the token, from no other site, not too large.

A browser lets any site send requests to a port of this machine. It names the site in `Origin`, and what it believes the
server's name to be in `Host`: another name than that of the machine is that of a site that changed its address
(DNS rebinding).
"""

import hmac
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mos_cli.server.answers import error_answer

MAX_BODY = 128 * 2**20
"""Bytes of a request."""
OPEN = {"/", "/health"}
"""What needs no token: it says nothing of the user's."""
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Answers what must not be answered otherwise, and passes the rest on to `app`.

    Args:
        host: where the server listens.
        token: what a request needs; None: nothing, on loopback alone.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self.app, self.token = app, token
        names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
        self.names = names if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        if refused := self._refused(scope["path"], headers):
            status, message = refused
            extra = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            await error_answer(status, message, headers=extra)(scope, receive, with_headers)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                raise HTTPException(413, _TOO_LARGE)
            return message

        await self.app(scope, limited, with_headers)

    def _refused(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """The status and the reason why a request is refused."""
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.names is not None and name not in self.names:
            return 403, f"the server is not called {name or 'nothing'}: name it as localhost or 127.0.0.1"
        site = headers.get("sec-fetch-site", "none")
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"http://{host}":
            return 403, "requests of other sites are refused"
        if path != "/" and site not in ("none", "same-origin"):
            return 403, "requests of other sites are refused"
        if self.token is not None and path not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                return 401, "the token is missing or another: send Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return 413, _TOO_LARGE
        return None


_TOO_LARGE = f"the request is too large: {MAX_BODY >> 20} MiB at most"
