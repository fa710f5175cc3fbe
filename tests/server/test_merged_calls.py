"""Batching as callers meet it: their own answers, shared runs, refusals."""

import concurrent.futures
import json
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from asking import (
    ANSWER,
    PROBE,
    Held,
    ask,
    grpc_request,
    predict,
    stub,
)

from align_tf.server import ModelServer
from align_tf.server.batching import BatchingParameters
from align_tf.server.prometheus import DEFAULT_PATH


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
    label = '{thread_pool_name=""}'
    assert metric(batched, f"batching_session:queuing_latency_count{label}") >= 160


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
