"""HTTP/1.1 of the REST half: slow clients let go of, connections closed with the server."""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

ON_ITS_WAY_SECONDS = 1.0  # that a connection without a request has when the server stops
SILENCE_SECONDS = 60  # after which a connection whose other end does not acknowledge is closed


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP, but for clients that are slow, silent, or new when the server stops.

    uvicorn itself waits for ever for the head of a first request, or for the rest of one begun. It
    gives no answer to a client that has closed its sending side, or that has connected when the
    server stops and whose request is on its way.
    """

    def __init__(self, head_timeout: float, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.head_timeout = head_timeout
        self.head_timer: asyncio.TimerHandle | None = None
        self.input_ended = self.stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # also for one that stops reading its answer
            milliseconds = SILENCE_SECONDS * 1000
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.stopping and self.cycle is not None:
            self.cycle.keep_alive = False
        self._watch_head()

    def shutdown(self) -> None:
        self.stopping = True
        if self.cycle is None:
            self.loop.call_later(ON_ITS_WAY_SECONDS, self._close_unused)
        else:
            super().shutdown()

    def _close_unused(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            super().shutdown()

    def eof_received(self) -> bool:
        """Keeps the connection of a client that has sent all and still listens."""
        self.input_ended = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return self.input_ended

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.input_ended and self.cycle.response_complete:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
        super().connection_lost(error)

    def _watch_head(self) -> None:
        """Starts the timer where a head is awaited, and stops it where one has come."""
        if self.conn.their_state is not h11.IDLE:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(self.head_timeout, self.transport.close)
