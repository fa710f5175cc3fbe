import asyncio
import concurrent.futures
import contextlib
import datetime
import http.server
import io
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import types

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from http_serving import serving

from align_tf.client import (
    AlignClient,
    AlignServerError,
    AsyncAlignClient,
    Signature,
    TensorSpec,
    Tls,
    VersionStatus,
    align_client,
    endpoint,
)
from align_tf.client.endpoint import Attempts, ServerUnavailable
from align_tf.server import ModelServer


class Probe(tf.Module):
    """The signatures of an exported model with numbers that can be told in advance.

    An image's brightness is the mean of its pixels, a text's size its bytes.
    """

    def brightness(self, image_bytes):
        def one(image):
            return tf.reduce_mean(tf.cast(tf.io.decode_png(image, 3), tf.float32))

        return tf.map_fn(one, image_bytes, fn_output_signature=tf.float32)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "image_bytes"),
            tf.TensorSpec([None, None], tf.string, "labels"),
        ]
    )
    def serving_default(self, image_bytes, labels):
        sizes = tf.cast(tf.strings.length(labels), tf.float32)
        logits = sizes + self.brightness(image_bytes)[:, None]
        # As if merged with a request of one more label.
        wider = tf.cast(tf.reduce_any(labels == "merged"), tf.int32)
        logits = tf.pad(logits, [[0, 0], [0, wider]], constant_values=-1e38)
        return {"logits": logits, "probs": tf.nn.softmax(logits)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def embed_image(self, image_bytes):
        brightness = self.brightness(image_bytes)
        return {"image_embeds": tf.stack([brightness, -brightness], axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "texts")])
    def embed_text(self, texts):
        refused = tf.strings.as_string(tf.where(texts == "refuse me")[:1, 0])
        message = tf.strings.reduce_join(["texts[", tf.strings.reduce_join(refused), "]: refused"])
        with tf.control_dependencies([tf.debugging.Assert(tf.size(refused) == 0, [message])]):
            texts = tf.identity(texts)
        size = tf.cast(tf.strings.length(texts), tf.float32)
        return {"text_embeds": tf.stack([size, size / 3], axis=1)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.int64, "number"),
            tf.TensorSpec([None], tf.string, "word"),
        ]
    )
    def echo(self, number, word):
        half = tf.cast(number, tf.float64) / 2
        return {"number": number, "half": half, "word": word, "word_bytes": word}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    probe = Probe()
    names = ("serving_default", "embed_image", "embed_text", "echo")
    signatures = {name: getattr(probe, name) for name in names}
    tf.saved_model.save(probe, os.fspath(folder / "3"), signatures=signatures)
    return folder


@pytest.fixture(scope="module")
def server(model_dir):
    with ModelServer(model_dir) as running:
        yield running


@pytest.fixture(params=["rest", "grpc"])
def client(request, server):
    port = server.rest_port if request.param == "rest" else server.grpc_port
    with AlignClient(f"127.0.0.1:{port}", protocol=request.param, batch_size=2) as made:
        yield made


def png(brightness, size=4):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (brightness,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def test_classify(client):
    labels = ["a", "bc", "def"]
    result = client.classify([png(10), png(0), png(250), png(7), png(1)], labels, "is {}")
    sizes = np.float32([4, 5, 6])
    assert result.labels == labels
    assert result.best == ["def"] * 5
    assert (result.logits.shape, result.logits.dtype) == ((5, 3), np.float32)
    np.testing.assert_array_equal(result.logits, np.float32([10, 0, 250, 7, 1])[:, None] + sizes)
    expected = np.exp([4, 5, 6]) / np.exp([4, 5, 6]).sum()
    np.testing.assert_allclose(result.probs, np.tile(expected, (5, 1)), rtol=1e-5)


def test_embed_images_takes_paths_bytes_and_pil_images(client, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(30))
    images = [path, str(path), png(40), PIL.Image.new("L", (3, 2), 50), bytearray(png(60))]
    embeds = client.embed_images(images)
    assert embeds.dtype == np.float32
    assert embeds.tolist() == [[30, -30], [30, -30], [40, -40], [50, -50], [60, -60]]
    assert client.embed_images(path).tolist() == [[30, -30]]
    assert client.embed_images(iter(images)).tolist() == embeds.tolist()


def test_embed_texts(client):
    embeds = client.embed_texts(["abc", "", "é😀", 'q"\\\n'])
    np.testing.assert_array_equal(embeds[:, 0], [3, 0, 6, 4])
    np.testing.assert_array_equal(embeds[:, 1], np.float32([3, 0, 6, 4]) / np.float32(3))
    assert client.embed_texts("abcd")[:, 0].tolist() == [4]


def test_predict_keeps_dtypes_and_bytes(client):
    words = ["é", b"\xff\x00", b""]
    outputs = client.predict({"number": [1, 2**60 + 1, -3], "word": words}, "echo")
    assert outputs["number"].dtype == np.int64
    assert outputs["number"].tolist() == [1, 2**60 + 1, -3]
    assert (outputs["half"].dtype, outputs["half"].tolist()[::2]) == (np.float64, [0.5, -1.5])
    for name in ("word", "word_bytes"):
        assert outputs[name].tolist() == ["é".encode(), b"\xff\x00", b""]


def test_one_is_streamed_as_one(client, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(30))
    for image in (path, str(path), png(30), memoryview(png(30))):
        assert [row.tolist() for row in client.stream_images(image)] == [[30, -30]]
    assert client.embed_images(memoryview(png(30))).tolist() == [[30, -30]]
    assert [row[0] for row in client.stream_texts("abc")] == [3]
    assert client.embed_texts(b"abc")[:, 0].tolist() == [3]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (np.float32([2.5]), "expected int64, got 2.5"),
        (np.array([np.nan]), "expected int64, got nan"),
        (np.uint64([2**63]), "expected int64, got 9223372036854775808"),
        (np.array(["1"]), "expected int64, got an array of <U1"),
        (np.array([2.0]), 2),
        (np.array([True]), 1),
        (tf.constant([7]), 7),
    ],
)
def test_an_array_is_sent_without_loss(client, number, expected):
    inputs = {"number": number, "word": np.array(["a"])}
    if isinstance(expected, int):
        assert client.predict(inputs, "echo")["number"].tolist() == [expected]
        return
    with pytest.raises(ValueError) as error:
        client.predict(inputs, "echo")
    assert str(error.value) == f"inputs['number']: {expected}"


def test_of_nothing_the_outputs_have_their_width(client):
    assert client.predict({"texts": []}, "embed_text")["text_embeds"].shape == (0, 2)


def test_status_and_metadata(client):
    assert client.status() == [VersionStatus(3, "AVAILABLE", "")]
    metadata = client.metadata()
    assert sorted(metadata) == ["echo", "embed_image", "embed_text", "serving_default"]
    assert metadata["serving_default"] == Signature(
        {
            "image_bytes": TensorSpec("object", (None,)),
            "labels": TensorSpec("object", (None, None)),
        },
        {
            "logits": TensorSpec("float32", (None, None)),
            "probs": TensorSpec("float32", (None, None)),
        },
    )


def test_the_servers_refusal_is_raised(client):
    with pytest.raises(AlignServerError, match="DecodePng") as error:
        client.embed_images([b"not an image"])
    assert error.value.status == 400
    with pytest.raises(AlignServerError, match='"zz" not found') as error:
        client.predict({"x": [1]}, "zz")
    assert error.value.status == 400
    assert client.embed_texts(["a"]).shape == (1, 2)  # and the client goes on


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_an_unknown_model_is_named(server, protocol):
    port = server.rest_port if protocol == "rest" else server.grpc_port
    client = AlignClient(f"localhost:{port}", model_name="a b", protocol=protocol)
    with pytest.raises(AlignServerError, match="Could not find any versions of model a b") as error:
        client.status()
    assert error.value.status == 404


def test_wrong_arguments(client, tmp_path):
    for call, error, message in (
        (lambda: client.classify([png(1)], []), ValueError, "labels: expected at least one"),
        (lambda: client.classify([png(1)], "cat"), TypeError, "labels='cat'"),
        (lambda: client.classify([png(1)], ["a"], "b"), ValueError, "template='b'"),
        (lambda: client.classify([], ["a"]), ValueError, "images: expected at least one"),
        (lambda: client.embed_images([3]), TypeError, "got int"),
        (lambda: client.embed_images([tmp_path / "no.png"]), FileNotFoundError, "no.png"),
        (lambda: client.embed_texts([]), ValueError, "texts: expected at least one"),
        (lambda: client.embed_texts(None), TypeError, "texts: expected one or several"),
        (
            lambda: client.embed_texts(["a", 1]),
            TypeError,
            r"texts\[1\]: expected a string, got int",
        ),
        (lambda: client.embed_images(3), TypeError, "images: expected one or several, got int"),
        (lambda: client.embed_images(io.BytesIO(png(1))), TypeError, "several, got BytesIO"),
        (lambda: client.embed_images({"a": png(1)}), TypeError, "several, got dict"),
        (lambda: list(client.stream_images(None)), TypeError, "several, got NoneType"),
        (lambda: client.classify([png(1)], None), TypeError, "labels=None"),
        (lambda: client.classify([png(1)], ["a", None]), TypeError, r"labels\[1\]: expected a str"),
        (lambda: client.classify([png(1)], ["a"], ["{}"]), TypeError, "template="),
        (lambda: client.predict(["a"], "embed_text"), TypeError, "inputs: expected arrays by name"),
        (lambda: client.predict({"texts": ["a"]}, None), TypeError, "signature_name=None"),
        (lambda: client.predict({"texts": [object()]}, "embed_text"), ValueError, "'texts'"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": ""}, "address=''"),
        ({"address": "host:port"}, "address='host:port'"),
        ({"address": "ftp://host"}, 'expected "host:port"'),
        ({"address": "host/path"}, 'expected "host:port"'),
        ({"address": "host", "protocol": "soap"}, "protocol='soap'"),
        ({"address": "host", "batch_size": 0}, "batch_size=0"),
        ({"address": "host", "retries": -1}, "retries=-1"),
        ({"address": "host", "in_flight": 0}, "in_flight=0"),
        ({"address": "http://host", "tls": Tls()}, "expected https:// with tls"),
        ({"address": "grpcs://host"}, "address='grpcs://host': expected http:// or https:// with"),
        ({"address": "http://host", "protocol": "grpc"}, 'expected grpc:// .* protocol="grpc"'),
        ({"address": "http://me:secret@host"}, 'expected "host:port"'),
        ({"address": "http://host?key=1"}, 'expected "host:port"'),
        ({"address": "http://[::1]x"}, 'expected "host:port"'),
        ({"address": "a host"}, 'expected "host:port"'),
        ({"address": "host", "batch_size": 2.5}, "batch_size=2.5: expected a whole number"),
        ({"address": "host", "retries": "1"}, "retries='1': expected a whole number"),
        ({"address": "host", "timeout": 0}, "timeout=0: expected seconds"),
        ({"address": "host", "timeout": float("nan")}, "timeout=nan: expected seconds"),
        ({"address": "host", "timeout": float("inf")}, "timeout=inf: expected seconds"),
        ({"address": "host", "timeout": None}, "timeout=None: expected seconds"),
        ({"address": "host", "model_name": ""}, "model_name='': expected a name"),
        ({"address": "host", "version_label": ""}, "version_label='': expected a name"),
        ({"address": "host", "token": "a\nb"}, "token: expected printable ASCII"),
        ({"address": "host", "token": "ü", "protocol": "grpc"}, "token: expected printable ASCII"),
        ({"address": "host", "tls": True}, "tls=True: expected a Tls"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlignClient(**arguments)


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_an_unreachable_address_is_named(protocol, keep_port):
    port = keep_port()
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}: cannot reach the server"):
        AlignClient(f"127.0.0.1:{port}", protocol=protocol, retries=1).status()


@pytest.mark.parametrize(
    ("protocol", "port", "message"),
    [
        ("rest", "grpc_port", "speaks gRPC: expected the port of REST, or protocol='grpc'"),
        ("grpc", "rest_port", "speaks HTTP: expected the port of gRPC, or protocol='rest'"),
    ],
)
def test_the_port_of_the_other_protocol_is_told_at_once(server, protocol, port, message):
    address = f"127.0.0.1:{getattr(server, port)}"
    client = AlignClient(address, protocol=protocol)
    with client, pytest.raises(ConnectionError, match=f"{address}: {message}") as error:
        client.embed_texts(["a"])
    assert type(error.value) is ConnectionError  # not to be tried again


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_silent_server_times_out(protocol):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        client = AlignClient(address, protocol=protocol, timeout=0.2)
        with pytest.raises(TimeoutError, match=f"{address}: no answer in time"):
            client.status()


def test_a_prediction_and_what_it_asks_before_have_one_deadline(clock):
    answer = b'{"metadata": {"signature_def": {"signature_def": {}}}}'

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            clock.sleep(50)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self):
            clock.sleep(20)
            self.send_error(503)

        def log_message(self, *arguments):
            pass

    with serving(Handler) as address:
        started = clock.now
        with pytest.raises(AlignServerError, match="answered 503"):
            AlignClient(address, timeout=60, retries=1000).embed_texts("a")
    assert clock.now - started == 70  # and not asked again


def test_another_servers_answer_is_shown():
    with socket.create_server(("127.0.0.1", 0)) as other:
        client = AlignClient(f"127.0.0.1:{other.getsockname()[1]}")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.status)
            connection, _ = other.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 502 Bad\r\nContent-Length: 7\r\n\r\n<a>b</a")
            with pytest.raises(AlignServerError, match="answered 502: <a>b</a") as error:
                answer.result()
            connection.close()
    assert error.value.status == 502


def test_requests_of_more_than_4_mb(client):
    image = PIL.Image.effect_noise((3000, 2000), 60).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    assert len(buffer.getvalue()) > 5 * 2**20
    np.testing.assert_allclose(
        client.embed_images([buffer.getvalue()])[0, 0], np.asarray(image).mean(), rtol=1e-3
    )


def test_a_client_serves_many_threads(client):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = pool.map(lambda n: client.embed_texts(["x" * n])[0, 0], range(100))
        assert list(sizes) == list(range(100))


def test_a_restarted_server_is_found_again(model_dir, keep_port):
    port = keep_port()
    client = AlignClient(f"127.0.0.1:{port}")
    with ModelServer(model_dir, rest_port=port):
        assert client.embed_texts(["ab"])[0, 0] == 2
    with ModelServer(model_dir, rest_port=port):
        assert client.embed_texts(["abc"])[0, 0] == 3


REST_ONLY = """
import sys
from align_tf.client import AlignClient
with AlignClient(sys.argv[1]) as client:
    assert client.embed_texts(["abc"])[0, 0] == 3
    assert client.embed_images([sys.argv[2]]).shape == (1, 2)
print(sorted({"tensorflow", "tensorflow_serving", "keras", "grpc"} & set(sys.modules)))
"""


def test_the_rest_half_imports_no_tensorflow(server, tmp_path):
    (tmp_path / "image.png").write_bytes(png(1))
    command = [sys.executable, "-c", REST_ONLY, f"127.0.0.1:{server.rest_port}"]
    result = subprocess.run(
        [*command, os.fspath(tmp_path / "image.png")], capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("package", ["grpc", "tensorflow_serving"])
def test_grpc_without_its_packages_says_so(absent, package):
    absent(package)
    with pytest.raises(ModuleNotFoundError) as error:
        AlignClient("localhost", protocol="grpc")
    assert str(error.value) == (
        'the gRPC client needs extra packages: pip install "align-tf[serve]"'
    )


# --- what the server refuses, and how its answers are read ---------------------------------


def test_a_refused_row_is_named_as_the_caller_counts(client):
    texts = ["a", "b", "c", "refuse me", "e"]  # the second row of the second batch
    with pytest.raises(AlignServerError, match=r"texts\[3\]: refused") as error:
        client.embed_texts(texts)
    assert (error.value.row, error.value.status) == (3, 400)
    with pytest.raises(TypeError, match=r"images\[2\]: expected a path.* got int"):
        client.embed_images([png(1), png(2), 3])


def test_labels_of_other_requests_in_the_batch_are_left_out(client):
    result = client.classify([png(1), png(2)], ["a", "merged"])
    assert result.logits.tolist() == [[2, 7], [3, 8]]
    assert result.probs.shape == (2, 2)


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_version_label_is_asked(model_dir, tmp_path, protocol):
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "align" base_path: "{model_dir}" '
        'model_platform: "tensorflow" version_labels { key: "stable" value: 3 } } }'
    )
    with ModelServer(None, model_config_file=config) as server:
        address = f"127.0.0.1:{server.rest_port if protocol == 'rest' else server.grpc_port}"
        with AlignClient(address, protocol=protocol, version_label="stable") as client:
            assert client.embed_texts("abc")[0, 0] == 3
            assert client.status() == [VersionStatus(3, "AVAILABLE", "")]
        client = AlignClient(address, protocol=protocol, version_label="nightly")
        with client, pytest.raises(AlignServerError, match="nightly"):
            client.embed_texts("abc")


# --- streaming -----------------------------------------------------------------------------


def counted(items, taken):
    for item in items:
        taken.append(item)
        yield item


def test_streams_are_in_order_and_bounded(client):
    client.in_flight, taken = 3, []
    words = ("x" * n for n in itertools.count())  # without end
    rows = client.stream_texts(counted(words, taken))
    assert [row[0] for row in itertools.islice(rows, 20)] == list(range(20))
    assert len(taken) <= 20 + 3 * client.batch_size
    rows.close()
    images = (png(n) for n in range(5))
    assert [row.tolist() for row in client.stream_images(images)] == [[n, -n] for n in range(5)]
    results = list(client.stream_classify((png(n) for n in range(5)), ["a", "bc"]))
    assert [result.best for result in results] == [["bc"]] * 5
    assert [result.logits.tolist() for result in results] == [[[n + 1, n + 2]] for n in range(5)]
    assert list(client.stream_texts([])) == []


def test_a_stream_ends_at_what_is_refused(client):
    got = []
    with pytest.raises(AlignServerError, match=r"texts\[5\]: refused"):
        for row in client.stream_texts(["a"] * 5 + ["refuse me"] + ["a"] * 100):
            got.append(row[0])
    assert got == [1] * 4  # the batches before it


# --- asyncio -------------------------------------------------------------------------------


def run_async(server, use, **settings):
    async def main():
        async with AsyncAlignClient(f"127.0.0.1:{server.grpc_port}", **settings) as client:
            return await use(client)

    return asyncio.run(main())


def test_the_async_client_has_the_methods_of_the_other():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(AsyncAlignClient) == public(AlignClient)


def test_async(server, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(30))

    async def use(client):
        result = await client.classify([png(10), path, png(0)], ["a", "bc"], "is {}")
        assert result.logits.tolist() == [[14, 15], [34, 35], [4, 5]]
        assert (await client.embed_images(path)).tolist() == [[30, -30]]
        assert (await client.embed_texts("abcd"))[:, 0].tolist() == [4]
        assert (await client.predict({"texts": ["ab"]}, "embed_text"))["text_embeds"][0, 0] == 2
        assert await client.status() == [VersionStatus(3, "AVAILABLE", "")]
        assert "embed_text" in await client.metadata()
        with pytest.raises(ValueError, match="texts: expected at least one"):
            await client.embed_texts([])
        with pytest.raises(AlignServerError, match=r"texts\[3\]: refused"):
            await client.embed_texts(["a", "b", "c", "refuse me"])
        # Requests of many tasks run beside one another.
        many = await asyncio.gather(*(client.embed_texts("x" * n) for n in range(50)))
        assert [embeds[0, 0] for embeds in many] == list(range(50))

    run_async(server, use, batch_size=2)


def test_async_streams_are_in_order_and_bounded(server):
    taken = []

    async def words():
        for n in itertools.count():
            taken.append(n)
            yield "x" * n

    async def use(client):
        rows, got = client.stream_texts(words()), []
        async for row in rows:
            got.append(row[0])
            if len(got) == 20:
                break
        await rows.aclose()
        assert got == list(range(20))
        assert len(taken) <= 20 + 3 * 2
        images = [row.tolist() async for row in client.stream_images(png(n) for n in range(5))]
        assert images == [[n, -n] for n in range(5)]
        results = [r.best async for r in client.stream_classify([png(1)] * 3, ["a", "bc"])]
        assert results == [["bc"]] * 3

    run_async(server, use, batch_size=2, in_flight=3)


# --- retries -------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The clients' own: it stands but for what they sleep, so that no test hangs on the speed."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def sleep(seconds):
        clock.now += seconds

    clock.sleep = sleep
    for module in (align_client, endpoint):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_pauses_grow_and_end(clock):
    attempts, gone = Attempts(timeout=1000, retries=9), ServerUnavailable()
    assert attempts.timeout == 1000
    pauses = [attempts.pause(gone) for _ in range(9)]
    for pause, longest in zip(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5], strict=True):
        assert longest / 2 <= pause <= longest
    with pytest.raises(ServerUnavailable):
        attempts.pause(gone)
    clock.sleep(400)
    assert attempts.timeout == 600  # one deadline for all attempts
    with pytest.raises(ServerUnavailable):  # the pause would go beyond the deadline
        Attempts(timeout=0.01, retries=9).pause(gone)
    with pytest.raises(ConnectionError):  # a name that is not found, say
        Attempts(timeout=1000, retries=9).pause(ConnectionError())


@contextlib.contextmanager
def busy_grpc(code, times, message="busy"):
    """A gRPC server that refuses some requests before it answers; yields address and counts."""
    import grpc
    from tensorflow_serving.apis import (
        get_model_status_pb2,
        model_service_pb2_grpc,
    )

    calls = []

    class Busy(model_service_pb2_grpc.ModelServiceServicer):
        def GetModelStatus(self, request, context):
            calls.append(request.model_spec.name)
            if len(calls) <= times:
                context.abort(grpc.StatusCode[code], message)
            return get_model_status_pb2.GetModelStatusResponse()

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Busy(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", calls
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def busy_rest(status, times):
    """The same over REST; status None closes the connection without an answer."""
    calls = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            if len(calls) > times:
                body, code = b'{"model_version_status": []}', 200
            elif status is None:
                return
            else:
                body, code = b'{"error": "busy"}', status
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with serving(Handler) as address:
        yield address, calls


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"])
def test_grpc_asks_a_busy_server_again(code):
    with busy_grpc(code, 2) as (address, calls):
        assert AlignClient(address, protocol="grpc").status() == []
        assert len(calls) == 3
    with busy_grpc(code, 2) as (address, calls):

        async def main():
            async with AsyncAlignClient(address) as client:
                return await client.status()

        assert asyncio.run(main()) == []
        assert len(calls) == 3


def test_a_full_queue_is_told_as_what_it_is():
    full = "The batch scheduling queue to which this task was submitted is full"
    with busy_grpc("UNAVAILABLE", 9, full) as (address, calls):
        with pytest.raises(AlignServerError) as error:
            AlignClient(address, protocol="grpc", retries=1).status()
        assert (str(error.value), error.value.status, len(calls)) == (full, 503, 2)

        async def main():
            async with AsyncAlignClient(address, retries=1) as client:
                await client.status()

        with pytest.raises(AlignServerError) as error:
            asyncio.run(main())
        assert (str(error.value), error.value.status, len(calls)) == (full, 503, 4)


@pytest.mark.parametrize("status", [503, 429, None])
def test_rest_asks_a_busy_server_again(status):
    with busy_rest(status, 2) as (address, calls):
        assert AlignClient(address).status() == []
        assert len(calls) == 3


def test_what_would_fail_again_is_asked_once():
    for code, message in (("INVALID_ARGUMENT", "x"), ("INTERNAL", "x"), ("NOT_FOUND", "x")):
        with busy_grpc(code, 9, message) as (address, calls):
            with pytest.raises(AlignServerError):
                AlignClient(address, protocol="grpc").status()
            assert len(calls) == 1
    too_large = "Received message larger than max (9 vs. 4)"
    with busy_grpc("RESOURCE_EXHAUSTED", 9, too_large) as (address, calls):
        with pytest.raises(AlignServerError, match="larger than max"):
            AlignClient(address, protocol="grpc").status()
        assert len(calls) == 1
    for status in (400, 404, 413, 500):
        with busy_rest(status, 9) as (address, calls):
            with pytest.raises(AlignServerError, match="busy") as error:
                AlignClient(address).status()
            assert (len(calls), error.value.status) == (1, status)


def test_retries_end(clock):
    with busy_rest(503, 99) as (address, calls):
        with pytest.raises(AlignServerError, match="busy"):
            AlignClient(address, retries=2).status()
        assert len(calls) == 3
        started = clock.now
        with pytest.raises(AlignServerError, match="busy"):  # by the deadline
            AlignClient(address, retries=1000, timeout=60).status()
        assert 50 < clock.now - started < 60
        assert 3 + 15 < len(calls) < 3 + 30


SERVE = """
import sys
from align_tf.server import ModelServer; from align_tf.server.model_server import serve
serve(ModelServer(sys.argv[1], grpc_port=int(sys.argv[2]), rest_port=int(sys.argv[3])))
"""


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_stream_outlives_a_server_that_stops(model_dir, keep_port, monkeypatch, protocol):
    port, pause, paused = keep_port(), Attempts.pause, threading.Event()

    def paused_once(attempts, error):
        paused.set()
        return pause(attempts, error)

    monkeypatch.setattr(Attempts, "pause", paused_once)
    settings = {"batch_size": 2, "timeout": 120, "retries": 200}
    with (
        AlignClient(f"127.0.0.1:{port}", protocol=protocol, **settings) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        stream = client.stream_texts("x" * n for n in range(40))
        with ModelServer(model_dir, **{f"{protocol}_port": port}):
            rows = [row[0] for row in itertools.islice(stream, 5)]
        rest = pool.submit(lambda: [row[0] for row in stream])
        assert paused.wait(60)
        with ModelServer(model_dir, **{f"{protocol}_port": port}):
            assert rows + rest.result() == list(range(40))


@pytest.mark.slow
def test_a_stream_outlives_a_server_that_is_killed(model_dir, keep_port):
    ports = [str(keep_port()), str(keep_port())]

    def start():
        command = [sys.executable, "-c", SERVE, os.fspath(model_dir), *ports]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    settings = {"batch_size": 2, "timeout": 120, "retries": 200}
    addresses = zip(("grpc", "rest"), ports, strict=True)
    clients = [AlignClient(f"127.0.0.1:{p}", protocol=name, **settings) for name, p in addresses]
    server = start()
    try:
        streams = [client.stream_texts("x" * n for n in range(40)) for client in clients]
        got = [[row[0] for row in itertools.islice(stream, 5)] for stream in streams]
        server.send_signal(signal.SIGKILL)
        server.wait()
        server = start()
        for rows, stream in zip(got, streams, strict=True):
            rows += [row[0] for row in stream]
            assert rows == list(range(40))
    finally:
        server.kill()
        server.wait()


# --- TLS -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and what it signed for the server (named align.test) and for a caller."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.timezone.utc)

    def make(name, signer=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer, issuer_key = signer or (subject, key)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
            .sign(issuer_key, hashes.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return subject, key

    authority = make("authority")
    make("align.test", authority)
    make("caller", authority)
    return folder


@contextlib.contextmanager
def tls_before(port, certificates, callers_proven=False):
    """Ends TLS before a port of the server, as a gateway does; yields its own port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "align.test.crt", certificates / "align.test.key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    if callers_proven:
        context.load_verify_locations(certificates / "authority.crt")
        context.verify_mode = ssl.CERT_REQUIRED

    async def copy(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def handle(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    loop, ready = asyncio.new_event_loop(), threading.Event()
    found = []

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
        found.extend((server.sockets[0].getsockname()[1], asyncio.current_task()))
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Future()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(found[1].cancel)
        thread.join()
        loop.close()


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_tls(server, certificates, protocol):
    port = server.rest_port if protocol == "rest" else server.grpc_port

    def ask(tls, port):
        client = AlignClient(f"127.0.0.1:{port}", protocol=protocol, tls=tls, retries=0)
        with client:
            return client.embed_texts("abc")[0, 0]

    authority = certificates / "authority.crt"
    trusted = Tls(authority, server_name="align.test")
    with tls_before(port, certificates) as secure:
        assert ask(trusted, secure) == 3
        for tls in (Tls(server_name="align.test"), Tls(authority, server_name="other.test")):
            with pytest.raises(ConnectionError, match="cannot reach the server"):
                ask(tls, secure)
    proven = Tls(authority, certificates / "caller.crt", certificates / "caller.key", "align.test")
    with tls_before(port, certificates, callers_proven=True) as secure:
        assert ask(proven, secure) == 3
        with pytest.raises(ConnectionError):
            ask(trusted, secure)


def test_async_tls(server, certificates):
    async def main(port):
        tls = Tls(certificates / "authority.crt", server_name="align.test")
        async with AsyncAlignClient(f"grpcs://127.0.0.1:{port}", tls=tls) as client:
            return (await client.embed_texts("abc"))[0, 0]

    with tls_before(server.grpc_port, certificates) as port:
        assert asyncio.run(main(port)) == 3


def test_tls_files_are_asked_for_in_pairs(tmp_path):
    with pytest.raises(ValueError, match="certificate and private_key"):
        Tls(certificate="a.crt")
    with pytest.raises(FileNotFoundError):
        AlignClient("localhost", tls=Tls(tmp_path / "no.crt"))
