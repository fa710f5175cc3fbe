"""Data, checkpoints and outputs on an S3 server and a GCS emulator, both whole and broken."""

import contextlib
import http.client
import http.server
import io
import json
import logging
import shutil
import socket
import tarfile
import threading
import types

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from align_tf import AlignModel, AlignProcessor, addresses
from align_tf.cli.main import main
from align_tf.data import counting, records

pytestmark = pytest.mark.slow  # the clients' import, and a training
pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

PAIRS = 12  # in a shard


class Faulty(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a server; of files that are read, the first are cut or kept waiting."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def pass_on(self):
        server = self.server
        if server.broken in self.path and server.faults[-1:] == ["refused"]:
            self.refuse()
            return
        length = int(self.headers.get("Content-Length") or 0)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        upstream = http.client.HTTPConnection(*server.upstream)
        upstream.request(self.command, self.path, self.rfile.read(length), headers)
        answer = upstream.getresponse()
        content = answer.read()
        fault = None
        if self.command == "GET" and server.broken in self.path and server.faults:
            fault = server.faults.pop()
        if fault == "silent":
            server.over.wait()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", size)
        self.end_headers()
        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        with contextlib.suppress(OSError):  # who asked has gone
            self.wfile.write(content)

    def refuse(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        refusal = json.dumps({"error": {"code": 403, "message": "Denied"}})
        if not self.path.startswith(("/storage", "/upload", "/b/")):
            refusal = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response_only(403)
        self.send_header("Content-Length", len(refusal))
        self.end_headers()
        self.wfile.write(refusal.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="module")
def gs():
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield "127.0.0.1", port
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request, monkeypatch):
    """The address of a bucket, and the server in front of it, which may break."""
    scheme, upstream = request.param, request.getfixturevalue(request.param)
    front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    front.upstream, front.broken, front.faults = upstream, "/none", []
    front.over = threading.Event()
    threading.Thread(target=front.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{front.server_address[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    forget(scheme)
    if scheme == "s3":
        with contextlib.suppress(FileExistsError):
            fsspec.filesystem("s3").mkdir("bucket")
    yield f"{scheme}://bucket/{request.node.name.split('[')[0]}", front
    front.over.set()
    front.shutdown()
    front.server_close()
    forget(scheme)


def forget(scheme):
    """Has the next client be a new one."""
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    addresses._options.cache_clear()
    addresses.look_again()
    counting._of_this_process.clear()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of pairs."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for key in range(PAIRS):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(image, "PNG")
                caption = f"a {('red', 'green', 'blue')[key % 3]} picture".encode()
                for suffix, content in (("png", image.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number}{key:02}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def send(shards, address):
    addresses.send_folder(shards, addresses.place(f"{address}/pairs"))


def read(source):
    return [
        (record["key"], record["image_bytes"], record["captions"].tolist())
        for record in records(source).as_numpy_iterator()
    ]


def test_a_training_in_a_bucket_goes_on_to_the_weights_of_one_on_this_machine(
    bucket, shards, checkpoint, tmp_path, capsys
):
    address, _ = bucket
    send(shards, address)
    AlignModel.from_pretrained(checkpoint).save_pretrained(f"{address}/model")
    AlignProcessor.from_pretrained(checkpoint).save_pretrained(f"{address}/model")
    flags = ["--batch-size", "4", "--steps", "6", "--save-every", "2", "--keep", "3"]

    def run(place, output):
        places = ["--model", f"{place}/model", "--data", f"{place}/pairs", "--output", output]
        return main(["train", *places, *flags])

    shutil.copytree(shards, tmp_path / "pairs")
    shutil.copytree(checkpoint, tmp_path / "model")
    assert run(tmp_path, str(tmp_path / "out")) == 0
    assert run(address, f"{address}/out") == 0
    # As if it had been killed before the last file of its third checkpoint was sent.
    out = addresses.place(f"{address}/out")
    out.joinpath("checkpoint-6", "training_state.json").unlink()
    out.joinpath("model.safetensors").unlink()
    capsys.readouterr()
    assert run(address, f"{address}/out") == 0
    said = capsys.readouterr().err
    assert f"Going on from step 4, {address}/out/checkpoint-4" in said
    assert "trying again" not in said
    for name in ("model.safetensors", "checkpoint-6/training_state.safetensors"):
        with addresses.fetched(out / name) as file:
            found = safetensors.numpy.load_file(file)
        expected = safetensors.numpy.load_file(tmp_path / "out" / name)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=key)


@pytest.mark.parametrize("fault", ["cut", "silent"])
def test_a_shard_that_breaks_off_is_read_again(bucket, shards, fault, monkeypatch, tmp_path):
    address, front = bucket
    send(shards, address)
    monkeypatch.setattr(addresses, "SILENCE", 1)
    forget(address[:2])
    front.broken, front.faults = "1.tar", [fault] * 2
    assert read(f"{address}/pairs") == read(shards)
    assert not front.faults


def test_a_bucket_that_stays_broken_is_one_line(bucket, shards, monkeypatch, capfd, tmp_path):
    address, front = bucket
    send(shards, address)
    monkeypatch.setattr(addresses, "PAUSE", 0)
    if address.startswith("s3"):
        monkeypatch.setattr(type(addresses.place(address).fs), "retries", 1)
    else:  # which waits longer and longer, a minute in all

        async def soon(seconds):
            pass

        monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=soon))
    front.broken, front.faults = "0.tar", ["cut"] * 1000
    assert main(["embed", f"{address}/pairs", "--output", str(tmp_path / "x")]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"align-tf: error: {address}/pairs/0.tar: cannot be reached: ")
    assert 1000 - len(front.faults) <= 40  # of gcsfs itself six times six, which nothing sets
    assert not any("Traceback" in line for line in said)


def test_an_absent_bucket_is_one_line_before_anything_is_loaded(bucket, shards, capfd):
    absent = f"{bucket[0].split(':')[0]}://absent/x"
    assert main(["embed", str(shards), "--output", absent]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"align-tf: error: {absent}: no such file, folder or bucket: ")


def test_a_refusal_is_one_line(bucket, shards, capfd):
    address, front = bucket
    front.broken, front.faults = "", ["refused"] * 1000
    assert main(["embed", str(shards), "--output", f"{address}/x"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"align-tf: error: {address}/x: cannot be reached: ")
    assert "Denied" in line


def test_missing_credentials_are_one_line(bucket, shards, capfd, monkeypatch, tmp_path):
    address, _ = bucket
    if address.startswith("gs"):
        pytest.skip("an emulator asks for none; see the refusal")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    forget("s3")
    assert main(["embed", str(shards), "--output", f"{address}/x"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"align-tf: error: {address}/x: cannot be reached: Unable to locate credentials"
    )
