"""The embedded server: TensorFlow Serving's gRPC and REST, for any SavedModel, on one machine."""

import asyncio
import contextlib
import functools
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from align_tf.extras import extra

with extra("serve", "the server needs extra packages"):
    import grpc
    import h11
    import starlette  # noqa: F401
    import uvicorn
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from tensorflow_serving.apis import (
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
    )
    from uvicorn.protocols.http.h11_impl import H11Protocol

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from align_tf.server.batching import Batcher, BatchingParameters
from align_tf.server.limits import Gate, Limits
from align_tf.server.prometheus import Metrics
from align_tf.server.rest_api import RestApp
from align_tf.server.servables import (
    DEFAULT_SIGNATURE,
    ModelConfig,
    Servables,
    read_model_config_file,
)
from align_tf.server.status_codes import RequestError, invalid_argument

MAX_MESSAGE_LENGTH = 1024  # characters of a gRPC error
GRACE_SECONDS = 20.0  # that requests in flight have when the server stops
ON_ITS_WAY_SECONDS = 1.0  # that a connection without a request has when the server stops
HEALTH_SERVICES = (  # of grpc.health.v1; "" is the server as a whole
    "",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
)
SILENCE_SECONDS = 60  # after which a connection whose other end does not acknowledge is closed

# The field of TensorProto that holds a dtype's values, as TensorFlow Serving fills it.
_PROTO_FIELDS = {
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int8: "int_val",
    tf.uint8: "int_val",
    tf.int16: "int_val",
    tf.uint16: "int_val",
    tf.int32: "int_val",
    tf.int64: "int64_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}


# --- gRPC ----------------------------------------------------------------------------------


def _aborting(method: Callable) -> Callable:
    """Turns a method's errors into the call's status."""

    @functools.wraps(method)
    def wrapped(self, request, context):
        try:
            return method(self, request, context)
        except RequestError as error:
            context.abort(grpc.StatusCode[error.code], _shortened(error.message))
        except MemoryError:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Out of memory")
        except Exception as error:
            traceback.print_exc()
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    return wrapped


def _shortened(message: str) -> str:
    """Keeps a message within what fits into a call's trailers, as TensorFlow Serving does."""
    if len(message) <= MAX_MESSAGE_LENGTH:
        return message
    return message[:MAX_MESSAGE_LENGTH] + "...TRUNCATED"


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, servables: Servables, gate: Gate, metrics: Metrics):
        self.servables, self.gate, self.metrics = servables, gate, metrics

    @_aborting
    def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        model = self.servables.label(request.model_spec.name)
        with self.metrics.request(model, "Predict", "GRPC"), self.gate:
            if not context.is_active():  # its deadline has passed while it waited
                raise RequestError("CANCELLED", "The caller has gone")
            return self._predict(request)

    def _predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        _require_model_spec(request)
        servable = self.servables.find(request.model_spec)
        outputs = servable.predict(
            request.model_spec.signature_name,
            {name: _from_proto(name, tensor) for name, tensor in request.inputs.items()},
            request.output_filter,
        )
        response = predict_pb2.PredictResponse(
            outputs={name: _to_proto(array) for name, array in outputs.items()}
        )
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.model_spec.signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        return response

    @_aborting
    def GetModelMetadata(
        self,
        request: get_model_metadata_pb2.GetModelMetadataRequest,
        context: grpc.ServicerContext,
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        _require_model_spec(request)
        if not request.metadata_field:
            raise invalid_argument(
                "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != "signature_def":
                raise invalid_argument(f"Metadata field {field} is not supported")
        return self.servables.find(request.model_spec).metadata()


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, servables: Servables):
        self.servables = servables

    @_aborting
    def GetModelStatus(
        self,
        request: get_model_status_pb2.GetModelStatusRequest,
        context: grpc.ServicerContext,
    ) -> get_model_status_pb2.GetModelStatusResponse:
        _require_model_spec(request)
        return self.servables.status(request.model_spec)


class _HealthService(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, whose streams of Watch end in the drain: an open one holds a stop up.

    What streams send is sent by one thread: their beginnings and the drain come one by one.
    """

    thread = futures.ThreadPoolExecutor(1, "health")

    def __init__(self):
        self.draining = False
        self.streams: dict[Callable, str] = {}  # what each sends by -> the service it watches

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in HEALTH_SERVICES:
            context.abort(grpc.StatusCode.NOT_FOUND, f'unknown service "{request.service}"')
        return self._status(request.service)

    def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,
        send_response_callback: Callable,
    ) -> None:
        self.streams[send_response_callback] = request.service
        forget = functools.partial(self.streams.pop, send_response_callback, None)
        if not context.add_callback(forget):  # it has been cancelled already
            forget()
            return
        send_response_callback(self._status(request.service))
        if self.draining:
            send_response_callback(None)

    # gRPC's own way of a stream that keeps no thread.
    Watch.experimental_non_blocking, Watch.experimental_thread_pool = True, thread

    def drain(self) -> None:
        """Tells who watches that the services stop, and ends the streams."""
        self.thread.submit(self._drain)

    def _drain(self) -> None:
        self.draining = True
        for send, service in list(self.streams.items()):
            if service in HEALTH_SERVICES:
                send(self._status(service))
            send(None)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in HEALTH_SERVICES:
            return health_pb2.HealthCheckResponse(status="SERVICE_UNKNOWN")
        return health_pb2.HealthCheckResponse(status="NOT_SERVING" if self.draining else "SERVING")


def _require_model_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")


def _from_proto(name: str, tensor: tensor_pb2.TensorProto) -> np.ndarray:
    try:
        return tf.make_ndarray(tensor)
    except (TypeError, ValueError, OverflowError):
        raise invalid_argument(f"tensor parsing error: {name}") from None


def _to_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    if dtype not in _PROTO_FIELDS:
        return tf.make_tensor_proto(array)
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    getattr(proto, _PROTO_FIELDS[dtype]).extend(array.ravel().tolist())
    return proto


# --- the server ----------------------------------------------------------------------------


class ModelServer:
    """Serves SavedModels over gRPC and REST from threads of this process.

    As a context manager it starts on entry and stops on exit.

    Attributes:
        host, grpc_port, rest_port: where it listens; the ports are the bound ones once started.
        model_names: the names of the models.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike | None,
        *,
        model_name: str = "align",
        grpc_port: int = 0,
        rest_port: int = 0,
        host: str = "127.0.0.1",
        model_config_file: str | os.PathLike | None = None,
        batching: BatchingParameters | None = None,
        limits: Limits | None = None,
        metrics_path: str | None = None,
    ):
        """Makes a server that does not listen yet.

        Args:
            model_dir: a folder with numbered versions of a SavedModel, or one version.
            model_name: the name under which model_dir is served.
            grpc_port: 0 takes a free one.
            rest_port: 0 takes a free one.
            host: the address to listen on; the default is reached from this machine alone.
            model_config_file: TensorFlow Serving's model_config_list, in place of model_dir.
            batching: merge requests of different callers; None runs each on its own.
            limits: on the size and the number of requests, and on slow clients; None is Limits().
            metrics_path: where REST serves metrics for Prometheus; None for nowhere.

        Raises:
            ValueError: not exactly one of model_dir and model_config_file is given, the file
                is not a model_config_list.
            FileNotFoundError: there is no such folder or file.
        """
        if (model_dir is None) == (model_config_file is None):
            raise ValueError("expected model_dir or model_config_file, one of them")
        if model_config_file is not None:
            configs = read_model_config_file(model_config_file)
        elif not os.path.isdir(model_dir):
            raise FileNotFoundError(f"{os.fspath(model_dir)}: no such folder")
        else:
            configs = [ModelConfig(model_name, pathlib.Path(model_dir).absolute())]
        self.host, self.grpc_port, self.rest_port = host, grpc_port, rest_port
        self.model_names = [config.name for config in configs]
        self._metrics, self._metrics_path = Metrics(), metrics_path
        self._gate = Gate(limits or Limits())
        self._batcher = batching and Batcher(batching, self._metrics)
        self._servables = Servables(configs, self._metrics, self._batcher)
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Loads the models and listens.

        Raises:
            OSError: a port is in use.
            FileNotFoundError: a folder has no version to serve.
            ValueError: a version cannot be loaded, or a label points at one that is not served.
        """
        with contextlib.ExitStack() as stack:
            rest_socket = stack.enter_context(_bind(self.host, self.rest_port))
            with _bind(self.host, self.grpc_port):
                pass  # gRPC's own refusal does not say why
            if self._batcher is not None:
                self._batcher.start()
                stack.callback(self._batcher.stop)
            stack.callback(self._servables.stop)
            self._servables.start()
            stop_grpc = self._start_grpc(stack)
            stop_rest = self._start_rest(stack, rest_socket)
            # The first to run: both refuse what is new before either waits for what is in flight.
            stack.callback(lambda: [stop() for stop in (stop_grpc, stop_rest)])
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """Stops listening, gives requests in flight GRACE_SECONDS, and drops the models."""
        self._stack.close()

    def wait(self, announce: Callable[[], None] | None = None) -> None:
        """Blocks until SIGINT or SIGTERM; for the main thread.

        Args:
            announce: called once those signals end the wait, to tell of it.
        """
        with _stop_signals() as received:
            if announce:
                announce()
            while not received:  # a lock that the handler takes too could be held when it runs
                time.sleep(0.1)

    def __enter__(self) -> "ModelServer":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def summary(self) -> str:
        """Where gRPC and REST listen and what is served, in one line."""
        models = []
        for name in self.model_names:
            versions = self._servables.versions(name)
            plural = "s" if len(versions) > 1 else ""
            models.append(f"{name} (version{plural} {', '.join(map(str, versions))})")
        name = self.model_names[0] if len(self.model_names) == 1 else "NAME"
        host = _in_url(self.host)
        return (
            f"Serving {', '.join(models)}: gRPC at {host}:{self.grpc_port}, "
            f"REST at http://{host}:{self.rest_port}/v1/models/{name}"
        )

    def _start_grpc(self, stack: contextlib.ExitStack) -> Callable[[], Any]:
        """Starts gRPC, has the stack end it, and returns what makes it refuse new calls."""
        options = [
            ("grpc.max_receive_message_length", self._gate.limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", SILENCE_SECONDS * 1000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        pool = futures.ThreadPoolExecutor(self._gate.limits.threads)
        server = grpc.server(pool, options=options)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            _PredictionService(self._servables, self._gate, self._metrics), server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            _ModelService(self._servables), server
        )
        checks = _HealthService()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        address = f"{_in_url(self.host)}:{self.grpc_port}"
        try:
            self.grpc_port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"{address}: cannot listen: {error}") from None
        server.start()
        stopped: list[threading.Event] = []

        def stop():
            checks.drain()
            stopped.append(server.stop(GRACE_SECONDS))

        stack.callback(lambda: (stopped[0] if stopped else server.stop(None)).wait())
        return stop

    def _start_rest(
        self, stack: contextlib.ExitStack, rest_socket: socket.socket
    ) -> Callable[[], Any]:
        """Starts REST, has the stack end it, and returns what makes it refuse new requests."""
        app = RestApp(self._servables, self._gate, self._metrics, self._metrics_path)
        config = uvicorn.Config(
            app,
            http=functools.partial(_HttpProtocol, self._gate.limits.client_timeout),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(GRACE_SECONDS),
        )
        server = uvicorn.Server(config)
        self.rest_port = rest_socket.getsockname()[1]
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [rest_socket]}, name="rest", daemon=True
        )
        thread.start()

        def stop():
            server.should_exit = True

        stack.callback(app.close)
        stack.callback(thread.join)
        stack.callback(stop)
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise OSError(f"{self.host}:{self.rest_port}: the REST server did not start")
        return stop


class _HttpProtocol(H11Protocol):
    """uvicorn's HTTP, but for clients that are slow, silent, or new when the server stops.

    uvicorn itself waits for ever for the head of a first request, or for the rest of one begun. It
    gives no answer to a client that has closed its sending side, or that has connected when the
    server stops and whose request is on its way.
    """

    def __init__(self, head_timeout: float, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.head_timeout = head_timeout
        self.head_timer: asyncio.TimerHandle | None = None
        self.input_ended = self.stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # also for one that stops reading its answer
            milliseconds = SILENCE_SECONDS * 1000
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.stopping and self.cycle is not None:
            self.cycle.keep_alive = False
        self._watch_head()

    def shutdown(self) -> None:
        self.stopping = True
        if self.cycle is None:
            self.loop.call_later(ON_ITS_WAY_SECONDS, self._close_unused)
        else:
            super().shutdown()

    def _close_unused(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            super().shutdown()

    def eof_received(self) -> bool:
        """Keeps the connection of a client that has sent all and still listens."""
        self.input_ended = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return self.input_ended

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.input_ended and self.cycle.response_complete:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
        super().connection_lost(error)

    def _watch_head(self) -> None:
        """Starts the timer where a head is awaited, and stops it where one has come."""
        if self.conn.their_state is not h11.IDLE:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(self.head_timeout, self.transport.close)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> socket.socket:
    """Takes a port, which refuses connections until it is listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sets TCP_NODELAY on what it accepts.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise OSError(f"{host}:{port}: cannot listen: {error}") from None
    return taken


def serve(server: ModelServer) -> None:
    """Runs a server until SIGINT or SIGTERM; says on stderr when it is ready.

    Raises: what its start() does.
    """
    with server:
        server.wait(lambda: print(server.summary, file=sys.stderr, flush=True))
        print("Stopping ...", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, in place of what they did before."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
