"""HTTP itself, by bytes."""

import json
import re

import pytest
from asking import (
    ANSWER,
    HEAD,
    PREDICT,
    ROW,
    ask,
    connected,
    exchange,
    predict,
)

CHUNKED = HEAD.replace(b"Content-Length: 29", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (HEAD + ROW, b"HTTP/1.1 200 OK"),
        (HEAD.replace(b"1.1", b"1.0") + ROW, b"HTTP/1.1 200 OK"),
        (CHUNKED + b"5\r\n%s\r\n18\r\n%s\r\n0\r\n\r\n" % (ROW[:5], ROW[5:]), b"HTTP/1.1 200 OK"),
        (HEAD.replace(b"Host", b"Expect: 100-continue\r\nHost") + ROW, b"HTTP/1.1 100 "),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request"),  # no host
        (b"GET /v1/models/align HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2**17, b"HTTP/1.1 400"),
        (CHUNKED + b"zz\r\n", b"HTTP/1.1 400"),
    ],
)
def test_http_itself(server, request_bytes, answer):
    assert exchange(server, request_bytes).startswith(answer)


def test_two_requests_on_one_connection_are_answered_in_order(server):
    second = HEAD.replace(b"align:", b"none:")
    answer = exchange(server, HEAD + ROW + second + ROW)
    assert [*re.findall(rb"HTTP/1.1 (\d+)", answer)] == [b"200", b"404"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD"])
def test_other_verbs_are_refused(server, method):
    status, body = ask(server.rest_port, method)
    assert status == 400
    if method != "HEAD":
        assert json.loads(body) == {"error": f"Malformed request: {method} {PREDICT}"}


def test_an_answer_that_is_not_read_holds_no_one_up(server):
    body = b'{"signature_name": "text", "inputs": "%s"}' % (b"x" * 2**24)
    with connected(server) as connection:
        connection.sendall(HEAD.replace(b"29", b"%d" % len(body)) + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert predict(server.rest_port) == (200, ANSWER)
