"""Loads `align-tf serve` with align-tiny: answers checked, memory watched, batching compared.

    python benchmarks/serving.py [--seconds 60] [--clients 32] [--json]

- load: good and bad requests over REST and gRPC for so many seconds; every answer is held against
  a direct call of the signature. Memory is the server's anonymous pages, resident or swapped
  out, in steady state, which is after a fifth of the time.
- kill: the same, with a kill -9 and a restart in the middle.
- batching: 32 clients of one signature against a server that batches, and one that does not.
- overhead: one client beside a call of the signature in this process.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import json
import os
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import rich.console
import rich.table
import tensorflow as tf
from side_by_side import compare, show
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from align_tf import AlignModel, AlignProcessor, export_saved_model
from align_tf.hub import BUNDLED
from align_tf.server.prometheus import Metrics
from align_tf.server.servable import Servable

BATCHING = """
max_batch_size { value: 32 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 100 }
num_batch_threads { value: 2 }
pad_variable_length_inputs: true
"""
EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
LABELS = ["pizza", "rocket", "snake", "cup of coffee"]
TOLERANCE = 1e-4  # a batch of another size is summed in another order
WARM = 0.2  # of the time
TIMEOUT = 60.0  # seconds


# --- servers -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class Server:
    """`align-tf serve` in a process of its own, at ports that stay the same when it restarts."""

    def __init__(self, model: pathlib.Path, *flags: str):
        self.grpc_port, self.rest_port = free_port(), free_port()
        ports = ["--grpc-port", str(self.grpc_port), "--rest-port", str(self.rest_port)]
        self.command = [sys.executable, "-m", "align_tf.cli", "serve", os.fspath(model)]
        self.command += [*ports, *flags]

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        if not any(line.startswith("Serving ") for line in self.process.stderr):
            raise RuntimeError(f"the server did not start: {' '.join(self.command)}")
        # So that it never waits for its own messages to be read.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()

    def memory_mib(self) -> float:
        """Returns its anonymous memory: what leaks, and what no one reclaims from it unnoticed."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        fields = [int(status.partition(f"{key}:")[2].split()[0]) for key in ("RssAnon", "VmSwap")]
        return sum(fields) / 1024


# --- requests ------------------------------------------------------------------------------


def rest(server: Server, body: bytes, model: str = "align") -> tuple[int, bytes]:
    """Asks over REST, on a connection that each thread keeps."""
    kept = _kept(server, "rest")
    if not hasattr(kept, "connection"):
        kept.connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=TIMEOUT)
    ask = functools.partial(kept.connection.request, "POST", f"/v1/models/{model}:predict", body)
    try:
        try:
            ask()
        except BrokenPipeError:  # the server closed it since the last request
            kept.connection.close()
            ask()
        response = kept.connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        kept.connection.close()  # the next request opens it again
        raise


def call(server: Server, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
    """Asks over gRPC, on a channel that each thread keeps."""
    kept = _kept(server, "grpc")
    if not hasattr(kept, "stub"):
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
        channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options)
        kept.stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    return kept.stub.Predict(request, timeout=TIMEOUT)


@functools.cache
def _kept(server: Server, protocol: str) -> threading.local:
    return threading.local()


def proto(signature: str, **inputs: Any) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "align", signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


# A request: asks a server, and says whether the answer is as it should be.
Request = Callable[[Server], bool]


def good_requests(direct: Any) -> dict[str, list[Request]]:
    """Makes requests whose answers are known, from direct calls of the signatures."""
    made = collections.defaultdict(list)
    for number, path in enumerate(EXAMPLES):
        image = path.read_bytes()
        labels = LABELS[: 2 + number % 3]
        outputs = {
            "embed_text": direct["embed_text"](texts=tf.constant(labels)),
            "embed_image": direct["embed_image"](image_bytes=tf.constant([image])),
            "classify": direct["serving_default"](
                image_bytes=tf.constant([image]), labels=tf.constant([labels])
            ),
        }
        requests = {
            "embed_text": (proto("embed_text", texts=labels), labels),
            "embed_image": (proto("embed_image", image_bytes=[image]), [b64(image)]),
            "classify": (
                proto("", image_bytes=[image], labels=[labels]),
                [{"image_bytes": b64(image), "labels": labels}],
            ),
        }
        for kind, (request, instances) in requests.items():
            name = {"classify": "probs", "embed_text": "text_embeds"}.get(kind, "image_embeds")
            expected = outputs[kind][name].numpy()
            signature = "serving_default" if kind == "classify" else kind
            body = json.dumps({"signature_name": signature, "instances": instances}).encode()
            made[f"{kind}, gRPC"].append(functools.partial(ask_grpc, request, name, expected))
            made[f"{kind}, REST"].append(functools.partial(ask_rest, body, name, expected))
    return dict(made)


def ask_grpc(request: Any, name: str, expected: np.ndarray, server: Server) -> bool:
    return agrees(tf.make_ndarray(call(server, request).outputs[name]), expected)


def ask_rest(body: bytes, name: str, expected: np.ndarray, server: Server) -> bool:
    status, answer = rest(server, body)
    if status != 200:
        return False
    rows = json.loads(answer)["predictions"]
    rows = [row[name] if isinstance(row, dict) else row for row in rows]
    return agrees(np.array(rows), expected)


def agrees(got: np.ndarray, expected: np.ndarray) -> bool:
    """Compares; a batch may have padded the labels, whose probabilities are then 0."""
    width = expected.shape[1]
    return np.allclose(got[:, :width], expected, atol=TOLERANCE) and not got[:, width:].any()


def bad_requests() -> dict[str, list[Request]]:
    """Makes requests that are to be refused, with what is to be said."""
    image = EXAMPLES[0].read_bytes()

    def refused_rest(body: bytes, status: int, clause: str, model: str = "align") -> Request:
        def ask(server: Server) -> bool:
            got, answer = rest(server, body, model)
            return got == status and clause in json.loads(answer)["error"]

        return ask

    def refused_grpc(request: Any, code: str, clause: str) -> Request:
        def ask(server: Server) -> bool:
            try:
                call(server, request)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    raise
                return error.code().name == code and clause in error.details()
            return False

        return ask

    row = {"signature_name": "embed_image", "instances": [b64(image[:200])]}
    return {
        "bad, REST": [
            refused_rest(b"{", 400, "JSON Parse error"),
            refused_rest(b'{"instances": ["a"]}', 404, "Servable not found", "none"),
            refused_rest(b'{"signature_name": "no", "instances": ["a"]}', 400, '"no" not found'),
            refused_rest(json.dumps(row).encode(), 400, "0"),
        ],
        "bad, gRPC": [
            refused_grpc(proto("no", texts=["a"]), "FAILED_PRECONDITION", '"no" not found'),
            refused_grpc(proto("embed_text", texts=[1]), "INVALID_ARGUMENT", ""),
            refused_grpc(proto("embed_image", image_bytes=[b"x"]), "INVALID_ARGUMENT", "0"),
        ],
    }


# --- load ----------------------------------------------------------------------------------


class Load:
    """Clients that ask without pause, and what became of their requests."""

    def __init__(self, server: Server, requests: dict[str, list[Request]], clients: int):
        self.server, self.requests = server, requests
        self.seconds = {kind: [] for kind in requests}  # of each answer
        self.wrong, self.failures = collections.Counter(), collections.Counter()
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.threads = [
            threading.Thread(target=self.run, args=[random.Random(seed)], daemon=True)
            for seed in range(clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def run(self, rng: random.Random) -> None:
        kinds = list(self.requests)
        while not self.stopped.is_set():
            kind = rng.choice(kinds)
            started = time.perf_counter()
            try:
                right = rng.choice(self.requests[kind])(self.server)
            except (OSError, http.client.HTTPException, grpc.RpcError) as error:
                with self.lock:
                    self.failures[failure(error)] += 1
                time.sleep(0.05)
                continue
            seconds = time.perf_counter() - started
            with self.lock:
                self.seconds[kind].append(seconds)
                self.wrong[kind] += not right

    def rows(self, seconds: float) -> list[dict[str, Any]]:
        """Returns the figures of each kind of request, and of all."""
        with self.lock:
            everything = [second for kind in self.seconds.values() for second in kind]
            kinds = {**self.seconds, "all": everything}
            return [
                {
                    "requests": kind,
                    "answers": len(times),
                    "wrong": self.wrong[kind] if kind != "all" else self.wrong.total(),
                    "per_second": len(times) / seconds,
                    "p50_ms": float(np.percentile(times, 50)) * 1e3,
                    "p99_ms": float(np.percentile(times, 99)) * 1e3,
                }
                for kind, times in kinds.items()
            ]


def failure(error: Exception) -> str:
    """Names a request that got no answer: "refused" where the server had none of it."""
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, grpc.RpcError):
        unsent = "connect" in error.details() and "refused" in error.details()
        return "refused" if unsent else f"broken off: {error.code().name}"
    return f"broken off: {type(error).__name__}"


def steady_load(server: Server, load: Load, seconds: float) -> dict[str, Any]:
    memory, started = [], time.monotonic()
    with load:
        while (passed := time.monotonic() - started) < seconds:
            print(f"\rload: {passed:.0f} of {seconds:g} s", end="", file=sys.stderr, flush=True)
            time.sleep(min(1, seconds / 60))
            if passed > WARM * seconds:
                memory.append(server.memory_mib())
    print(file=sys.stderr)
    part = max(1, len(memory) // 10)
    start, end = statistics.median(memory[:part]), statistics.median(memory[-part:])
    return {
        "rows": load.rows(seconds),
        "failures": dict(load.failures),
        "memory_mib": [start, end],
        "growth": end / start - 1,
    }


def killed(server: Server, load: Load, seconds: float) -> dict[str, Any]:
    """Kills the server under load and starts it again; what was in flight is broken off."""
    print("kill: loading, killing, restarting ...", file=sys.stderr)
    with load:
        time.sleep(seconds)
        server.__exit__()
        with server:
            time.sleep(seconds)
            after = load.rows(seconds)[-1]["answers"]
            time.sleep(seconds)
            rows = load.rows(3 * seconds)
            load.__exit__()
    return {
        "rows": rows[-1:],
        "failures": dict(load.failures),
        "answers_after_restart": rows[-1]["answers"] - after,
    }


# --- comparisons ---------------------------------------------------------------------------


def batching_against_none(
    model: pathlib.Path, parameters: pathlib.Path, clients: int, rounds: int
) -> list[dict[str, Any]]:
    image = EXAMPLES[0].read_bytes()
    requests = {
        "embed_text": [proto("embed_text", texts=[f"a picture of {n}"]) for n in range(clients)],
        "embed_image": [proto("embed_image", image_bytes=[image])] * clients,
    }
    flags = ["--enable-batching", "--batching-parameters-file", os.fspath(parameters)]
    with (
        Server(model, *flags, "--max-concurrent-requests", str(2 * clients)) as merged,
        Server(model) as single,
        concurrent.futures.ThreadPoolExecutor(clients) as pool,
    ):

        def ask(server: Server, messages: list[Any]) -> None:
            list(pool.map(functools.partial(call, server), messages * 8))

        return [
            compare(
                f"{signature}, one row a request, {clients} clients over gRPC",
                {
                    "batching": functools.partial(ask, merged, messages),
                    "one at a time": functools.partial(ask, single, messages),
                },
                items=8 * clients,
                rounds=rounds,
            )
            for signature, messages in requests.items()
        ]


def overhead(
    version: pathlib.Path, rounds: int, signature: str = "embed_text", times: int = 50
) -> dict[str, Any]:
    """Compares a call of a signature in this process with the same over gRPC and REST.

    Args:
        version: a SavedModel's numbered folder.
        rounds: that count.
        signature: `embed_text` or `embed_image`, asked for one row.
        times: calls of a round.
    """
    text, image = "a picture of a pizza", EXAMPLES[0].read_bytes()
    # signature: its input, a value, the value in JSON
    inputs = {
        "embed_text": ("texts", text.encode(), text),
        "embed_image": ("image_bytes", image, b64(image)),
    }
    name, value, instance = inputs[signature]
    direct = Servable(version, "align", int(version.name), Metrics())
    request = proto(signature, **{name: [value]})
    body = json.dumps({"signature_name": signature, "instances": [instance]}).encode()
    array = np.array([value], object)
    with Server(version.parent, "--model-name", "align") as server:
        contenders = {
            "direct call": lambda: direct.predict(signature, {name: array}),
            "gRPC": lambda: call(server, request),
            "REST": lambda: rest(server, body),
        }
        return compare(
            f"{signature}, one row, one client",
            {
                name: lambda ask=ask: [ask() for _ in range(times)]
                for name, ask in contenders.items()
            },
            items=times,
            rounds=rounds,
        )


def added_seconds(compared: dict[str, Any]) -> dict[str, float]:
    """Returns what each protocol adds to a direct call, the median over the rounds."""
    direct, *served = compared["rows"]
    return {
        row["name"]: statistics.median(
            a - b for a, b in zip(row["times"], direct["times"], strict=True)
        )
        for row in served
    }


# --- the whole -----------------------------------------------------------------------------


@contextlib.contextmanager
def exported() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as folder:
        model = AlignModel.from_pretrained("align-tiny")
        processor = AlignProcessor.from_pretrained("align-tiny")
        yield export_saved_model(model, processor, pathlib.Path(folder) / "align")


def print_load(title: str, result: dict[str, Any]) -> None:
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("", "answers", "wrong", "a second", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        figures = [f"{row[key]:,.1f}" for key in ("per_second", "p50_ms", "p99_ms")]
        table.add_row(row["requests"], str(row["answers"]), str(row["wrong"]), *figures)
    console = rich.console.Console()
    console.print(table)
    console.print(f"without an answer: {result['failures'] or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    clients, seconds, rounds = arguments.clients, arguments.seconds, arguments.rounds
    with exported() as version:
        parameters = version.parent / "batching.txt"
        parameters.write_text(BATCHING)
        direct = tf.saved_model.load(os.fspath(version)).signatures
        requests = {**good_requests(direct), **bad_requests()}
        flags = ["--enable-batching", "--batching-parameters-file", os.fspath(parameters)]
        server = Server(version.parent, *flags, "--max-concurrent-requests", str(2 * clients))
        with server:
            steady = steady_load(server, Load(server, requests, clients), seconds)
        with server:
            kill = killed(server, Load(server, requests, clients), min(seconds / 6, 10))
        compared = batching_against_none(version.parent, parameters, clients, rounds)
        beside = overhead(version, rounds)
    if arguments.json:
        print(json.dumps({"load": steady, "kill": kill, "compared": [*compared, beside]}, indent=2))
        return
    start, end = steady["memory_mib"]
    print_load(f"{clients} clients for {seconds:g} s", steady)
    print(f"memory: {start:.0f} MiB to {end:.0f} MiB in steady state, {steady['growth']:+.1%}\n")
    print_load(f"{clients} clients, kill -9, restart", kill)
    print(f"answers after the restart: {kill['answers_after_restart']}\n")
    show([*compared, beside])
    for name, seconds in added_seconds(beside).items():
        print(f"{name} adds {seconds * 1e3:.2f} ms to a direct call")


if __name__ == "__main__":
    main()
