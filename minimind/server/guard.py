"""What every request passes before the API sees it: who asks, by which name, how much, how fast.

The whole body is read here, within a size and a time, so that nothing behind it waits for a client. Bodies
are small: what is longer than a prompt can be is refused before it is read.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.server.errors import ApiError
from minimind.server.metrics import Metrics

PRIVATE = ("/v1/", "/metrics", "/openapi.json")  # beginnings of paths that need the key, where there is one
MAX_BODY = 2 << 20  # bytes
BODY_SECONDS = 30


class Guard:
    """The ASGI application `app` with a door.

    Args:
        api_key: what `Authorization: Bearer …` must carry; None: nothing.
        counted: paths that have a count of their own in the metrics.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics, counted: Collection[str]) -> None:
        self.app, self.metrics, self.counted = app, metrics, counted
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.counted else "other"  # anybody can make up paths

        answered = False

        async def counting_send(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self.check(scope)
            body = await read_body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, counting_send)
        else:
            if body is None:
                return
            try:
                await self.app(scope, replay(body, receive), counting_send)
            except Exception:  # a bug; what answers it stands outside of all middleware
                if not answered:
                    self.metrics.requests.labels(path, 500).inc()
                raise

    def check(self, scope: Scope) -> None:
        """Raises: ApiError unless this client may ask for this."""
        headers = dict(scope["headers"])
        if self.api_key is None:
            check_host(headers.get(b"host", b"").decode("latin-1"))
        elif scope["path"].startswith(PRIVATE):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.api_key):
                raise ApiError(
                    401,
                    "this server wants its key: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def check_host(host: str) -> None:
    """Without a key, only this machine's own names are answered to.

    A page from elsewhere can make its own name point to 127.0.0.1 and then talk to the server from the
    user's browser (DNS rebinding); the name is still in the request.

    Raises: ApiError for any other name.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        known = name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        known = False
    if not known:
        raise ApiError(
            403,
            f"without a key this server answers to localhost only, not to {host[:200]!r}; give it --api_key",
        )


async def read_body(scope: Scope, receive: Receive) -> bytes | None:
    """All of a request's body; None when the client has left.

    Raises: ApiError when it is too long, or takes too long.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if len(announced) > 18 or int(announced) > MAX_BODY:
        raise too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_large()
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        late = f"the request's body did not come within {BODY_SECONDS} seconds"
        raise ApiError(408, late, headers={"Connection": "close"}) from None


def too_large() -> ApiError:
    return ApiError(413, f"the request is larger than {MAX_BODY >> 20} MiB; no prompt is that long")


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application that has yet to read the body."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> Message:
        return pending.pop() if pending else await receive()

    return first_the_body
