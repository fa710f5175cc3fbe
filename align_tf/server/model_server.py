"""The embedded server: TensorFlow Serving's gRPC and REST, for any SavedModel, on one machine."""

import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from align_tf import interrupts
from align_tf.extras import extra

with extra("serve", "the server needs extra packages"):
    import grpc
    import grpc_health.v1  # noqa: F401
    import h11  # noqa: F401
    import starlette  # noqa: F401
    import tensorflow_serving  # noqa: F401
    import uvicorn
from align_tf.server.batching import Batcher, BatchingParameters
from align_tf.server.grpc_calls import Calls
from align_tf.server.grpc_services import HealthService, ModelService, PredictionService
from align_tf.server.http_protocol import SILENCE_SECONDS, HttpProtocol, HttpServer
from align_tf.server.limits import Gate, Limits
from align_tf.server.model_config import ModelConfig, read_model_config_file
from align_tf.server.prometheus import Metrics
from align_tf.server.rest_api import RestApp
from align_tf.server.servables import Servables

METADATA = os.path.join("assets.extra", "align_tf.json")  # of an export of align_tf
FROZEN_WEIGHTS = "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS"
ENDING_SECONDS = 1.0  # beyond the grace, to tell those who are cut off


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
                is not a model_config_list, model_name or host is empty, or both ports are one.
            FileNotFoundError: there is no such folder or file.
        """
        if (model_dir is None) == (model_config_file is None):
            raise ValueError("expected model_dir or model_config_file, one of them")
        for name, given in (("model_name", model_name), ("host", host)):
            if not given:
                raise ValueError(f"{name}={given!r}: expected it not to be empty")
        if grpc_port == rest_port and grpc_port:
            raise ValueError(f"grpc_port={grpc_port}: expected another than rest_port={rest_port}")
        if model_config_file is not None:
            configs = read_model_config_file(model_config_file)
        elif not os.path.isdir(model_dir):
            if os.path.exists(model_dir):
                raise NotADirectoryError(f"{os.fspath(model_dir)}: a file; expected a folder")
            raise FileNotFoundError(f"{os.fspath(model_dir)}: no such folder")
        else:
            configs = [ModelConfig(model_name, pathlib.Path(model_dir).absolute())]
        self.host, self.grpc_port, self.rest_port = host, grpc_port, rest_port
        self._configs = configs
        self.model_names = [config.name for config in configs]
        self._metrics, self._metrics_path = Metrics(), metrics_path
        self._gate = Gate(limits or Limits())
        self._batcher = batching and Batcher(batching, self._metrics)
        self._servables = Servables(configs, self._metrics, self._batcher)
        self._stack = contextlib.ExitStack()
        self._end = math.inf  # when a stop has taken its time

    @property
    def in_half_precision(self) -> bool:
        """Whether a version to serve says of itself that its weights are not in float32."""
        folders = (folder for config in self._configs for folder in config.folders().values())
        for path in (folder / METADATA for folder in folders):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads(path.read_bytes()).get("dtype", "float32") != "float32":
                    return True
        return False

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
                stack.callback(lambda: self._batcher.stop(self._time_left()))
            stack.callback(lambda: self._servables.stop(self._time_left()))
            self._servables.start()
            stop_grpc = self._start_grpc(stack)
            stop_rest = self._start_rest(stack, rest_socket)
            # The first to run: both refuse what is new before either waits for what is in flight.
            stack.callback(lambda: [stop() for stop in (stop_grpc, stop_rest)])
            self._stack = stack.pop_all()

    def stop(self) -> list[str]:
        """Stops listening, gives what is in flight its grace_seconds, and drops the models.

        Returns:
            What is still at work, in words, as TensorFlow lets nothing be broken off: its callers
            have been told, and its threads end with it.
        """
        self._end = time.monotonic() + self._gate.limits.grace_seconds + ENDING_SECONDS
        self._stack.close()
        inside = self._gate.inside
        at_work = [f"{inside} prediction{'s' * (inside > 1)}"] if inside else []
        return at_work + ["the load of a version"] * self._servables.loads

    def _time_left(self) -> float | None:
        """Returns the seconds that a stop has left; None if there is none."""
        return None if math.isinf(self._end) else max(0.0, self._end - time.monotonic())

    def wait(self, announce: Callable[[], None] | None = None) -> None:
        """Blocks until SIGINT or SIGTERM; for the main thread.

        Args:
            announce: called once those signals end the wait, to tell of it.
        """
        received: list[int] = []
        with _signals(lambda number, _: received.append(number)):
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
        largest = self._gate.limits.max_request_bytes
        options = [
            ("grpc.max_receive_message_length", min(largest, 2**31 - 1)),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", SILENCE_SECONDS * 1000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        pool = futures.ThreadPoolExecutor(self._gate.limits.threads, "grpc")
        server, calls = grpc.server(pool, options=options), Calls(self._gate.limits)
        checks = HealthService(calls)
        services = (
            PredictionService(self._servables, self._gate, self._metrics, calls),
            ModelService(self._servables, calls),
            checks,
        )
        server.add_generic_rpc_handlers([service.handlers() for service in services])
        address = f"{_in_url(self.host)}:{self.grpc_port}"
        try:
            self.grpc_port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"{address}: cannot listen: {error}") from None
        calls.start()
        stack.callback(calls.stop)
        server.start()
        stopped: list[threading.Event] = []

        def stop():
            checks.drain()
            stopped.append(server.stop(self._gate.limits.grace_seconds))

        def wait():
            (stopped[0] if stopped else server.stop(None)).wait(self._time_left())

        stack.callback(wait)
        return stop

    def _start_rest(
        self, stack: contextlib.ExitStack, rest_socket: socket.socket
    ) -> Callable[[], Any]:
        """Starts REST, has the stack end it, and returns what makes it refuse new requests."""
        try:  # two that have taken it, neither listening, may both have got it
            rest_socket.listen()
        except OSError as error:
            raise _cannot_listen(self.host, rest_socket.getsockname()[1], error) from None
        app = RestApp(self._servables, self._gate, self._metrics, self._metrics_path)
        grace = self._gate.limits.grace_seconds
        config = uvicorn.Config(
            app,
            http=functools.partial(HttpProtocol, self._gate.limits.client_timeout),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=grace + ENDING_SECONDS,
        )
        server = HttpServer(config, grace, app.give_up)
        self.rest_port = rest_socket.getsockname()[1]
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [rest_socket]}, name="rest", daemon=True
        )
        thread.start()

        def stop():
            server.should_exit = True

        stack.callback(app.close)
        stack.callback(lambda: thread.join(self._time_left()))
        stack.callback(stop)
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise OSError(f"{self.host}:{self.rest_port}: the REST server did not start")
        return stop


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
        raise _cannot_listen(host, port, error) from None
    return taken


def _cannot_listen(host: str, port: int, error: Exception) -> OSError:
    return OSError(f"{host}:{port}: cannot listen: {error}")


def serve(server: ModelServer) -> list[str]:
    """Runs a server until SIGINT or SIGTERM; says on stderr when it is ready.

    Another of these signals, while it stops, ends the process at once.

    Returns:
        What is still at work, as its stop() tells.

    Raises: what its start() does.
    """
    with _frozen_weights() if server.in_half_precision else contextlib.nullcontext():
        server.start()
        try:
            interrupts.check()
            server.wait(lambda: print(server.summary, file=sys.stderr, flush=True))
        finally:
            with _signals(signal.SIG_DFL):
                print("Stopping ...", file=sys.stderr, flush=True)
                at_work = server.stop()
    return at_work


@contextlib.contextmanager
def _frozen_weights() -> Iterator[None]:
    """Has oneDNN keep weights in the layout it computes in, as those of what is served stay.

    Each signature keeps its own, so that the weights are three times in memory: it is for half
    precision alone, which becomes much faster.

    Only as long as this lasts: a training in the same process would compute with its first weights.
    """
    before = os.environ.get(FROZEN_WEIGHTS)
    os.environ.setdefault(FROZEN_WEIGHTS, "1")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(FROZEN_WEIGHTS, None)


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Has SIGINT and SIGTERM do something else than before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, before in zip(numbers, previous, strict=True):
            signal.signal(number, before)
