"""A stop has an end, whatever runs then."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
import tensorflow as tf
from asking import HEAD, PROBE, ROW, Held, connected, grpc_request, predict, received, stub

from align_tf.cli import serve as serve_command
from align_tf.cli.main import main
from align_tf.server import Limits, ModelServer, model_server
from align_tf.server.batching import BatchingParameters


@pytest.mark.parametrize("batching", [None, BatchingParameters(8, num_batch_threads=1)])
def test_a_stop_does_not_wait_for_a_run_that_goes_on(monkeypatch, batching):
    server = ModelServer(PROBE, limits=Limits(grace_seconds=0.2), batching=batching)
    server.start()
    with stub(server) as predictions, concurrent.futures.ThreadPoolExecutor(2) as callers:
        held = Held(server, monkeypatch)
        rest = callers.submit(predict, server.rest_port)
        held.wait()
        call = predictions.Predict.future(grpc_request(np.float32([[1, 2, 3, 4]])))
        while server._gate.inside < 2:
            threading.Event().wait(0.01)
        assert server.stop() == ["2 predictions"]
        assert rest.result() == (503, {"error": "The server is stopping"})
        assert call.exception().code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        held.go.set()


def test_a_stop_does_not_wait_for_a_version_that_loads(tmp_path, monkeypatch):
    server = ModelServer(PROBE, limits=Limits(grace_seconds=0))
    loading, go = threading.Event(), threading.Event()
    server.start()

    def load(config):
        loading.set()
        assert go.wait(60)

    monkeypatch.setattr(server._servables, "_update", load)
    assert loading.wait(60)
    assert server.stop() == ["the load of a version"]
    go.set()


@pytest.mark.parametrize("sent", [HEAD[:40], HEAD, HEAD + ROW[:9]])
def test_a_stop_does_not_wait_for_half_a_request(sent):
    server = ModelServer(PROBE, limits=Limits(grace_seconds=600))
    server.start()
    with connected(server) as connection, concurrent.futures.ThreadPoolExecutor(1) as callers:
        connection.sendall(sent)
        assert predict(server.rest_port)[0] == 200  # so that the first is accepted
        assert callers.submit(server.stop).result(60) == []
        assert received(connection) == b""


def test_what_is_left_at_work_is_told(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(model_server, "serve", lambda server: ["2 predictions", "the load"])
    monkeypatch.setattr(serve_command.os, "_exit", ended.append)
    main(["serve", os.fspath(PROBE), "--grace-seconds", "3"])
    assert ended == [0]
    line = "align-tf: broken off 3 s after the signal to stop: 2 predictions and the load"
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.slow
@pytest.mark.parametrize("second", [None, signal.SIGINT])
def test_a_process_ends_though_tensorflow_hangs(tmp_path, second):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None, 4], "x")
        never = tf.queue.FIFOQueue(1, tf.float32, shared_name="never").dequeue()
        folder = os.fspath(tmp_path / "1")
        tf.compat.v1.saved_model.simple_save(session, folder, {"x": x}, {"y": x + never})
    grace = "600" if second else "0.5"
    command = [sys.executable, "-m", "align_tf.cli", "serve", os.fspath(tmp_path)]
    command += ["--rest-port", "0", "--grpc-port", "0", "--grace-seconds", grace]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        concurrent.futures.ThreadPoolExecutor(1) as callers,
    ):
        try:
            line = next(line for line in process.stderr if line.startswith("Serving "))
            port = int(line.rpartition("http://127.0.0.1:")[2].partition("/")[0])
            answer = callers.submit(predict, port)
            while predict(port, method="GET", path="/v1/models/align")[0] != 200:
                pass
            process.send_signal(signal.SIGTERM)
            assert next(process.stderr) == "Stopping ...\n"
            if second:
                process.send_signal(second)
            code, told = process.wait(120), process.stderr.read()
        finally:
            process.kill()
        if second:
            assert code == -second and told == ""
            assert answer.exception() is not None
        else:
            told_line = "align-tf: broken off 0.5 s after the signal to stop: 1 prediction\n"
            assert (code, told) == (0, told_line)
            assert answer.result() == (503, json.loads('{"error": "The server is stopping"}'))
