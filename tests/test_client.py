import concurrent.futures
import io
import os
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from align_tf.client import (
    AlignClient,
    AlignServerError,
    Signature,
    TensorSpec,
    VersionStatus,
)
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
        return {"logits": logits, "probs": tf.nn.softmax(logits)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def embed_image(self, image_bytes):
        brightness = self.brightness(image_bytes)
        return {"image_embeds": tf.stack([brightness, -brightness], axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "texts")])
    def embed_text(self, texts):
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
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlignClient(**arguments)


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_an_unreachable_address_is_named(protocol):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}: cannot reach the server"):
        AlignClient(f"127.0.0.1:{port}", protocol=protocol, timeout=5).status()


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_silent_server_times_out(protocol):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        client = AlignClient(address, protocol=protocol, timeout=0.2)
        with pytest.raises(TimeoutError, match=f"{address}: no answer in time"):
            client.status()


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


def test_a_restarted_server_is_found_again(model_dir):
    with ModelServer(model_dir) as first:
        client = AlignClient(f"127.0.0.1:{first.rest_port}")
        assert client.embed_texts(["ab"])[0, 0] == 2
        port = first.rest_port
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


def test_grpc_without_its_packages_says_so():
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "from align_tf.client import AlignClient\n"
        "AlignClient('localhost', protocol='grpc')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: The gRPC client needs extra packages: pip install "align-tf[serve]"'
    )
