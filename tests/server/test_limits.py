"""What the server takes at most: requests, messages, bodies, memory, and slow clients."""

import concurrent.futures
import contextlib
import gzip
import http.client
import json
import re
import select
import threading
import time

import grpc
import numpy as np
import pytest
from asking import (
    ANSWER,
    HEAD,
    PREDICT,
    PROBE,
    ROW,
    Held,
    ask,
    connected,
    exchange,
    grpc_request,
    predict,
    received,
    stub,
    wait_for_no_memory,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from align_tf.server import Limits, ModelServer, grpc_services
from align_tf.server.limits import Memory
from align_tf.server.status_codes import Overloaded, RequestError


@pytest.fixture(scope="module")
def hasty():
    """One with room for one prediction, which waits for a client for half a second."""
    limits = Limits(max_concurrent_requests=1, max_queued_requests=0, client_timeout=0.5)
    with ModelServer(PROBE, limits=limits) as running:
        yield running


def test_more_requests_than_the_limit_are_refused(small, monkeypatch):
    error = "The server has 1 requests at work and 1 waiting, its limits: try again later"
    with (
        stub(small) as predictions,
        stub(small, health_pb2_grpc.HealthStub) as checks,
        concurrent.futures.ThreadPoolExecutor(2) as callers,
    ):
        held = Held(small, monkeypatch)
        callers.submit(predict, small.rest_port)
        held.wait()
        queued = callers.submit(predict, small.rest_port)
        while small._gate._places._value:
            time.sleep(0.01)
        assert predict(small.rest_port) == (503, {"error": error})
        with pytest.raises(grpc.RpcError, match=error) as refusal:
            predictions.Predict(grpc_request(np.float32([[1, 2, 3, 4]])))
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert predict(small.rest_port, method="GET", path="/v1/models/align")[0] == 200
        assert checks.Check(health_pb2.HealthCheckRequest()).status == 1
        held.go.set()
        assert queued.result() == (200, ANSWER)
    assert predict(small.rest_port) == (200, ANSWER)


def test_a_call_whose_deadline_passed_in_the_queue_is_not_run(monkeypatch):
    contexts, answer = [], grpc_services.PredictionService.Predict

    def noted(service, request, context):
        contexts.append(context)
        return answer(service, request, context)

    monkeypatch.setattr(grpc_services.PredictionService, "Predict", noted)
    limits = Limits(max_concurrent_requests=1, max_queued_requests=1)
    with (
        ModelServer(PROBE, limits=limits) as server,
        stub(server) as predictions,
        concurrent.futures.ThreadPoolExecutor(1) as callers,
    ):
        held = Held(server, monkeypatch)
        running = callers.submit(predict, server.rest_port)
        held.wait()
        with pytest.raises(grpc.RpcError) as error:
            predictions.Predict(grpc_request(np.float32([[1, 2, 3, 4]])), timeout=0.2)
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        while not contexts or contexts[0].is_active():  # the server's clock began later
            time.sleep(0.01)
        held.go.set()
        assert running.result() == (200, ANSWER)
        assert predict(server.rest_port) == (200, ANSWER)
    assert held.at_work.acquire(blocking=False)  # the last
    assert not held.at_work.acquire(blocking=False)


def test_a_message_over_the_limit_is_refused(small):
    with stub(small) as predictions:
        request = grpc_request(np.full(1, b"x" * 2000, object), "text", "texts")
        with pytest.raises(grpc.RpcError) as error:
            predictions.Predict(request)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("name", ["max_request_bytes", "max_concurrent_requests", "client_timeout"])
def test_a_limit_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0: expected a positive number"):
        Limits(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("client_timeout", "nan", "a positive number"),
        ("grace_seconds", "nan", "0 or more"),
        ("client_timeout", "inf", "1000000000 seconds at most"),
        ("grace_seconds", "inf", "1000000000 seconds at most"),
    ],
)
def test_a_time_without_an_end_is_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}={value}: expected {expected}"):
        Limits(**{name: float(value)})


@pytest.mark.parametrize("sent", [b"", HEAD[:30]])
def test_a_head_that_does_not_come_is_not_waited_for(hasty, sent):
    with connected(hasty) as connection:
        connection.sendall(sent)
        assert received(connection) == b""


def test_a_second_head_that_does_not_come_is_not_waited_for(hasty):
    with connected(hasty) as connection:
        connection.sendall(HEAD + ROW)
        answer = b""
        while not answer.endswith(b"]\n    ]\n}"):
            answer += connection.recv(65536)
        connection.sendall(HEAD[:30])
        assert received(connection) == b""
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("trickled", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(hasty, trickled):
    with connected(hasty) as connection:
        connection.sendall(HEAD)

        def trickle():
            with contextlib.suppress(OSError):
                for byte in ROW[:-1]:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.1)

        if trickled:
            threading.Thread(target=trickle, daemon=True).start()
        assert exchange(hasty, HEAD + ROW).startswith(b"HTTP/1.1 200 OK")
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout") and b"connection: close" in head
    assert re.fullmatch(r"The body did not come within 0.5\d* s", json.loads(body)["error"])


def test_bodies_that_are_kept_are_limited_together():
    with ModelServer(PROBE, limits=Limits(1000, max_memory_bytes=8000)) as server:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connected(server)) for _ in range(9)]
            for connection in connections:
                connection.sendall(HEAD.replace(b"29", b"1000") + b"x" * 990)
            (refused,) = select.select(connections, [], [], 60)[0]
            head, _, body = received(refused).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body) == {"error": "Too many large requests at once: try again later"}
        deadline = time.monotonic() + 60  # the others are gone, and their bodies with them
        while ask(server.rest_port, body=b" " * 990)[0] == 503:
            assert time.monotonic() < deadline


BOMB = b'{"signature_name": "text", "inputs": "%s"}' % (b"x" * 5_000_000)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (
            b'{"instances": [%s]}' % b",".join([b"[]"] * 20_000),
            429,
            r"takes about \d{7} bytes of me",
        ),
        (
            b'{"instances": [[%s 1]]}' % (b"1," * 20_000),
            429,
            r"bytes of memory, of 1500000 for all",
        ),
        (gzip.compress(BOMB), 429, r"The request takes about \d{7} bytes of memory"),
        (
            b'{"instances": [%s]}' % b",".join([b"[1, 2, 3, 4]"] * 51),
            400,
            "x: 51 rows, expected max",
        ),
        (b'{"instances": [%s]}' % b",".join([b"[1, 2, 3, 4]"] * 50), 200, None),
        (ROW + b" " * 400_000, 200, None),
    ],
)
def test_memory_is_bounded_by_what_a_request_becomes(bounded, body, status, error):
    connection = http.client.HTTPConnection("127.0.0.1", bounded.rest_port, timeout=60)
    headers = {"content-encoding": "gzip"} if body.startswith(b"\x1f\x8b") else {}
    with contextlib.closing(connection):
        connection.request("POST", PREDICT, body, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    assert response.status == status
    assert error is None or re.search(error, answer["error"])
    wait_for_no_memory(bounded)


@pytest.fixture(scope="module")
def bounded():
    limits = Limits(10_000_000, max_rows=50, max_memory_bytes=1_500_000)
    with ModelServer(PROBE, limits=limits) as running:
        yield running


def test_a_message_is_bounded_by_what_it_declares(bounded):
    declared = grpc_request(np.float32([[1, 2, 3, 4]]))
    values = declared.inputs["x"]
    values.ClearField("tensor_content")
    values.float_val.extend([1, 2, 3])
    filler = grpc_request(np.float32([[1, 2, 3, 4]]))  # of another dtype, to be counted for values
    filler.inputs["x"].CopyFrom(values)
    filler.inputs["x"].bool_val.extend([True] * 4)
    shapeless, negative, resource = (grpc_request(np.ones((2, 4), np.float32)) for _ in range(3))
    shapeless.inputs["x"].tensor_shape.unknown_rank = True
    negative.inputs["x"].tensor_shape.dim[0].size = -1
    resource.inputs["x"].dtype = 20
    many = grpc_request(np.ones((51, 4), np.float32))
    large = grpc_request(np.ones((30, 5000), np.float32))
    with stub(bounded) as predictions:
        for request, code, message in (
            (declared, "INVALID_ARGUMENT", "tensor parsing error: x: 4 elements declared, 3 held"),
            (filler, "INVALID_ARGUMENT", "tensor parsing error: x: 4 elements declared, 0 held"),
            (shapeless, "INVALID_ARGUMENT", "tensor parsing error: x: not a whole shape"),
            (negative, "INVALID_ARGUMENT", "tensor parsing error: x: not a whole shape"),
            (resource, "INVALID_ARGUMENT", "tensor parsing error: x"),
            (many, "INVALID_ARGUMENT", "x: 51 rows, expected max_rows=50 at most"),
            (large, "RESOURCE_EXHAUSTED", "of memory, of 1500000 for all"),
        ):
            with pytest.raises(grpc.RpcError) as error:
                predictions.Predict(request, timeout=60)
            assert error.value.code().name == code
            assert message in error.value.details()


def test_requests_share_their_memory():
    memory = Memory(100)
    with memory.request() as share, memory.request() as other:
        share.take(60)
        with pytest.raises(RequestError, match="about 101 bytes of memory, of 100 for all"):
            share.take(41)
        with pytest.raises(Overloaded, match="Too many large requests at once"):
            other.take(41)
        share.take(-30)
        other.take(70)
        other.keep(20)
        share.take(50)
    assert memory.taken == 0


def test_a_body_that_turns_out_too_large_is_not_kept(small):
    for _ in range(10):
        with connected(small) as connection:
            connection.sendall(HEAD.replace(b"29", b"1500") + b"x" * 900)
            time.sleep(0.02)  # so that it comes in two parts
            connection.sendall(b"x" * 600)
            assert received(connection).startswith(b"HTTP/1.1 413")
    assert predict(small.rest_port) == (200, ANSWER)


def test_a_body_that_keeps_coming_has_more_time():
    limits = Limits(client_timeout=0.3)
    body = b'{"signature_name": "text", "inputs": "%s"}' % (b"x" * 2_000_000)
    with ModelServer(PROBE, limits=limits) as server, connected(server) as connection:
        connection.sendall(HEAD.replace(b"29", b"%d" % len(body)))
        connection.sendall(body[:1_500_000])
        time.sleep(1)
        connection.sendall(body[1_500_000:])
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
