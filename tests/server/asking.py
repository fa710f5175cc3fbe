"""How the tests of the server ask it, and hold it at its work."""

import contextlib
import http.client
import json
import pathlib
import socket
import threading
import time

import grpc
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "tf_serving"
PROBE = GOLDENS / "probe"
ROW = b'{"instances": [[1, 2, 3, 4]]}'
ANSWER = {"predictions": [[17.1428566, 20.0, 22.8571434]]}  # of version 2
PREDICT = "/v1/models/align:predict"


def ask(port, method="POST", path=PREDICT, body=ROW):
    """Returns status and body of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()


def predict(port, **parts):
    status, body = ask(port, **parts)
    return status, json.loads(body)


def grpc_request(x, signature="", name="x"):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "align", signature
    request.inputs[name].CopyFrom(tf.make_tensor_proto(x))
    return request


@contextlib.contextmanager
def stub(server, kind=prediction_service_pb2_grpc.PredictionServiceStub):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield kind(channel)


class Held:
    """Takes the place of a server's run of a signature: holds each until it is let go."""

    def __init__(self, server, monkeypatch):
        self.at_work, self.go = threading.Semaphore(0), threading.Event()
        servable = server._servables.find(
            predict_pb2.PredictRequest(model_spec={"name": "align"}).model_spec
        )
        run = servable._run

        def held(*arguments):
            self.at_work.release()
            assert self.go.wait(60)
            return run(*arguments)

        monkeypatch.setattr(servable, "_run", held)

    def wait(self, count=1):
        for _ in range(count):
            assert self.at_work.acquire(timeout=60)


HEAD = b"POST /v1/models/align:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 29\r\n\r\n"


@contextlib.contextmanager
def connected(server):
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=60) as connection:
        yield connection


def received(connection):
    """Returns all that comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def wait_for_no_memory(server):
    """Waits until no request takes any: an answer's is given back once it has been sent."""
    deadline = time.monotonic() + 60
    while server._gate.memory.taken:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exchange(server, request):
    with connected(server) as connection:
        connection.sendall(request)
        with contextlib.suppress(OSError):  # refused already
            connection.shutdown(socket.SHUT_WR)
        return received(connection)
