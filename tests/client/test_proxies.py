"""Proxies that the environment names: none is asked for this machine, or where it says so."""

import asyncio
import contextlib
import http.server
import os
import pathlib
import socket
import urllib.error
import urllib.request

import pytest
from http_serving import serving

from align_tf.client import AlignClient, AsyncAlignClient, VersionStatus
from align_tf.server import ModelServer

PROBE = pathlib.Path(__file__).parents[1] / "goldens" / "tf_serving" / "probe"
AVAILABLE = [VersionStatus(2, "AVAILABLE", "")]


@pytest.fixture
def proxy(monkeypatch):
    """What the environment names as the proxy of every protocol: it refuses; yields its calls."""
    calls = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            calls.append(self.path)
            self.send_error(403)

        do_GET = do_POST = do_CONNECT

        def log_message(self, *arguments):
            pass

    with serving(Handler) as address:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://{address}")
            monkeypatch.setenv(name.upper(), f"http://{address}")
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield calls


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "[::1]"])
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_no_proxy_is_asked_for_this_machine(proxy, protocol, host):
    listens = "::1" if host == "[::1]" else "0.0.0.0"
    if listens == "::1" and not ipv6():
        pytest.skip("IPv6")
    with ModelServer(PROBE, host=listens) as server:
        address = f"{host}:{server.rest_port if protocol == 'rest' else server.grpc_port}"
        with AlignClient(address, protocol=protocol, retries=0) as client:
            assert client.status() == AVAILABLE

        async def main():
            async with AsyncAlignClient(f"{host}:{server.grpc_port}", retries=0) as client:
                return await client.status()

        assert asyncio.run(main()) == AVAILABLE
    assert proxy == []


def ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as one:
        one.bind(("::1", 0))
        return True


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_no_proxy_is_asked_where_the_environment_says_so(proxy, monkeypatch, protocol):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect(("192.0.2.1", 9))  # nothing is sent: it finds this machine's own address
        host = out.getsockname()[0]
    if host.startswith("127."):
        pytest.skip("a network")
    with ModelServer(PROBE, host="0.0.0.0") as server:
        address = f"{host}:{server.rest_port if protocol == 'rest' else server.grpc_port}"
        if protocol == "grpc":  # REST asks no proxy at all
            with (
                AlignClient(address, protocol=protocol, retries=0) as client,
                pytest.raises(ConnectionError, match="cannot reach the server"),
            ):
                client.status()
            assert set(proxy) == {address}
            proxy.clear()
        monkeypatch.setenv("no_proxy", f"example.org,{host}")
        with AlignClient(address, protocol=protocol, retries=0) as client:
            assert client.status() == AVAILABLE
    assert proxy == []


def fetched(url):
    """Asks as the environment says now; `urlopen` keeps what it said first."""
    return urllib.request.build_opener().open(url, timeout=60).read()


def test_the_demo_finds_its_own_page(proxy, monkeypatch):
    demo = pytest.importorskip("align_tf.search.demo")
    monkeypatch.setenv("NO_PROXY", "example.org")
    before = dict(os.environ)
    with ModelServer(PROBE) as server:
        url = f"http://127.0.0.1:{server.rest_port}/v1/models/align"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetched(url)
        assert proxy == [url]
        with demo.reached_directly("127.0.0.1"):
            assert b"AVAILABLE" in fetched(url)
            assert urllib.request.proxy_bypass("example.org")
    assert proxy == [url]
    assert dict(os.environ) == before
