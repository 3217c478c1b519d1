"""uvicorn, made impatient with clients that neither ask, nor read, nor leave."""

from __future__ import annotations

import asyncio
import resource
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from signal import SIGINT
from socket import socket
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # from the beginning of a connection, or of a request on it, to the end of its headers
STALLED_SECONDS = 60  # in which a client reads nothing of what waits for it
LEAVE_SECONDS = 5  # for clients to take in that the server stops

BACKLOG = 128  # connections that are taken at once, and that the system keeps until then
# A process that has no file left to open can take no connection, not even to refuse it.
MOST_CONNECTIONS = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 2 * BACKLOG)


def plain_response(status: str, text: bytes, header: str = "") -> bytes:
    """A whole response to a request that has not been read."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: close\r\n{header}"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


LATE = plain_response("408 Request Timeout", b"the request did not come\n")
CROWDED = plain_response("429 Too Many Requests", b"too many connections\n", "Retry-After: 1\r\n")


class ImpatientProtocol(H11Protocol):
    """A connection that is closed when its request does not come or its answer is not read.

    The time a body may take is the guard's concern, idleness between two requests is uvicorn's.
    """

    _late: TimerHandle | None = None
    _stalled: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override] # as its parent does
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(CROWDED)
            transport.close()
        else:
            self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._stalled):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def _expect_request(self) -> None:
        """Start the clock, unless it runs, or stop it, now that a request's headers are here."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._late:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.conn.our_state is h11.IDLE:  # not in the middle of anything
            self.transport.write(LATE)
        self.transport.close()


class Server(uvicorn.Server):
    """Stops in two steps: running answers have time to end, then they are told that the server stops.

    A second Ctrl-C goes to the second step at once, a third leaves whatever happens.

    Args:
        grace: seconds that running answers have.
        give_up: ends them.
    """

    def __init__(self, app: FastAPI, grace: int, give_up: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            timeout_graceful_shutdown=grace + LEAVE_SECONDS,
            log_level="warning",
            server_header=False,
        )
        super().__init__(config)
        self.grace, self.give_up = grace, give_up
        self._hurry = False

    async def startup(self, sockets: list[socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        timer = self._loop.call_later(self.grace, self.give_up)
        await super().shutdown(sockets)
        timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == SIGINT and not self._hurry:
            self._hurry = True
            self._loop.call_soon_threadsafe(self.give_up)
        else:
            super().handle_exit(sig, frame)
