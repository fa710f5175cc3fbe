"""A client of an exported ALIGN model behind TensorFlow Serving, over REST or gRPC.

The REST half imports neither TensorFlow nor gRPC.
"""

import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import itertools
import json
import os
import pathlib
import queue
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from align_tf.status_codes import HTTP_STATUS

Image = str | os.PathLike | bytes | PIL.Image.Image

# protocol: (default port, URL schemes)
PROTOCOLS = {"rest": (8501, ("http", "https")), "grpc": (8500, ("grpc",))}

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
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Classification:
    """Zero-shot classification of n images over m labels.

    Attributes:
        labels: the m labels as the caller gave them.
        logits: float32 (n, m).
        probs: float32 (n, m), each row sums to 1.
    """

    labels: list[str]
    logits: np.ndarray
    probs: np.ndarray

    @property
    def best(self) -> list[str]:
        """The most probable label of each image."""
        return [self.labels[index] for index in self.probs.argmax(axis=1)]


class VersionStatus(NamedTuple):
    """A version of the model; `state` is AVAILABLE when it answers."""

    version: int
    state: str
    error_message: str


class TensorSpec(NamedTuple):
    """dtype in numpy's name ("object" for strings), shape with None for a free dimension."""

    dtype: str
    shape: tuple[int | None, ...] | None


class Signature(NamedTuple):
    """A signature's inputs and outputs by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


class AlignClient:
    """Asks a TensorFlow Serving endpoint; safe to use from several threads."""

    def __init__(
        self,
        address: str,
        *,
        model_name: str = "align",
        protocol: str = "rest",
        timeout: float = 30.0,
        batch_size: int = 32,
    ):
        """Makes a client; nothing is sent yet.

        Args:
            address: "host" or "host:port", such as "localhost:8501"; for REST also a URL
                "http://..." or "https://...".
            model_name: the name under which the server has the model.
            protocol: "rest" (port 8501 unless given) or "grpc" (port 8500).
            timeout: seconds to wait for an answer.
            batch_size: how many images or texts go into one request.

        Raises:
            ValueError: an argument is none of these.
            ModuleNotFoundError: gRPC needs packages that are not installed.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f'protocol={protocol!r}: expected "rest" or "grpc"')
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        self.model_name, self.timeout, self.batch_size = model_name, timeout, batch_size
        scheme, host, port = _split_address(address, protocol)
        transport = _Rest if protocol == "rest" else _Grpc
        self._transport = transport(scheme, host, port, model_name, timeout)
        self._signatures: dict[str, Signature] = {}

    def classify(
        self, images: Image | Iterable[Image], labels: list[str], template: str = "{}"
    ) -> Classification:
        """Zero-shot classification.

        Args:
            images: one image or several: paths, encoded bytes or PIL images.
            labels: the m labels to choose from.
            template: what the model reads for a label, such as "a photo of a {}".

        Returns:
            logits and probs (n, m).

        Raises:
            ValueError: no image, no label, or a template without {}.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        if isinstance(labels, str):
            raise TypeError(f"labels={labels!r}: expected a list of strings")
        labels = list(labels)
        if not labels:
            raise ValueError("labels: expected at least one")
        if "{}" not in template:
            raise ValueError(f"template={template!r}: expected a {{}} for the label")
        prompts = [template.replace("{}", label) for label in labels]
        answers = [
            self.predict({"image_bytes": batch, "labels": [prompts] * len(batch)})
            for batch in self._image_batches(images)
        ]
        return Classification(labels, _join(answers, "logits"), _join(answers, "probs"))

    def embed_images(self, images: Image | Iterable[Image]) -> np.ndarray:
        """Returns the images' embeddings, float32 (n, d), of unit length.

        Args:
            images: one image or several: paths, encoded bytes or PIL images.

        Raises:
            ValueError: no image.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        batches = self._image_batches(images)
        answers = [self.predict({"image_bytes": batch}, "embed_image") for batch in batches]
        return _join(answers, "image_embeds")

    def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """Returns the texts' embeddings, float32 (n, d), of unit length.

        Raises:
            ValueError: no text.
            AlignServerError, ConnectionError, TimeoutError: as for predict.
        """
        texts = [texts] if isinstance(texts, str) else texts
        batches = _batches(texts, self.batch_size, "texts")
        answers = [self.predict({"texts": batch}, "embed_text") for batch in batches]
        return _join(answers, "text_embeds")

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Runs any signature, in one request.

        Args:
            inputs: arrays or nested lists by name; strings as str or bytes.
            signature_name: the signature.

        Returns:
            The outputs by name, in the signature's dtypes; strings as arrays of bytes objects.

        Raises:
            AlignServerError: the server refused; the message is its own.
            ConnectionError: it cannot be reached.
            TimeoutError: it did not answer in time.
        """
        if signature_name not in self._signatures:
            self._signatures = self.metadata()
        signature = self._signatures.get(signature_name, Signature({}, {}))
        return self._transport.predict(inputs, signature_name, signature)

    def status(self) -> list[VersionStatus]:
        """Returns the states of the model's versions, the newest first."""
        return [
            VersionStatus(int(item["version"]), item["state"], item["status"]["error_message"])
            for item in self._transport.status()["model_version_status"]
        ]

    def metadata(self) -> dict[str, Signature]:
        """Returns the signatures of the newest version by name."""
        return {
            name: Signature(_specs(entry["inputs"]), _specs(entry["outputs"]))
            for name, entry in self._transport.metadata()["signature_def"].items()
            if entry["method_name"]  # the initializer has none
        }

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> "AlignClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _image_batches(self, images: Image | Iterable[Image]) -> Iterator[list[bytes]]:
        if isinstance(images, (str, os.PathLike, bytes, bytearray, PIL.Image.Image)):
            images = [images]
        return _batches(map(_encoded, images), self.batch_size, "images")


def _split_address(address: str, protocol: str) -> tuple[str, str, int]:
    default_port, schemes = PROTOCOLS[protocol]
    url = address if "://" in address else f"{schemes[0]}://{address}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in schemes or parts.path not in ("", "/"):
        raise ValueError(f'address={address!r}: expected "host:port", as in "localhost:8501"')
    return parts.scheme, host, port or default_port


def _batches(items: Iterable[Any], size: int, what: str) -> Iterator[list[Any]]:
    items = iter(items)
    first = list(itertools.islice(items, size))
    if not first:
        raise ValueError(f"{what}: expected at least one")
    yield first
    while batch := list(itertools.islice(items, size)):
        yield batch


def _encoded(image: Image) -> bytes:
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, PIL.Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(image, (str, os.PathLike)):
        return pathlib.Path(image).read_bytes()
    raise TypeError(f"images: expected paths, bytes or PIL images, got {type(image).__name__}")


def _join(answers: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([answer[name] for answer in answers])


def _specs(infos: dict[str, Any]) -> dict[str, TensorSpec]:
    specs = {}
    for name, info in infos.items():
        shape = None
        if not info["tensor_shape"]["unknown_rank"]:
            sizes = [int(dim["size"]) for dim in info["tensor_shape"]["dim"]]
            shape = tuple(size if size >= 0 else None for size in sizes)
        specs[name] = TensorSpec(_DTYPES.get(info["dtype"], info["dtype"]), shape)
    return specs


# --- REST ----------------------------------------------------------------------------------


class _Rest:
    """Column-form requests over connections that are kept open."""

    def __init__(self, scheme: str, host: str, port: int, model_name: str, timeout: float):
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self.connect = functools.partial(kind, host, port, timeout=timeout)
        self.address = f"{scheme}://{host}:{port}"
        self.path = f"/v1/models/{urllib.parse.quote(model_name, safe='')}"
        self.idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature
    ) -> dict[str, np.ndarray]:
        request = {
            "signature_name": signature_name,
            "inputs": {name: _to_json(value) for name, value in inputs.items()},
        }
        outputs = self._ask("POST", f"{self.path}:predict", json.dumps(request).encode())["outputs"]
        if len(signature.outputs) == 1:  # REST then leaves the name out
            outputs = {next(iter(signature.outputs)): outputs}
        return {
            name: _from_json(value, signature.outputs[name].dtype)
            for name, value in outputs.items()
        }

    def status(self) -> dict[str, Any]:
        return self._ask("GET", self.path)

    def metadata(self) -> dict[str, Any]:
        return self._ask("GET", f"{self.path}/metadata")["metadata"]["signature_def"]

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.idle.get_nowait().close()

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        try:
            status, content = self._exchange(method, path, body)
        except TimeoutError:
            raise TimeoutError(f"{self.address}: no answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{self.address}: cannot reach the server: {error}") from None
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

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection, fresh = self.idle.get_nowait(), False
        except queue.Empty:
            connection, fresh = self.connect(), True
        try:
            with contextlib.suppress(BrokenPipeError):  # the refusal of a large body comes early
                connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.status, response.read()
        except (ConnectionError, http.client.HTTPException):
            connection.close()
            if fresh:
                raise
            return self._exchange(method, path, body)  # the server had closed the idle connection
        except BaseException:
            connection.close()
            raise
        self.idle.put(connection)
        return answer


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


class _Grpc:
    """Requests through tensorflow-serving-api's stubs."""

    def __init__(self, scheme: str, host: str, port: int, model_name: str, timeout: float):
        try:
            import grpc
            from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'The gRPC client needs extra packages: pip install "align-tf[serve]"',
                name=error.name,
            ) from error
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.model_name, self.timeout = model_name, timeout
        # Without these gRPC takes messages of up to 4 MB.
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(self.address, options)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.model = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def predict(
        self, inputs: Mapping[str, Any], signature_name: str, signature: Signature
    ) -> dict[str, np.ndarray]:
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = predict_pb2.PredictRequest()
        request.model_spec.name = self.model_name
        request.model_spec.signature_name = signature_name
        for name, value in inputs.items():
            spec = signature.inputs.get(name)
            dtype = None if spec is None else tf.as_dtype(spec.dtype.replace("object", "string"))
            try:
                tensor = tf.make_tensor_proto(value, dtype)
            except (TypeError, ValueError) as error:
                raise ValueError(f"inputs[{name!r}]: {error}") from None
            request.inputs[name].CopyFrom(tensor)
        response = self._ask(self.prediction.Predict, request)
        return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}

    def status(self) -> dict[str, Any]:
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = self.model_name
        return _proto_dict(self._ask(self.model.GetModelStatus, request))

    def metadata(self) -> dict[str, Any]:
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = self.model_name
        response = self._ask(self.prediction.GetModelMetadata, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return _proto_dict(signatures)

    def close(self) -> None:
        self.channel.close()

    def _ask(self, method: Callable, request: Any) -> Any:
        import grpc

        try:
            return method(request, timeout=self.timeout)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
        if code == grpc.StatusCode.UNAVAILABLE:
            raise ConnectionError(f"{self.address}: cannot reach the server: {details}")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError(f"{self.address}: no answer in time")
        raise AlignServerError(details, HTTP_STATUS[code.name])


def _proto_dict(message: Any) -> dict[str, Any]:
    from google.protobuf import json_format

    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
