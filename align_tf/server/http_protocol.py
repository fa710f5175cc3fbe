"""HTTP/1.1 of the REST half: slow clients let go of, connections closed with the server."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from align_tf.server.limits import LEAST_BYTES_PER_SECOND

# That a connection without a request has when the server stops, and one of half a request between
# what comes of it.
ON_ITS_WAY_SECONDS = 1.0
SILENCE_SECONDS = 60  # after which a connection whose other end does not acknowledge is closed


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP, but for clients that are slow, silent, or new when the server stops.

    uvicorn itself waits for ever for the head of a first request, for the rest of one begun, or for
    an answer to be taken. It gives no answer to a client that has closed its sending side, or that
    has connected when the server stops and whose request is on its way.
    """

    def __init__(self, client_timeout: float, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.client_timeout = client_timeout
        self.head_timer: asyncio.TimerHandle | None = None
        self.reader_timer: asyncio.TimerHandle | None = None
        self.stop_timer: asyncio.TimerHandle | None = None
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
        if self.stop_timer is not None:
            self._watch_rest()

    def shutdown(self) -> None:
        self.stopping = True
        if self.cycle is not None:
            super().shutdown()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._watch_rest()

    def _watch_rest(self) -> None:
        """Closes a connection that waits for a request, or the rest of one, when none comes."""
        if self.stop_timer is not None:
            self.stop_timer.cancel()
        self.stop_timer = self.loop.call_later(ON_ITS_WAY_SECONDS, self._close_waiting)

    def _close_waiting(self) -> None:
        waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if waiting and not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.reader_timer.cancel()

    def _watch_reader(self) -> None:
        """Has a client that takes too little of its answer let go of, as long as more waits."""
        left = self.transport.get_write_buffer_size()
        self.reader_timer = self.loop.call_later(self.client_timeout, self._drop_slow_reader, left)

    def _drop_slow_reader(self, before: int) -> None:
        taken = before - self.transport.get_write_buffer_size()
        if taken < self.client_timeout * LEAST_BYTES_PER_SECOND:
            self.transport.abort()
        else:
            self._watch_reader()

    def eof_received(self) -> bool:
        """Keeps the connection of a client that has sent all and still listens."""
        self.input_ended = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return self.input_ended

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.input_ended and self.cycle.response_complete:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self.head_timer, self.reader_timer, self.stop_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def _watch_head(self) -> None:
        """Starts the timer where a head is awaited, and stops it where one has come."""
        if self.conn.their_state is not h11.IDLE:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(self.client_timeout, self.transport.close)


class HttpServer(uvicorn.Server):
    """uvicorn's server, but that what runs when its time to stop has passed is told of it."""

    def __init__(self, config: uvicorn.Config, grace_seconds: float, give_up: Callable[[], None]):
        super().__init__(config)
        self.grace_seconds, self.give_up = grace_seconds, give_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.grace_seconds, self.give_up)
        await super().shutdown(sockets)
