"""What the server holds of requests and answers, and how long it waits for slow clients."""

import concurrent.futures
import contextlib
import gzip
import http.client
import json
import random
import socket
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
    ask,
    connected,
    grpc_request,
    predict,
    received,
    stub,
    wait_for_no_memory,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import predict_pb2

from align_tf.server import Limits, ModelServer, grpc_calls, grpc_services
from align_tf.server.message_memory import memory
from align_tf.server.status_codes import RequestError

PREDICTION = "/tensorflow.serving.PredictionService/Predict"
GRPC_ROW = grpc_request(np.float32([[1, 2, 3, 4]]))


def field(number, content):
    """A field of bytes, as it lies in a message."""
    size, length = len(content), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def with_tensor(content):
    return field(2, field(1, b"x") + field(2, content))


# What a message of a few bytes each grows to many times as many: a thousand of it.
GROWING = {
    "inputs": field(2, field(1, b"") + field(2, b"")) * 1000,
    "names of outputs": field(3, b"") * 1000,
    "strings": with_tensor(field(8, b"") * 1000),
    "dimensions": with_tensor(field(2, field(2, b"") * 1000)),
    "ids": with_tensor(field(10, b"\1" * 1000)),
    "halves": with_tensor(field(13, b"\1" * 1000)),
    "handles": with_tensor(field(14, field(6, b"") * 1000)),
    "variants": with_tensor(field(15, field(3, b"") * 1000)),
}


@pytest.mark.parametrize("kind", GROWING)
def test_what_a_message_becomes_is_counted_before_it_is_parsed(bounded, monkeypatch, kind):
    assert predict_pb2.PredictRequest.FromString(GROWING[kind])
    assert memory(GROWING[kind]) > 30_000
    monkeypatch.setattr(grpc_services, "parsed", pytest.fail)
    with (
        grpc.insecure_channel(f"127.0.0.1:{bounded.grpc_port}") as channel,
        pytest.raises(grpc.RpcError) as error,
    ):
        channel.unary_unary(PREDICTION)(GROWING[kind], timeout=60)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "bytes of memory, of 30000 for all" in error.value.details()
    assert bounded._gate.memory.taken == 0


def test_what_images_and_numbers_become_is_not_overrated():
    for array in (np.full(2, b"\x42" * 10**6, object), np.ones((100, 2500), np.float32)):
        message = grpc_request(array).SerializeToString()
        assert 3 * len(message) <= memory(message) < 3.01 * len(message)


def test_a_message_of_too_many_values_is_refused(monkeypatch):
    monkeypatch.setattr("align_tf.server.message_memory.MAX_FIELDS", 1000)
    for kind in ("inputs", "strings", "dimensions"):
        with pytest.raises(RequestError, match="has more than 1000 values and fields"):
            memory(GROWING[kind])


def test_bytes_that_are_no_message_are_refused(bounded):
    rng, codes = random.Random(0), set()
    for kind in list(GROWING.values()) * 100:
        message = bytearray(kind[: rng.randrange(200)])
        for _ in range(rng.randrange(3)):
            message[rng.randrange(len(message) + 1) :] = rng.randbytes(5)
        with contextlib.suppress(RequestError):
            assert memory(bytes(message)) >= 3 * len(message)
    with grpc.insecure_channel(f"127.0.0.1:{bounded.grpc_port}") as channel:
        for message in (b"\x12", b"\xff" * 20, b"\x0a\x05", b"\x12\x03\x12\x01\x42"):
            with pytest.raises(grpc.RpcError, match="not a PredictRequest") as error:
                channel.unary_unary(PREDICTION)(message, timeout=60)
            codes.add(error.value.code().name)
    assert codes <= {"INVALID_ARGUMENT", "INTERNAL"}


@pytest.fixture(scope="module")
def bounded():
    limits = Limits(10_000_000, max_memory_bytes=30_000)
    with ModelServer(PROBE, limits=limits) as running:
        yield running


def test_answers_are_counted(bounded):
    rows = np.ones((150, 4), np.float32)
    with stub(bounded) as predictions:
        with pytest.raises(grpc.RpcError, match="bytes of memory, of 30000 for all"):
            predictions.Predict(grpc_request(rows), timeout=60)
        assert predictions.Predict(grpc_request(rows[:50]), timeout=60).outputs["y"]
    body = json.dumps({"instances": np.ones((60, 4), int).tolist()})
    status, answer = predict(bounded.rest_port, body=body)
    assert (status, answer["error"][:26]) == (429, "The request takes about 62")
    assert predict(bounded.rest_port) == (200, ANSWER)
    wait_for_no_memory(bounded)


LONG = b'{"signature_name": "text", "inputs": "%s"}' % (b"x" * 2**24)


def test_an_answer_is_counted_until_it_is_taken():
    with ModelServer(PROBE) as server, connected(server) as connection:
        connection.sendall(HEAD.replace(b"29", b"%d" % len(LONG)) + LONG)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert server._gate.memory.taken > 2**24
        connection.shutdown(socket.SHUT_WR)
        assert received(connection).endswith(b'"length": 16777216\n    }\n}')
        wait_for_no_memory(server)


def test_a_client_that_does_not_take_its_answer_is_let_go_of(hasty):
    with connected(hasty) as connection:
        connection.sendall(HEAD.replace(b"29", b"%d" % len(LONG)) + LONG)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        wait_for_no_memory(hasty)
        assert len(received(connection)) < 39_000_000  # bytes of the answer


@pytest.fixture(scope="module")
def hasty():
    """One that waits for a client for half a second, with room for one message that comes."""
    limits = Limits(max_request_bytes=3 * 10**9, max_memory_bytes=4 * 10**9, client_timeout=0.5)
    assert limits.messages_at_once == 1
    with ModelServer(PROBE, limits=limits) as running:
        yield running


@contextlib.contextmanager
def stalled(server, *methods):
    """Calls that are begun, but whose messages do not come."""
    end = threading.Event()

    def nothing():
        end.wait(60)
        yield b""

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        calls = [channel.stream_stream(method)(nothing()) for method in methods]
        try:
            yield calls
        finally:
            end.set()


CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"


def test_a_message_that_does_not_come_is_not_waited_for(hasty):
    health = health_pb2.HealthCheckRequest()
    with stalled(hasty, PREDICTION, PREDICTION, *[CHECK, WATCH, STATUS] * 2) as calls:
        assert predict(hasty.rest_port) == (200, ANSWER)
        for call in calls:
            with pytest.raises(grpc.RpcError) as error:
                next(call)
            assert error.value.code().name in ("CANCELLED", "RESOURCE_EXHAUSTED")
        with stub(hasty) as predictions, stub(hasty, health_pb2_grpc.HealthStub) as checks:
            assert predictions.Predict(GRPC_ROW, timeout=60).outputs["y"]
            assert checks.Check(health, timeout=60).status == 1
            assert next(iter(checks.Watch(health))).status == 1


def test_messages_that_come_wait_for_those_that_came_before(monkeypatch):
    limits = Limits(max_request_bytes=10**8, max_memory_bytes=10**8)
    rooms = []
    make = grpc_calls.Calls.__init__

    def noted(calls, limits):
        make(calls, limits)
        rooms.append(calls.rooms)

    monkeypatch.setattr(grpc_calls.Calls, "__init__", noted)
    with (
        ModelServer(PROBE, limits=limits) as server,
        concurrent.futures.ThreadPoolExecutor(1) as callers,
        stub(server) as predictions,
        stalled(server, PREDICTION) as (call,),
    ):
        while rooms[0]._value:
            time.sleep(0.01)
        waiting = callers.submit(predictions.Predict, GRPC_ROW, timeout=60)
        assert predict(server.rest_port) == (200, ANSWER)
        assert not waiting.done()
        call.cancel()
        assert waiting.result().outputs["y"]


def test_a_message_without_content_is_told(hasty):
    with grpc.insecure_channel(f"127.0.0.1:{hasty.grpc_port}") as channel:
        for method, message in ((PREDICTION, "The call has no message"), (CHECK, "no message")):
            with pytest.raises(grpc.RpcError, match=message) as error:
                channel.stream_unary(method)(iter([]), timeout=60)
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError, match="larger than 65536 bytes") as error:
            channel.unary_unary(STATUS)(b"x" * 70_000, timeout=60)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


MEMBERS = gzip.compress(ROW[:9]) + gzip.compress(b"") + gzip.compress(ROW[9:])


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (MEMBERS, 200, None),
        (MEMBERS + b"\0\0 what follows", 200, None),
        (MEMBERS[:-9], 400, "it is cut off"),
        (MEMBERS + b"\x1f\x8b", 400, "it is cut off"),
        (MEMBERS + b"\x1f\x8bxxxx", 400, "Failed to decompress the gzip body"),
        (gzip.compress(b"") * 1001, 400, "it has more than 1000 members"),
        (b"", 400, "The document is empty"),
    ],
    ids=["three", "what follows", "cut off", "a magic", "broken", "too many", "none"],
)
def test_a_gzip_body_may_have_several_members(hasty, body, status, error):
    connection = http.client.HTTPConnection("127.0.0.1", hasty.rest_port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", PREDICT, body, {"content-encoding": "gzip"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    assert response.status == status
    assert answer == ANSWER if error is None else error in answer["error"]
    assert ask(hasty.rest_port, "GET", "/v1/models/align")[0] == 200
