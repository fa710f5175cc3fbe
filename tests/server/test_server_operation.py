"""The server as it is operated: its versions, its ports, its flags and its end."""

import concurrent.futures
import contextlib
import http.client
import os
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
    PROBE,
    ROW,
    Held,
    ask,
    connected,
    grpc_request,
    predict,
    received,
    stub,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from align_tf.cli.main import main
from align_tf.server import ModelServer, servables
from align_tf.server.batching import BatchingParameters
from align_tf.server.model_server import _bind, serve
from align_tf.server.prometheus import DEFAULT_PATH


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


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_is_swallowed_while_it_starts_ends_it(monkeypatch, capsys):
    start = ModelServer.start

    def swallows(server):
        start(server)
        with contextlib.suppress(KeyboardInterrupt):  # as foreign code may
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ModelServer, "start", swallows)
    monkeypatch.setattr(ModelServer, "wait", lambda *_: pytest.fail("it waits for another one"))
    assert main(["serve", str(PROBE), "--rest-port", "0", "--grpc-port", "0"]) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == ["Stopping ...", "align-tf: stopped"]


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
        (["--max-request-bytes", "0"], "--max-request-bytes 0: expected a positive number"),
        (["--grace-seconds", "-1"], "--grace-seconds -1.0: expected 0 or more"),
        (["--model-name", ""], "--model-name '': expected it not to be empty"),
        (["--host", ""], "--host '': expected it not to be empty"),
        (
            ["--rest-port", "7", "--grpc-port", "7"],
            "--grpc-port 7: expected another than --rest-port 7",
        ),
    ],
)
def test_a_wrong_flag_ends_in_one_line(capsys, flags, message):
    assert main(["serve", os.fspath(PROBE), *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and message in last
