"""Requests of every kind: none ends the server, and what is refused is told by its input's name.

    ALIGN_TF_FUZZ=20000 pytest -m slow tests/server/test_fuzz.py

takes so many by each way.
"""

import base64
import collections
import contextlib
import http.client
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

pytest.importorskip("tensorflow_serving")

import grpc
import hostile
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("ALIGN_TF_FUZZ", "25"))
# What the graph says of another dtype is TensorFlow's own, which knows no names; the server does.
OF_A_DTYPE = r"Expects arg\[\d\] to be "
INPUTS = sorted({name for inputs in hostile.GOOD.values() for name in inputs})


class Refused(Exception):
    """A status of HTTP, and the message."""


def plain(value):
    """An array as JSON has it, what is a scalar too."""
    if value.dtype != object:
        return value.tolist()
    tree = np.empty(value.shape, object)
    tree.ravel()[:] = [{"b64": base64.b64encode(text).decode()} for text in value.ravel()]
    return tree.tolist()


def assert_told(code, message, request, words=INPUTS):
    assert code == "INVALID_ARGUMENT", (code, message, request)
    assert re.search("|".join(words), message), (message, request)


def test_the_session_outlives_every_request(tiny_export):
    """By TensorFlow's C++ alone, in a process of its own: a crash would be its end."""
    program = pathlib.Path(hostile.__file__)
    command = [sys.executable, program, tiny_export / "1", "0", str(COUNT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (lines[-2:], done.stderr[-2000:])
    assert lines.pop() == "good requests are answered as before"
    results = collections.Counter()
    for request, (code, message) in zip(lines[::2], lines[1::2], strict=True):
        results[code] += 1
        if code != "OK":
            assert_told(code, message, request, [OF_A_DTYPE, *INPUTS])
    assert results["OK"] > COUNT / 20 and results["INVALID_ARGUMENT"] > COUNT / 2


def test_the_server_outlives_every_request(tiny_server):
    results = collections.Counter()
    answers = {}
    channel = grpc.insecure_channel(f"127.0.0.1:{tiny_server.grpc_port}")
    rest = http.client.HTTPConnection("127.0.0.1", tiny_server.rest_port, timeout=300)
    with contextlib.closing(rest), channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def over_grpc(name, inputs):
            made = predict_pb2.PredictRequest()
            made.model_spec.name, made.model_spec.signature_name = "align", name
            for key, value in inputs.items():
                made.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            outputs = stub.Predict(made, timeout=300).outputs
            return {key: tf.make_ndarray(value) for key, value in outputs.items()}

        def over_rest(name, inputs):
            document = {"inputs": {key: plain(value) for key, value in inputs.items()}}
            document |= {"signature_name": name} if name else {}
            rest.request("POST", "/v1/models/align:predict", json.dumps(document))
            answer = rest.getresponse()
            outputs = json.loads(answer.read())
            if answer.status != 200:
                raise Refused(answer.status, outputs["error"])
            outputs = outputs["outputs"]
            return outputs if isinstance(outputs, dict) else {"embeds": outputs}

        for name, inputs in hostile.GOOD.items():
            answers[name] = over_grpc(name, inputs)
        for number, (name, inputs) in enumerate(hostile.requests(1, COUNT)):
            try:
                outputs = (over_rest, over_grpc)[number % 2](name, inputs)
            except grpc.RpcError as error:
                code, message = error.code().name, error.details()
            except Refused as error:
                status, message = error.args
                code = {400: "INVALID_ARGUMENT"}.get(status, status)
            else:
                code, message = "OK", None
                if 0 not in inputs[next(iter(inputs))].shape:
                    hostile.check_answer(name, inputs, outputs)
            results[code] += 1
            if code != "OK":
                assert_told(code, message, hostile.told(inputs), ["Task size", *INPUTS])
        for name, inputs in hostile.GOOD.items():
            for key, value in over_grpc(name, inputs).items():
                np.testing.assert_allclose(value, answers[name][key], atol=1e-5)
    assert results["INVALID_ARGUMENT"] > COUNT / 3


def test_of_no_images_there_is_a_classification_over_grpc_alone(tiny_server):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "align"
    for name, shape in (("image_bytes", (0,)), ("labels", (0, 3))):
        request.inputs[name].CopyFrom(tf.make_tensor_proto([], tf.string, shape))
    with grpc.insecure_channel(f"127.0.0.1:{tiny_server.grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        outputs = stub.Predict(request, timeout=300).outputs
    assert tf.make_ndarray(outputs["probs"]).shape == (0, 3)
    rest = http.client.HTTPConnection("127.0.0.1", tiny_server.rest_port, timeout=300)
    with contextlib.closing(rest):
        for labels in ([], [[]]):
            body = json.dumps({"inputs": {"image_bytes": [], "labels": labels}})
            rest.request("POST", "/v1/models/align:predict", body)
            answer = rest.getresponse()
            error = json.loads(answer.read())["error"]
            assert answer.status == 400 and "labels" in error
