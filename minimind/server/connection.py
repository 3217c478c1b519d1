"""uvicorn, made impatient with clients that neither ask, nor read, nor leave."""

from __future__ import annotations

from asyncio import TimerHandle, Transport

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # from the beginning of a connection, or of a request on it, to the end of its headers
STALLED_SECONDS = 60  # in which a client reads nothing of what waits for it

LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\nContent-Length: 25\r\n\r\nthe request did not come\n"
)


class ImpatientProtocol(H11Protocol):
    """A connection that is closed when its request does not come or its answer is not read.

    The time a body may take is the guard's concern, idleness between two requests is uvicorn's.
    """

    _late: TimerHandle | None = None
    _stalled: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
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


def make_server(app: FastAPI, grace: int) -> uvicorn.Server:
    """Args: grace: seconds that running answers have once the server is told to stop."""
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=grace,
        log_level="warning",
        server_header=False,
    )
    return uvicorn.Server(config)
