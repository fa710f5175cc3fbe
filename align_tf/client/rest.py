"""Requests over REST, in column form, over connections that are kept open."""

import base64
import contextlib
import functools
import http.client
import json
import queue
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from align_tf.client.endpoint import AlignServerError, Endpoint, ServerUnavailable, Tls
from align_tf.client.http_connection import Connection
from align_tf.client.signatures import Signature, TensorSpec, fitting


class Rest:
    """Column-form requests over connections that are kept open."""

    def __init__(self, endpoint: Endpoint):
        tls, name = endpoint.tls, urllib.parse.quote(endpoint.model_name, safe="")
        scheme = "https" if tls else "http"
        self.address = f"{scheme}://{endpoint.address}"
        self.headers = {}
        if endpoint.token is not None:
            self.headers["Authorization"] = f"Bearer {endpoint.token}"
        if tls and tls.server_name:
            self.headers["Host"] = tls.server_name
        self.connect = functools.partial(
            Connection,
            endpoint.host,
            endpoint.port,
            tls and _ssl_context(tls),
            tls and tls.server_name,
        )
        self.model_path = f"/v1/models/{name}"
        self.path = self.model_path
        if endpoint.version_label is not None:
            label = urllib.parse.quote(endpoint.version_label, safe="")
            self.path = f"{self.model_path}/labels/{label}"
        self.idle: queue.LifoQueue[Connection] = queue.LifoQueue()

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature, timeout: float
    ) -> dict[str, np.ndarray]:
        request = {
            "signature_name": signature_name,
            "inputs": {
                name: _to_json(name, fitting(name, value, signature.inputs.get(name)))
                for name, value in inputs.items()
            },
        }
        body = json.dumps(request).encode()
        outputs = self._ask("POST", f"{self.path}:predict", timeout, body)["outputs"]
        if len(signature.outputs) == 1:  # REST then leaves the name out
            outputs = {next(iter(signature.outputs)): outputs}
        return {name: _from_json(value, signature.outputs[name]) for name, value in outputs.items()}

    def status(self, timeout: float) -> dict[str, Any]:
        return self._ask("GET", self.model_path, timeout)

    def metadata(self, timeout: float) -> dict[str, Any]:
        answer = self._ask("GET", f"{self.path}/metadata", timeout)
        return answer["metadata"]["signature_def"]["signature_def"]

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.idle.get_nowait().close()

    def _ask(self, method: str, path: str, timeout: float, body: bytes | None = None) -> Any:
        deadline = time.monotonic() + timeout
        try:
            status, content = self._exchange(method, path, deadline, body)
        except TimeoutError:
            raise TimeoutError(f"{self.address}: no answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, http.client.BadStatusLine) and error.line.startswith("\0"):
                raise ConnectionError(  # an HTTP/2 frame
                    f"{self.address}: speaks gRPC: expected the port of REST, or protocol='grpc'"
                ) from None
            # A name that is not found or a certificate that is not trusted stays so.
            final = isinstance(error, (socket.gaierror, ssl.SSLError))
            kind = ConnectionError if final else ServerUnavailable
            raise kind(f"{self.address}: cannot reach the server: {error}") from None
        text = content.decode("utf-8", "surrogateescape")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if status == 200 and isinstance(answer, dict):
            return answer
        message = answer.get("error") if isinstance(answer, dict) else None
        raise AlignServerError(
            message or f"{self.address}: answered {status}: {text[:200]}", status
        )

    def _exchange(
        self, method: str, path: str, deadline: float, body: bytes | None
    ) -> tuple[int, bytes]:
        headers = dict(self.headers)
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection, fresh = self.idle.get_nowait(), False
        except queue.Empty:
            connection, fresh = self.connect(), True
        connection.set_deadline(deadline)
        try:
            with contextlib.suppress(BrokenPipeError):  # the refusal of a large body comes early
                connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.status, response.read()
        except (ConnectionError, http.client.HTTPException):
            connection.close()
            if fresh:
                raise
            # The server had closed the idle connection.
            return self._exchange(method, path, deadline, body)
        except BaseException:
            connection.close()
            raise
        self.idle.put(connection)
        return answer


def _ssl_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.root_certificates)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.private_key)
    return context


def _to_json(name: str, value: Any) -> Any:
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, (bytes, bytearray)):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        return [_to_json(name, item) for item in value]
    if not isinstance(value, str | int | float | None):
        kind = type(value).__name__
        raise ValueError(f"inputs[{name!r}]: expected numbers or strings, got {kind}")
    return value


def _from_json(value: Any, spec: TensorSpec) -> np.ndarray:
    if spec.dtype != "object":
        array = np.array(value, spec.dtype)
    else:
        array = np.array(_string_leaves(value), object)
    if array.shape == (0,) and spec.shape and None not in spec.shape[1:]:
        return array.reshape(0, *spec.shape[1:])  # JSON has no rows to tell their shape by
    return array


def _string_leaves(value: Any) -> Any:
    if isinstance(value, list):
        return [_string_leaves(item) for item in value]
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return value.encode("utf-8", "surrogateescape")
