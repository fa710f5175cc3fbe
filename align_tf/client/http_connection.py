"""HTTP over a socket that gives up at one moment, however often it has to wait until then.

The timeouts of urllib3 and httpx begin anew with each part that comes: they bound no answer.
"""

import http.client
import socket
import ssl
import time
from typing import Any


class _Timely:
    """Has each wait of a socket end at a deadline; a socket's own timeout begins anew each time."""

    deadline: float

    def _set_time_left(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)

    def connect(self, address: Any) -> None:
        self._set_time_left()
        super().connect(address)

    def do_handshake(self, block: bool = False) -> None:
        self._set_time_left()
        super().do_handshake(block)

    def recv_into(self, *arguments: Any) -> int:
        self._set_time_left()
        return super().recv_into(*arguments)

    def send(self, *arguments: Any) -> int:
        self._set_time_left()
        return super().send(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self._set_time_left()
        super().sendall(*arguments)


class _Socket(_Timely, socket.socket):
    pass


class _TlsSocket(_Timely, ssl.SSLSocket):
    pass


class Connection(http.client.HTTPConnection):
    """A connection that goes through no proxy; call `set_deadline` before each request.

    Args:
        host: the server's.
        port: the server's.
        context: encrypts; None sends in the clear.
        server_name: what the server proves to be, where that is not its address.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, server_name: str | None
    ):
        super().__init__(host, port)
        self.context, self.server_name = context, server_name
        if context is not None:
            context.sslsocket_class = _TlsSocket
            self.default_port = http.client.HTTPS_PORT  # which the Host header leaves out

    def set_deadline(self, deadline: float) -> None:
        """Sets when what follows has to have ended, in the seconds of `time.monotonic`."""
        self.deadline = deadline
        if self.sock is not None:
            self.sock.deadline = deadline

    def connect(self) -> None:
        taken = self._connected()
        taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = taken if self.context is None else self._encrypted(taken)

    def _connected(self) -> _Socket:
        """Tries the addresses of the host in turn, as `socket.create_connection` does."""
        error = OSError(f"{self.host}: no address")
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            taken = _Socket(family, kind, protocol)
            taken.deadline = self.deadline
            try:
                taken.connect(address)
            except OSError as failed:
                error = failed
                taken.close()
            else:
                return taken
        raise error

    def _encrypted(self, plain: _Socket) -> _TlsSocket:
        encrypted = self.context.wrap_socket(
            plain, server_hostname=self.server_name or self.host, do_handshake_on_connect=False
        )
        encrypted.deadline = self.deadline
        try:
            encrypted.do_handshake()
        except BaseException:
            encrypted.close()
            raise
        return encrypted
