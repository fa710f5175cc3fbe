"""A request's timeout is that of the whole request, whatever its server does meanwhile."""

import asyncio
import contextlib
import socket
import threading

import pytest

from align_tf.client import AlignClient, AsyncAlignClient, Signature, Tls


@contextlib.contextmanager
def dripping(head):
    """A server that sends a beginning, then a byte now and then as long as its caller waits."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        left = threading.Event()

        def drip():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(head)
                while not left.wait(0.02):
                    connection.sendall(b"0")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            left.set()
            thread.join()


# what comes before the bytes that never end
DRIPPED = {
    "a status": b"",
    "a header": b"HTTP/1.1 200 OK\r\nX: ",
    "a body": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n",
    "a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3b9ac9ff\r\n",
    "TLS": b"\x16\x03\x03\x40\x00",
}


@pytest.mark.parametrize("case", DRIPPED)
def test_a_server_that_drips_without_end_times_out(case):
    tls = Tls() if case == "TLS" else None
    with dripping(DRIPPED[case]) as address:
        client = AlignClient(address, tls=tls, timeout=1.0)
        with pytest.raises(TimeoutError, match=f"{address}: no answer in time"):
            client.status()


def test_grpc_ends_at_its_deadline_too():
    # SETTINGS, and the head of a long frame of a kind that HTTP/2 has a receiver leave out.
    head = b"\0\0\0\4\0\0\0\0\0" + b"\0\x40\0\xff\0\0\0\0\0"

    async def main(address):
        async with AsyncAlignClient(address, timeout=1.0) as client:
            await client.status()

    def ask(address):
        with AlignClient(address, protocol="grpc", timeout=1.0) as client:
            client.status()

    for ended in (ask, lambda address: asyncio.run(main(address))):
        with dripping(head) as address, pytest.raises(TimeoutError, match="no answer in time"):
            ended(address)


def test_a_body_that_is_not_taken_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = AlignClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout=1.0)
        client._signatures = {"embed_text": Signature({}, {})}
        with pytest.raises(TimeoutError, match="no answer in time"):
            client.embed_texts(["x" * 100_000_000])
