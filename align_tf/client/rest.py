"""How the clients reach TensorFlow Serving: REST, gRPC and gRPC under asyncio, TLS, retries.

The REST part imports neither TensorFlow nor gRPC.
"""

import base64
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import pathlib
import queue
import random
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from align_tf.extras import extra
from align_tf.status_codes import HTTP_STATUS

FIRST_PAUSE = 0.1  # seconds before the first retry; each further one waits twice as long
LONGEST_PAUSE = 5.0

# protocol: (default port, scheme in the clear, scheme over TLS)
PROTOCOLS = {"rest": (8501, "http", "https"), "grpc": (8500, "grpc", "grpcs")}

# Name in a signature: numpy's
_DTYPES = {
    "DT_HALF": "float16",
    "DT_FLOAT": "float32",
    "DT_DOUBLE": "float64",
    "DT_INT8": "int8",
    "DT_UINT8": "uint8",
    "DT_INT16": "int16",
    "DT_INT32": "int32",
    "DT_INT64": "int64",
    "DT_UINT32": "uint32",
    "DT_UINT64": "uint64",
    "DT_BOOL": "bool",
    "DT_STRING": "object",
}


class AlignServerError(RuntimeError):
    """The server refused a request.

    Attributes:
        status: the HTTP status; for gRPC, the one TensorFlow Serving's REST gives for the code.
        row: the place in the caller's list of what it refused, None where it did not say.
    """

    def __init__(self, message: str, status: int, row: int | None = None):
        super().__init__(message)
        self.status, self.row = status, row


class TensorSpec(NamedTuple):
    """dtype in numpy's name ("object" for strings), shape with None for a free dimension."""

    dtype: str
    shape: tuple[int | None, ...] | None


class Signature(NamedTuple):
    """A signature's inputs and outputs by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclasses.dataclass(frozen=True)
class Tls:
    """How a connection is encrypted and who is trusted; each file is PEM.

    Attributes:
        root_certificates: file of the authorities that may have signed the server's certificate;
            the system's if None.
        certificate: file of the certificate by which the client proves who it is.
        private_key: file of its key.
        server_name: the name the server's certificate has to have, where it is not the address.
    """

    root_certificates: str | os.PathLike | None = None
    certificate: str | os.PathLike | None = None
    private_key: str | os.PathLike | None = None
    server_name: str | None = None

    def __post_init__(self):
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("expected certificate and private_key, both or none")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model is and what every request to it carries.

    Attributes:
        host, port: the server's.
        tls: None sends in the clear.
        token: sent as `authorization: Bearer TOKEN`.
        model_name: the name under which the server has the model.
        version_label: the label of the version to ask; None leaves the choice to the server.
    """

    host: str
    port: int
    tls: Tls | None
    token: str | None
    model_name: str
    version_label: str | None

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def split_address(address: str, protocol: str, tls: Tls | None) -> tuple[str, int, Tls | None]:
    """Returns an address's host and port, and how it is encrypted.

    Raises:
        ValueError: it is none, or its scheme is in the clear and `tls` is given.
    """
    default_port, plain, encrypted = PROTOCOLS[protocol]
    url = address if "://" in address else f"{encrypted if tls else plain}://{address}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in (plain, encrypted) or parts.path not in ("", "/"):
        raise ValueError(f'address={address!r}: expected "host:port", as in "localhost:8501"')
    if tls and parts.scheme == plain:
        raise ValueError(f"address={address!r}: expected {encrypted}:// with tls")
    if parts.scheme == encrypted:
        tls = tls or Tls()
    return host, port or default_port, tls


class Attempts:
    """The attempts at one request: how long each may take, and whether there is another.

    A request is repeated where the server was too busy or not there. It changes nothing at the
    server, so one that was cut off may be repeated too.
    """

    def __init__(self, timeout: float, retries: int):
        self.deadline, self.retries, self.made = time.monotonic() + timeout, retries, 0

    @property
    def timeout(self) -> float:
        """Seconds that are left."""
        return max(self.deadline - time.monotonic(), 0.001)

    def pause(self, error: Exception) -> float:
        """Returns the seconds to wait before the next attempt; raises the error if it is final."""
        longest = min(FIRST_PAUSE * 2**self.made, LONGEST_PAUSE)
        pause = longest * random.uniform(0.5, 1)  # so that callers do not come back all at once
        self.made += 1
        if not _transient(error) or self.made > self.retries or pause >= self.timeout:
            raise error
        return pause


def _transient(error: Exception) -> bool:
    if isinstance(error, AlignServerError):
        too_large = "larger than" in str(error)  # gRPC's RESOURCE_EXHAUSTED, which stays
        return error.status in (429, 503) and not too_large
    return isinstance(error, (ConnectionResetError, ConnectionRefusedError))


def specs(infos: dict[str, Any]) -> dict[str, TensorSpec]:
    """Reads the tensors of a signature, as the server's JSON has them."""
    found = {}
    for name, info in infos.items():
        shape = None
        if not info["tensor_shape"]["unknown_rank"]:
            sizes = [int(dim["size"]) for dim in info["tensor_shape"]["dim"]]
            shape = tuple(size if size >= 0 else None for size in sizes)
        found[name] = TensorSpec(_DTYPES.get(info["dtype"], info["dtype"]), shape)
    return found


# --- REST ----------------------------------------------------------------------------------


class _NamedConnection(http.client.HTTPSConnection):
    """A connection whose server proves another name than the address."""

    def __init__(self, *arguments: Any, server_name: str, **options: Any):
        super().__init__(*arguments, **options)
        self.server_name = server_name

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.server_name)


class Rest:
    """Column-form requests over connections that are kept open."""

    def __init__(self, endpoint: Endpoint):
        tls, name = endpoint.tls, urllib.parse.quote(endpoint.model_name, safe="")
        scheme = "https" if tls else "http"
        self.address = f"{scheme}://{endpoint.address}"
        self.headers = {}
        if endpoint.token is not None:
            self.headers["Authorization"] = f"Bearer {endpoint.token}"
        kind, options = http.client.HTTPConnection, {}
        if tls:
            kind, options["context"] = http.client.HTTPSConnection, _ssl_context(tls)
        if tls and tls.server_name:
            kind, options["server_name"] = _NamedConnection, tls.server_name
            self.headers["Host"] = tls.server_name
        self.connect = functools.partial(kind, endpoint.host, endpoint.port, **options)
        self.model_path = f"/v1/models/{name}"
        self.path = self.model_path
        if endpoint.version_label is not None:
            label = urllib.parse.quote(endpoint.version_label, safe="")
            self.path = f"{self.model_path}/labels/{label}"
        self.idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature, timeout: float
    ) -> dict[str, np.ndarray]:
        request = {
            "signature_name": signature_name,
            "inputs": {name: _to_json(value) for name, value in inputs.items()},
        }
        body = json.dumps(request).encode()
        outputs = self._ask("POST", f"{self.path}:predict", timeout, body)["outputs"]
        if len(signature.outputs) == 1:  # REST then leaves the name out
            outputs = {next(iter(signature.outputs)): outputs}
        return {
            name: _from_json(value, signature.outputs[name].dtype)
            for name, value in outputs.items()
        }

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
        try:
            status, content = self._exchange(method, path, timeout, body)
        except TimeoutError:
            raise TimeoutError(f"{self.address}: no answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            # A name that is not found or a certificate that is not trusted stays so.
            final = isinstance(error, (socket.gaierror, ssl.SSLError))
            kind = ConnectionError if final else ConnectionResetError
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
        self, method: str, path: str, timeout: float, body: bytes | None
    ) -> tuple[int, bytes]:
        headers = dict(self.headers)
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection, fresh = self.idle.get_nowait(), False
        except queue.Empty:
            connection, fresh = self.connect(), True
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
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
            return self._exchange(method, path, timeout, body)
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


def _to_json(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (bytes, bytearray)):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any, dtype: str) -> np.ndarray:
    if dtype != "object":
        return np.array(value, dtype)
    return np.array(_string_leaves(value), object)


def _string_leaves(value: Any) -> Any:
    if isinstance(value, list):
        return [_string_leaves(item) for item in value]
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return value.encode("utf-8", "surrogateescape")


# --- gRPC ----------------------------------------------------------------------------------


class _GrpcMessages:
    """What both kinds of gRPC have in common: the channel's arguments, requests and answers."""

    def __init__(self, endpoint: Endpoint):
        with extra("serve", "the gRPC client needs extra packages"):
            import grpc  # noqa: F401
            import tensorflow_serving  # noqa: F401
        self.endpoint, self.address = endpoint, endpoint.address
        self.call_metadata = ()
        if endpoint.token is not None:
            self.call_metadata = (("authorization", f"Bearer {endpoint.token}"),)

    def open(self, module: Any) -> Any:
        """Opens a channel of grpc or grpc.aio."""
        options = [
            # Without these gRPC takes messages of up to 4 MB.
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A server that comes back is found again as fast as a request is repeated.
            ("grpc.initial_reconnect_backoff_ms", round(FIRST_PAUSE * 1000)),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        tls = self.endpoint.tls
        if tls is None:
            return module.insecure_channel(self.address, options)
        if tls.server_name:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        return module.secure_channel(self.address, self._credentials(tls), options)

    def _credentials(self, tls: Tls) -> Any:
        import grpc

        files = (tls.root_certificates, tls.private_key, tls.certificate)
        return grpc.ssl_channel_credentials(
            *(None if file is None else pathlib.Path(file).read_bytes() for file in files)
        )

    def address_model(self, request: Any, labelled: bool = True) -> Any:
        request.model_spec.name = self.endpoint.model_name
        if labelled and self.endpoint.version_label is not None:
            request.model_spec.version_label = self.endpoint.version_label
        return request

    def predict_request(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature
    ) -> Any:
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = self.address_model(predict_pb2.PredictRequest())
        request.model_spec.signature_name = signature_name
        for name, value in inputs.items():
            spec = signature.inputs.get(name)
            dtype = None if spec is None else tf.as_dtype(spec.dtype.replace("object", "string"))
            try:
                tensor = tf.make_tensor_proto(value, dtype)
            except (TypeError, ValueError) as error:
                raise ValueError(f"inputs[{name!r}]: {error}") from None
            request.inputs[name].CopyFrom(tensor)
        return request

    def outputs(self, response: Any) -> dict[str, np.ndarray]:
        import tensorflow as tf

        return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}

    def status_request(self) -> Any:
        from tensorflow_serving.apis import get_model_status_pb2

        return self.address_model(get_model_status_pb2.GetModelStatusRequest(), labelled=False)

    def metadata_request(self) -> Any:
        from tensorflow_serving.apis import get_model_metadata_pb2

        return self.address_model(
            get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        )

    def signatures(self, response: Any) -> dict[str, Any]:
        from tensorflow_serving.apis import get_model_metadata_pb2

        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return proto_dict(signatures)["signature_def"]

    def error(self, error: Any) -> Exception:
        """Returns what a failed call means to the caller."""
        code, details = error.code().name, error.details()
        if code == "UNAVAILABLE":
            return ConnectionResetError(f"{self.address}: cannot reach the server: {details}")
        if code == "DEADLINE_EXCEEDED":
            return TimeoutError(f"{self.address}: no answer in time")
        return AlignServerError(details, HTTP_STATUS[code])


class Grpc:
    """Requests through tensorflow-serving-api's stubs."""

    def __init__(self, endpoint: Endpoint):
        self.messages = _GrpcMessages(endpoint)
        import grpc

        self.channel = self.messages.open(grpc)
        self.stubs = _Stubs(self.channel)

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature, timeout: float
    ) -> dict[str, np.ndarray]:
        request = self.messages.predict_request(inputs, signature_name, signature)
        return self.messages.outputs(self._ask(self.stubs.predict, request, timeout))

    def status(self, timeout: float) -> dict[str, Any]:
        return proto_dict(self._ask(self.stubs.status, self.messages.status_request(), timeout))

    def metadata(self, timeout: float) -> dict[str, Any]:
        request = self.messages.metadata_request()
        return self.messages.signatures(self._ask(self.stubs.metadata, request, timeout))

    def close(self) -> None:
        self.channel.close()

    def _ask(self, method: Callable, request: Any, timeout: float) -> Any:
        import grpc

        try:
            return method(request, timeout=timeout, metadata=self.messages.call_metadata)
        except grpc.RpcError as error:
            raise self.messages.error(error) from None


class AsyncGrpc:
    """The same under asyncio."""

    def __init__(self, endpoint: Endpoint):
        self.messages = _GrpcMessages(endpoint)
        import grpc.aio

        self.channel = self.messages.open(grpc.aio)
        self.stubs = _Stubs(self.channel)

    async def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature, timeout: float
    ) -> dict[str, np.ndarray]:
        request = self.messages.predict_request(inputs, signature_name, signature)
        return self.messages.outputs(await self._ask(self.stubs.predict, request, timeout))

    async def status(self, timeout: float) -> dict[str, Any]:
        request = self.messages.status_request()
        return proto_dict(await self._ask(self.stubs.status, request, timeout))

    async def metadata(self, timeout: float) -> dict[str, Any]:
        request = self.messages.metadata_request()
        return self.messages.signatures(await self._ask(self.stubs.metadata, request, timeout))

    async def close(self) -> None:
        await self.channel.close()

    async def _ask(self, method: Callable, request: Any, timeout: float) -> Any:
        import grpc

        try:
            return await method(request, timeout=timeout, metadata=self.messages.call_metadata)
        except grpc.RpcError as error:
            raise self.messages.error(error) from None


class _Stubs:
    """The methods of a channel that the clients call."""

    def __init__(self, channel: Any):
        from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

        prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.predict, self.metadata = prediction.Predict, prediction.GetModelMetadata
        self.status = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus


def proto_dict(message: Any) -> dict[str, Any]:
    """Returns a message as the server's JSON has it."""
    from google.protobuf import json_format

    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
