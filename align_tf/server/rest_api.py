"""The embedded server's REST half: TensorFlow Serving's routes as an ASGI application."""

import asyncio
import functools
import re
import traceback
import urllib.parse
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import tensorflow as tf
from google.protobuf import json_format
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from align_tf.server import rapidjson, rest_json
from align_tf.server.limits import LEAST_BYTES_PER_SECOND, Gate, Share
from align_tf.server.prometheus import CONTENT_TYPE, Metrics
from align_tf.server.servable import DEFAULT_SIGNATURE, Servable
from align_tf.server.servables import Servables
from align_tf.server.status_codes import RequestError, invalid_argument

GUNZIP_BYTES = 2**20  # that are decompressed at a time
GZIP_MAGIC, MAX_GZIP_MEMBERS = b"\x1f\x8b", 1000
ANSWER_COPIES = 2  # of an answer, while it is sent
LARGE_ANSWER = 2**16  # bytes, up to which one is not waited for to be taken

_VERSION = r"(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_POST_PATH = re.compile(
    rf"/v1/models/(?P<name>[^/:]+){_VERSION}:(?P<method>(?-i:classify|regress|predict))",
    re.I | re.A,
)
_GET_PATH = re.compile(
    rf"/v1/models(?:/(?P<name>[^/:]+))?{_VERSION}(?P<metadata>/metadata)?", re.I | re.A
)
_NOT_FOUND_PAGE = (
    b"<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>\n</HEAD><BODY>\n<H1>Not Found</H1>\n"
    b"</BODY></HTML>\n"
)


class RestApp:
    """The ASGI application.

    Its routes know no case but for the verb, and keep the query string as part of them.
    """

    def __init__(
        self,
        servables: Servables,
        gate: Gate,
        metrics: Metrics,
        metrics_path: str | None,
    ):
        """Makes the application; its close() ends its threads.

        Args:
            servables: what is served.
            gate: surrounds a prediction, and knows the limits on bodies.
            metrics: is told of predictions.
            metrics_path: where the metrics are; None for nowhere.
        """
        self.servables, self.gate, self.metrics = servables, gate, metrics
        self.metrics_path = metrics_path
        self._pool = futures.ThreadPoolExecutor(gate.limits.threads, thread_name_prefix="rest")
        self._tasks: set[asyncio.Task] = set()  # that read or run a request
        self._given_up = False

    def close(self) -> None:
        """Ends the threads, each when it has nothing to do."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        """Answers what is in flight that the server is stopping; called in the event loop."""
        self._given_up = True
        for task in self._tasks:
            task.cancel()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        with self.gate.memory.request() as share:
            await self._respond(Request(scope, receive), share, send)

    async def _respond(self, request: Request, share: Share, send: Callable) -> None:
        scope = request.scope
        target = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        path = target.decode("utf-8", "replace")
        if path == self.metrics_path and request.method == "GET":
            response = Response(self.metrics.page(), media_type=None)
            response.headers["content-type"] = CONTENT_TYPE
        elif not path.lower().startswith("/v1/"):
            response = Response(_NOT_FOUND_PAGE, 404, media_type=None)
            response.headers["content-type"] = "text/html"
        elif request.method == "OPTIONS":
            response = Response(status_code=400)
            response.headers["content-type"] = "text/html; charset=ISO-8859-1"
        else:
            try:
                response = await self._json_response(request, path, share)
            except ClientDisconnect:
                return
        await response(scope, request.receive, functools.partial(_sent, send))

    async def _json_response(self, request: Request, path: str, share: Share) -> Response:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            body = await self._read_body(request, share)
            encoding = request.headers.get("content-encoding", "")
            status, content = await asyncio.get_running_loop().run_in_executor(
                self._pool, self.answer, request.method, path, body, encoding, share
            )
            share.keep(ANSWER_COPIES * len(content))
            return Response(content, status, media_type="application/json")
        except _BodyRefused as error:
            return _refusal(error)
        except asyncio.CancelledError:
            if not self._given_up:
                raise
            return _refusal(_BodyRefused(503, "The server is stopping"))
        finally:
            self._tasks.discard(task)

    async def _read_body(self, request: Request, share: Share) -> bytes:
        """Reads the body, and takes memory for it.

        The rest of one that is too large is read and dropped, within reason, so that a client that
        sends first and listens then gets to see the refusal.
        """
        body, size, limits = bytearray(), 0, self.gate.limits
        clock = asyncio.get_running_loop().time
        started, more = clock(), True
        while more:
            allowed = limits.client_timeout + size / LEAST_BYTES_PER_SECOND
            try:
                message = await asyncio.wait_for(request.receive(), started + allowed - clock())
            except asyncio.TimeoutError:
                raise _BodyRefused(408, f"The body did not come within {allowed:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= limits.max_request_bytes:
                try:
                    share.take(len(chunk))
                except RequestError as error:
                    raise _BodyRefused(error.http_status, error.message) from None
                body += chunk
            elif size > 4 * limits.max_request_bytes:
                break
            else:
                share.keep(0)
                body.clear()
        if size > limits.max_request_bytes:
            raise _BodyRefused(413, f"Request body is larger than {limits.max_request_bytes} bytes")
        return bytes(body)

    def answer(
        self, method: str, path: str, body: bytes, encoding: str, share: Share
    ) -> tuple[int, bytes]:
        """Returns the HTTP status and the body that answer a request."""
        try:
            if method == "POST" and (match := _POST_PATH.fullmatch(path)):
                return 200, self._run(match, body, encoding, share)
            if method == "GET" and (match := _GET_PATH.fullmatch(path)):
                return 200, self._describe(match)
            raise invalid_argument(f"Malformed request: {method} {path}")
        except _NoVersion as error:
            return error.http_status, b""
        except RequestError as error:
            return error.http_status, rest_json.error_body(error.message)
        except RecursionError:
            return 400, rest_json.error_body("JSON Value is nested too deeply")
        except MemoryError:
            return 429, rest_json.error_body("Out of memory")
        except Exception as error:
            traceback.print_exc()
            return 500, rest_json.error_body(f"{type(error).__name__}: {error}")

    def _run(self, match: re.Match, body: bytes, encoding: str, share: Share) -> bytes:
        method = match["method"]
        model = self.servables.label(urllib.parse.unquote(match["name"]))
        with self.metrics.request(model, method, "REST"), self.gate.place(), self.gate.turn:
            if "gzip" in encoding.lower():
                body = _gunzip(body, self.gate.limits.max_request_bytes, share)
            share.take(rapidjson.memory(body))
            if method == "predict":
                return self._predict(match, body, share)
            return self._classify(match, body)

    def _predict(self, match: re.Match, body: bytes, share: Share) -> bytes:
        spec = _model_spec(match)
        document = rapidjson.read(body)
        name = rest_json.signature_name(document)
        servable = self.servables.find(spec)
        infos = _signature(servable, name).inputs
        if not infos:
            raise invalid_argument(f"Failed to get input map for signature: {name or 'DEFAULT'}")
        dtypes = {key: tf.as_dtype(info.dtype) for key, info in infos.items()}
        inputs, row_form = rest_json.predict_inputs(document, dtypes)
        for key, array in inputs.items():
            self.gate.check_rows(key, array.shape)
        outputs = servable.predict(name, inputs)
        share.take(sum(map(rest_json.memory, outputs.values())))
        return rest_json.predict_body(outputs, row_form)

    def _classify(self, match: re.Match, body: bytes) -> bytes:
        """Refuses as a server does whose models have no signature over tf.Example."""
        spec = _model_spec(match)
        document = rapidjson.read(body)
        rest_json.check_examples(document)
        signature = _signature(self.servables.find(spec), rest_json.signature_name(document))
        kind = "classification" if match["method"] == "classify" else "regression"
        if len(signature.inputs) != 1:
            raise invalid_argument("Expected one input Tensor.")
        if "inputs" not in signature.inputs:
            raise invalid_argument(f"No {kind} inputs found in SignatureDef: {signature}")
        raise RequestError(
            "UNIMPLEMENTED", "This server does not run signatures over tf.Example: use :predict"
        )

    def _describe(self, match: re.Match) -> bytes:
        name = urllib.parse.unquote(match["name"] or "")
        # As there: probes count among the requests, and are timed, with no API.
        with self.metrics.request(self.servables.label(name), "", "REST"):
            return self._described(match)

    def _described(self, match: re.Match) -> bytes:
        if not match["name"]:
            raise invalid_argument("Missing model name in request.")
        spec = _model_spec(match)
        if not match["metadata"]:
            return (_proto_json(self.servables.status(spec)) + "\n").encode()
        response = self.servables.find(spec).metadata()
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return (
            f'{{\n"model_spec":{_proto_json(response.model_spec)}\n,\n'
            f'"metadata": {{"signature_def": {_proto_json(signatures)}\n}}\n}}\n'
        ).encode()


class _BodyRefused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _NoVersion(RequestError):
    """A version beyond int64, which is answered without a body."""


async def _sent(send: Callable, message: dict) -> None:
    """Sends a part of an answer, and waits until a large one has been taken."""
    if len(message.get("body", b"")) > LARGE_ANSWER:
        await send(message | {"more_body": True})
        message = message | {"body": b""}  # which is sent when there is room for more
    await send(message)


def _refusal(error: _BodyRefused) -> Response:
    content, headers = rest_json.error_body(str(error)), {"connection": "close"}
    return Response(content, error.status, headers, "application/json")


def _gunzip(body: bytes, limit: int, share: Share) -> bytes:
    """Decompresses a body, and takes memory for it before it is there.

    TensorFlow Serving takes a broken one for an empty one.
    """
    broken = f"{rapidjson.EMPTY}. Failed to decompress the gzip body: "
    plain, data, members = bytearray(), memoryview(body), 0
    while bytes(data[:2]) == GZIP_MAGIC or not members:  # what follows them is dropped
        members += 1
        if members > MAX_GZIP_MEMBERS:
            raise invalid_argument(f"{broken}it has more than {MAX_GZIP_MEMBERS} members")
        decompressor, tail = zlib.decompressobj(zlib.MAX_WBITS | 16), b""
        while not decompressor.eof:
            if not tail:
                tail, data = data[:GUNZIP_BYTES], data[GUNZIP_BYTES:]
                if not tail:
                    raise invalid_argument(f"{broken}it is cut off")
            share.take(GUNZIP_BYTES)
            try:
                part = decompressor.decompress(tail, GUNZIP_BYTES)
            except zlib.error as error:
                raise invalid_argument(f"{broken}{error}") from None
            tail = decompressor.unconsumed_tail
            share.take(len(part) - GUNZIP_BYTES)
            plain += part
            if len(plain) > limit:
                message = f"Request body is larger than {limit} bytes"
                raise RequestError("RESOURCE_EXHAUSTED", message)
        left = len(data) + len(decompressor.unused_data)
        data = memoryview(body)[len(body) - left :]
    return bytes(plain)


def _model_spec(match: re.Match) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=urllib.parse.unquote(match["name"]))
    if match["version"]:
        digits = match["version"].lstrip("0") or "0"  # of thousands of digits Python makes no int
        if len(digits) > 19 or int(digits) >= 2**63:
            raise _NoVersion("INVALID_ARGUMENT", f"version {match['version']}")
        spec.version.value = int(digits)
    if match["label"]:
        spec.version_label = urllib.parse.unquote(match["label"])
    return spec


def _signature(servable: Servable, name: str) -> Any:
    name = name or DEFAULT_SIGNATURE
    if name not in servable.signatures:
        raise invalid_argument(f'Serving signature name: "{name}" not found in signature def')
    return servable.signatures[name]


def _proto_json(message: Any) -> str:
    return json_format.MessageToJson(
        message,
        indent=1,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
