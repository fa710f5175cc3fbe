"""The server as it is operated: batching, limits, slow clients, health, metrics, its end."""

import concurrent.futures
import contextlib
import gzip
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from asking import (
    ANSWER,
    HEAD,
    PREDICT,
    PROBE,
    ROW,
    Held,
    ask,
    connected,
    grpc_request,
    predict,
    received,
    stub,
    wait_for_no_memory,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from align_tf.cli.main import main
from align_tf.server import Limits, ModelServer, grpc_services, servables
from align_tf.server.batching import BatchingParameters
from align_tf.server.limits import Memory
from align_tf.server.model_server import _bind, serve
from align_tf.server.prometheus import DEFAULT_PATH, Metrics, read_monitoring_config
from align_tf.server.status_codes import Overloaded, RequestError

# --- batching ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched():
    parameters = BatchingParameters(
        max_batch_size=8,
        batch_timeout_micros=20_000,
        max_enqueued_batches=100,
        num_batch_threads=2,
        allowed_batch_sizes=(1, 4, 8),
        pad_variable_length_inputs=True,
    )
    with ModelServer(PROBE, batching=parameters, metrics_path=DEFAULT_PATH) as running:
        yield running


def metric(server, name):
    """Returns the sum of a metric's lines, given the beginning of them."""
    page = ask(server.rest_port, "GET", DEFAULT_PATH)[1].decode()
    lines = [line for line in page.splitlines() if line.startswith(f":tensorflow:serving:{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_callers_that_are_batched_get_their_own_answers(batched):
    def one(number):
        x = np.float32([[number, 0, 0, 7]] * (1 + number % 3))
        expected = x @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 7) * 2
        if number % 5 == 0:
            status, answer = predict(batched.rest_port, body=b'{"instances": [[1]]}')
            return status == 400 and "Matrix size-incompatible" in answer["error"]
        if number % 5 == 1:
            with pytest.raises(grpc.RpcError) as error:
                predictions.Predict(grpc_request(x.astype(int)))
            return error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        if number % 5 == 2:
            body = json.dumps({"instances": x.tolist()})
            return np.allclose(predict(batched.rest_port, body=body)[1]["predictions"], expected)
        outputs = predictions.Predict(grpc_request(x)).outputs
        return np.allclose(tf.make_ndarray(outputs["y"]), expected)

    with stub(batched) as predictions, concurrent.futures.ThreadPoolExecutor(16) as callers:
        assert all(callers.map(one, range(200)))
    assert metric(batched, "batching_session:queuing_latency_count") >= 160


def test_callers_that_wait_share_a_batch(batched, monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        held = Held(batched, monkeypatch)
        answers = []
        for _ in range(batched._batcher.parameters.num_batch_threads):
            answers.append(callers.submit(predict, batched.rest_port))
            held.wait()
        answers += [callers.submit(predict, batched.rest_port) for _ in range(6)]
        while sum(len(batch.tasks) for batch in batched._batcher._waiting) < 6:
            time.sleep(0.01)
        before = metric(batched, "batching_session:wrapped_run_count")
        held.go.set()
        assert [answer.result() for answer in answers] == [(200, ANSWER)] * 8
    assert metric(batched, "batching_session:wrapped_run_count") - before == 1


def test_label_lists_of_different_lengths_share_a_batch(batched):
    def one(labels):
        row = {"image_bytes": {"b64": "YWI="}, "labels": ["x" * n for n in range(1, labels + 1)]}
        body = json.dumps({"signature_name": "classify", "instances": [row]})
        status, answer = predict(batched.rest_port, body=body)
        logits = answer["predictions"][0]["logits"]
        return status == 200 and logits[:labels] == [n / 2 for n in range(1, labels + 1)]

    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        assert all(callers.map(one, [1, 2, 3, 4] * 6))


def test_an_output_filter_computes_nothing_else_anew(server, monkeypatch):
    servable = server._servables.find(grpc_request(0.0).model_spec)
    fetched, run = set(), servable._run

    def noted(signature, names, inputs):
        fetched.add(names)
        return run(signature, names, inputs)

    monkeypatch.setattr(servable, "_run", noted)
    with stub(server) as predictions:
        request = grpc_request(np.array([b"ab"], object), "text", "texts")
        for names in ([], ["length"], ["echo", "length"]):
            request.ClearField("output_filter")
            request.output_filter.extend(names)
            outputs = predictions.Predict(request).outputs
            assert set(outputs) == set(names or ["echo", "echo_bytes", "length"])
            assert outputs["length"].int_val == [2]
    assert fetched == {("echo", "echo_bytes", "length")}


def test_what_cannot_be_batched_is_refused(batched):
    body = b'{"signature_name": "scalar", "inputs": 1}'
    error = "Batching Run() input tensors must have at least one dimension: t"
    assert predict(batched.rest_port, body=body) == (400, {"error": error})
    error = "Task size 9 is larger than maximum input batch size 8"
    body = json.dumps({"instances": [[1, 2, 3, 4]] * 9})
    assert predict(batched.rest_port, body=body) == (400, {"error": error})


def test_a_full_batching_queue_is_unavailable(monkeypatch):
    parameters = BatchingParameters(1, max_enqueued_batches=1, num_batch_threads=1)
    with (
        ModelServer(PROBE, batching=parameters) as server,
        stub(server) as predictions,
        concurrent.futures.ThreadPoolExecutor(2) as callers,
    ):
        held = Held(server, monkeypatch)
        running = callers.submit(predict, server.rest_port)
        held.wait()
        queued = callers.submit(predict, server.rest_port)
        while not server._batcher._waiting:
            time.sleep(0.01)
        error = "The batch scheduling queue to which this task was submitted is full"
        assert predict(server.rest_port) == (503, {"error": error})
        with pytest.raises(grpc.RpcError, match=error) as refusal:
            predictions.Predict(grpc_request(np.float32([[1, 2, 3, 4]])))
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
        held.go.set()
        assert (running.result(), queued.result()) == ((200, ANSWER), (200, ANSWER))


# --- limits --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """One with room for two predictions, which takes 1000 bytes."""
    limits = Limits(1000, max_concurrent_requests=1, max_queued_requests=1)
    with ModelServer(PROBE, limits=limits) as running:
        yield running


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
    with pytest.raises(ValueError, match=f"{name} is 0, expected a positive number"):
        Limits(**{name: 0})


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


# --- raw HTTP ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with ModelServer(PROBE, metrics_path=DEFAULT_PATH) as running:
        yield running


def exchange(server, request):
    with connected(server) as connection:
        connection.sendall(request)
        with contextlib.suppress(OSError):  # refused already
            connection.shutdown(socket.SHUT_WR)
        return received(connection)


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


# --- health and metrics --------------------------------------------------------------------


def test_health(server):
    with stub(server, health_pb2_grpc.HealthStub) as checks:
        for service in ("", "tensorflow.serving.PredictionService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert checks.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            checks.Check(health_pb2.HealthCheckRequest(service="none"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_metrics_are_those_of_tensorflow_serving():
    with ModelServer(PROBE, metrics_path=DEFAULT_PATH) as server, stub(server) as predictions:
        for body in (ROW, ROW, b"{"):
            ask(server.rest_port, body=body)
        ask(server.rest_port, path="/v1/models/made-up:predict")
        for path in ("/v1/models/align", "/v1/models/align/metadata"):
            ask(server.rest_port, "GET", path)
        predictions.Predict(grpc_request(np.float32([[1, 2, 3, 4]])))
        page = ask(server.rest_port, "GET", DEFAULT_PATH)[1].decode()
    count = ":tensorflow:serving:request_count"
    probes = 'model_name="align",API="",entrypoint="REST"'
    assert f":tensorflow:serving:request_latency_count{{{probes}}} 2\n" in page
    assert f"# TYPE {count} counter" in page
    assert f'{count}{{model_name="align",status="OK"}} 5\n' in page
    assert f'{count}{{model_name="align",status="INVALID_ARGUMENT"}} 1\n' in page
    assert f'{count}{{model_name="",status="NOT_FOUND"}} 1\n' in page
    latency = ":tensorflow:serving:request_latency"
    rest = 'model_name="align",API="predict",entrypoint="REST"'
    assert f"# TYPE {latency} histogram" in page
    assert f"{latency}_count{{{rest}}} 2\n" in page
    assert f'{latency}_bucket{{{rest},le="+Inf"}} 2\n' in page
    assert re.search(re.escape(f'{latency}_bucket{{{rest},le="18"}}') + r" \d+\n", page)
    grpc_labels = 'model_name="align",API="Predict",entrypoint="GRPC"'
    assert f"{latency}_count{{{grpc_labels}}} 1\n" in page
    runtime = ":tensorflow:serving:runtime_latency_count"
    assert f'{runtime}{{model_name="align",API="Predict",runtime="TF1"}} 3\n' in page


def test_a_histogram_counts_up_to_each_limit():
    metrics = Metrics()
    for micros in (9, 10, 11, 1e12):
        metrics.observe("request_latency", micros / 1e6, 'a"b\\', "predict", "REST")
    lines = metrics.page().decode().splitlines()
    labels = r'{model_name="a\"b\\",API="predict",entrypoint="REST"'
    assert len(lines) == 1 + 34 + 2
    assert lines[1] == f':tensorflow:serving:request_latency_bucket{labels},le="10"}} 2'
    assert lines[2] == f':tensorflow:serving:request_latency_bucket{labels},le="18"}} 3'
    assert lines[33].endswith("} 3") and lines[34].endswith('le="+Inf"} 4')
    assert lines[36] == f":tensorflow:serving:request_latency_count{labels}}} 4"


def test_metrics_are_off_by_default(small):
    assert ask(small.rest_port, "GET", DEFAULT_PATH)[0] == 404


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", None),
        ("prometheus_config { enable: false path: '/m' }", None),
        ("prometheus_config { enable: true }", "/monitoring/prometheus/metrics"),
        ("prometheus_config { enable: true, path: '/m' }", "/m"),
    ],
)
def test_monitoring_config_file(tmp_path, text, path):
    (tmp_path / "monitoring").write_text(text)
    assert read_monitoring_config(tmp_path / "monitoring") == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prometheus { enable: true }", "not a monitoring config file"),
        ("prometheus_config { enable: true path: 'm' }", 'path is "m"'),
        ("prometheus_config { enable: true path: '/v1/models' }", 'path is "/v1/models"'),
    ],
)
def test_a_wrong_monitoring_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "monitoring"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_monitoring_config(path)
    assert str(path) in str(error.value)


# --- its versions and its end --------------------------------------------------------------


class Traffic:
    """Clients that ask without pause; each answer and failure is kept."""

    def __init__(self, rest_port, clients=4):
        self.port, self.answers, self.failures = rest_port, [], []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *exception):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def wait_for_more(self, count=20):
        enough, deadline = len(self.answers) + count, time.monotonic() + 60
        while len(self.answers) < enough:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def run(self):
        while not self.stopped.is_set():
            try:
                self.answers.append(predict(self.port))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(error)
                time.sleep(0.1)


@pytest.mark.parametrize("batching", [None, BatchingParameters(8, 1000, num_batch_threads=2)])
def test_a_new_version_fails_no_request(tmp_path, monkeypatch, batching):
    monkeypatch.setattr(servables, "POLL_SECONDS", 0.05)
    shutil.copytree(PROBE / "1", tmp_path / "1")
    with ModelServer(tmp_path, batching=batching) as server, Traffic(server.rest_port) as traffic:
        shutil.copytree(PROBE / "2", tmp_path / "part")
        (tmp_path / "part").rename(tmp_path / "2")
        while server._servables.versions("align") != [2]:
            time.sleep(0.01)
        traffic.wait_for_more()
    one = {"predictions": [[8.5714283, 10.0, 11.4285717]]}
    assert traffic.failures == []
    assert traffic.answers[0] == (200, one) and traffic.answers[-1] == (200, ANSWER)
    assert all(answer in ((200, one), (200, ANSWER)) for answer in traffic.answers)


def test_what_is_in_flight_finishes_when_the_server_stops(monkeypatch):
    server = ModelServer(PROBE)
    server.start()
    with (
        stub(server) as predictions,
        stub(server, health_pb2_grpc.HealthStub) as checks,
        concurrent.futures.ThreadPoolExecutor(4) as callers,
    ):
        held = Held(server, monkeypatch)
        watched = checks.Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        rest = callers.submit(predict, server.rest_port)
        call = predictions.Predict.future(grpc_request(np.float32([[1, 2, 3, 4]])))
        held.wait(2)
        stopping = callers.submit(server.stop)
        assert [answer.status for answer in watched] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        refused = None
        while refused is None:
            try:
                ask(server.rest_port, "GET", "/v1/models/align")
                time.sleep(0.01)
            except OSError as error:
                refused = error
        with pytest.raises(grpc.RpcError) as error:
            predictions.Predict(grpc_request(np.float32([[1, 2, 3, 4]])))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        held.go.set()
        assert rest.result() == (200, ANSWER)
        assert list(call.result().outputs["y"].float_val)[1] == 20.0
        stopping.result(60)


def test_streams_of_health_end_when_the_server_stops():
    status = health_pb2.HealthCheckResponse
    server = ModelServer(PROBE)
    server.start()
    with stub(server, health_pb2_grpc.HealthStub) as checks:
        services = ["", "tensorflow.serving.ModelService", "none"]
        streams = [checks.Watch(health_pb2.HealthCheckRequest(service=name)) for name in services]
        found = [next(stream).status for stream in streams]
        assert found == [status.SERVING, status.SERVING, status.SERVICE_UNKNOWN]
        gone = checks.Watch(health_pb2.HealthCheckRequest())
        next(gone)
        gone.cancel()
        server.stop()
        found = [[answer.status for answer in stream] for stream in streams]
        assert found == [[status.NOT_SERVING], [status.NOT_SERVING], []]
        assert {stream.code() for stream in streams} == {grpc.StatusCode.OK}  # not cut off


def test_a_request_on_its_way_is_answered_when_the_server_stops():
    server = ModelServer(PROBE)
    server.start()
    with connected(server) as connection, concurrent.futures.ThreadPoolExecutor(1) as callers:
        ask(server.rest_port, "GET", "/v1/models/align")  # so that the first is accepted
        stopping = callers.submit(server.stop)
        with contextlib.suppress(OSError):
            while True:
                ask(server.rest_port, "GET", "/v1/models/align")
        connection.sendall(HEAD + ROW)
        assert received(connection).startswith(b"HTTP/1.1 200 OK")
        stopping.result(60)


@pytest.mark.parametrize("given", [None, "0"])
def test_weights_are_frozen_for_what_is_served_alone(tmp_path, monkeypatch, given):
    name = "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    seen = []
    monkeypatch.setattr(ModelServer, "wait", lambda *_: seen.append(os.environ.get(name)))
    folder = shutil.copytree(PROBE / "2", tmp_path / "2")
    (folder / "assets.extra").mkdir()
    for metadata in ('{"dtype": "bfloat16"}', '{"dtype": "float32"}', "[]", "{"):
        (folder / "assets.extra" / "align_tf.json").write_text(metadata)
        serve(ModelServer(tmp_path))
    serve(ModelServer(PROBE))
    assert seen == [given or "1", given, given, given, given]
    assert os.environ.get(name) == given
    weights = tf.Variable(tf.ones((64, 64)))

    @tf.function
    def layer(x):
        return tf.nn.relu(tf.nn.bias_add(tf.matmul(x, weights), tf.zeros(64)))

    assert layer(tf.ones((8, 64)))[0, 0] == 64
    weights.assign(2 * weights)  # as a step of a training does
    assert layer(tf.ones((8, 64)))[0, 0] == 128


def test_a_port_refuses_until_the_models_are_loaded(monkeypatch, keep_port):
    server = ModelServer(PROBE, rest_port=keep_port(), grpc_port=keep_port())
    load = server._servables.start

    def loading():
        for port in (server.rest_port, server.grpc_port):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        load()

    monkeypatch.setattr(server._servables, "start", loading)
    with server:
        assert predict(server.rest_port) == (200, ANSWER)


def test_small_answers_are_not_held_back():
    with _bind("127.0.0.1", 0) as listening:  # asyncio sets TCP_NODELAY where it reads this
        assert listening.proto == socket.IPPROTO_TCP


@contextlib.contextmanager
def served(*flags):
    """Runs `align-tf serve` in a process of its own; gives it once it listens."""
    command = [sys.executable, "-m", "align_tf.cli", "serve", os.fspath(PROBE), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any(line.startswith("Serving ") for line in process.stderr)
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_kill_loses_what_is_in_flight_and_sigterm_nothing(tmp_path, keep_port):
    (tmp_path / "batching").write_text("max_batch_size { value: 8 }")
    (tmp_path / "monitoring").write_text("prometheus_config { enable: true }")
    port = keep_port()
    flags = ["--rest-port", str(port), "--grpc-port", "0", "--max-concurrent-requests", "16"]
    flags += ["--enable-batching", "--batching-parameters-file", os.fspath(tmp_path / "batching")]
    flags += ["--monitoring-config-file", os.fspath(tmp_path / "monitoring")]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(served(*flags))
        traffic = stack.enter_context(Traffic(port))
        assert b"wrapped_run_count" in ask(port, "GET", DEFAULT_PATH)[1]
        first.kill()
        first.wait()
        second = stack.enter_context(served(*flags))
        traffic.wait_for_more()
        broken = [e for e in traffic.failures if not isinstance(e, ConnectionRefusedError)]
        assert len(broken) <= 4  # one of each client
        traffic.failures.clear()
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == 0
        traffic.stopped.set()
        assert "Traceback" not in second.stderr.read()
    # Reset is what the system does to a connection that the server had not accepted.
    unsent = (ConnectionRefusedError, ConnectionResetError)
    assert all(type(error) in unsent for error in traffic.failures), traffic.failures
    assert all(answer == (200, ANSWER) for answer in traffic.answers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batching-parameters-file", "x"], "--batching-parameters-file is for"),
        (["--enable-batching", "--batching-parameters-file", "./x"], "x: no such batching"),
        (["--monitoring-config-file", "./x"], "x: no such monitoring config file"),
        (["--max-request-bytes", "0"], "max_request_bytes is 0"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(capsys, flags, message):
    assert main(["serve", os.fspath(PROBE), *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and message in last
