"""Versions that come, break, are mended and go, while a server watches their folders."""

import contextlib
import json
import os
import pathlib
import shutil
import time
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from align_tf.server import ModelServer, servable, servables
from align_tf.server.model_config import ModelConfig

PROBE = pathlib.Path(__file__).parents[1] / "goldens" / "tf_serving" / "probe"
SHAPE = "Matrix size-incompatible: In[0]: [1,1], In[1]: [4,3]"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with version 1, watched closely."""
    monkeypatch.setattr(servables, "POLL_SECONDS", 0.02)
    shutil.copytree(PROBE / "1", tmp_path / "align" / "1")
    return tmp_path / "align"


@pytest.fixture
def loads(monkeypatch):
    """The folders of the versions that were loaded, or were tried."""
    tried, load = [], servables.Servable

    def noted(folder, *arguments):
        tried.append(folder.name)
        return load(folder, *arguments)

    monkeypatch.setattr(servables, "Servable", noted)
    return tried


def statuses(server, name="align"):
    """Each version's state, error code and message, as REST tells them."""
    url = f"http://127.0.0.1:{server.rest_port}/v1/models/{name}"
    with DIRECT.open(url, timeout=60) as response:
        listed = json.load(response)["model_version_status"]
    return {int(s["version"]): (s["state"], *s["status"].values()) for s in listed}


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_records(folder, *records):
    path = folder / servable.WARMUP_REQUESTS
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def unfit_request(folder):
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.float32([[1]])))
    write_records(folder, log.SerializeToString())


def half_copied(folder):
    model = folder / "saved_model.pb"
    model.write_bytes(model.read_bytes()[:-100])


def cut_off_records(folder):
    path = write_records(folder, b"x" * 100)
    path.write_bytes(path.read_bytes()[:-50])


def another_graph(folder):
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    saved.meta_graphs[0].graph_def.node[0].op = "NoSuchOp"
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())


# how a version is broken: its status's code, and a part of the message
BROKEN = {
    "half copied": (half_copied, "UNKNOWN", "Cannot parse file"),
    "no variables": (
        lambda folder: shutil.rmtree(folder / "variables"),
        "UNKNOWN",
        "not a valid checkpoint",
    ),
    "not records": (
        lambda folder: write_records(folder).write_bytes(b"no records" * 9),
        "DATA_LOSS",
        "2/assets.extra/tf_serving_warmup_requests: not warmup requests: corrupted record at 0",
    ),
    "records cut off": (cut_off_records, "DATA_LOSS", "not warmup requests: truncated record"),
    "not requests": (
        lambda folder: write_records(folder, b"\xff no request"),
        "UNKNOWN",
        "2/assets.extra/tf_serving_warmup_requests: not warmup requests",
    ),
    "an unfit request": (unfit_request, "INVALID_ARGUMENT", SHAPE),
    "unknown op": (another_graph, "NOT_FOUND", "NoSuchOp"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_version_is_told_and_taken_up_once_it_is_whole(folder, tmp_path, case, capsys):
    break_it, code, message = BROKEN[case]
    shutil.copytree(PROBE / "2", tmp_path / "part")
    break_it(tmp_path / "part")
    with ModelServer(folder) as server:
        (tmp_path / "part").rename(folder / "2")
        wait_for(lambda: statuses(server).get(2, ("LOADING",))[0] == "END")
        state, told_code, told = statuses(server)[2]
        assert (state, told_code) == ("END", code) and message in told
        assert statuses(server)[1] == ("AVAILABLE", "OK", "")
        shutil.copytree(PROBE / "2", tmp_path / "whole")
        shutil.rmtree(folder / "2" / "assets.extra", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder / "2", dirs_exist_ok=True)
        wait_for(lambda: statuses(server)[2] == ("AVAILABLE", "OK", ""))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"align-tf: {folder / '2'} does not load: ")


def test_a_broken_version_that_stays_is_tried_again_as_tensorflow_serving_does(
    folder, loads, monkeypatch
):
    monkeypatch.setattr(servables, "LOAD_RETRY_SECONDS", 0.0)
    (folder / "2").mkdir()
    (folder / "2" / "saved_model.pb").write_text("broken")
    shutil.copytree(PROBE / "2", folder / "3")
    config = folder.parent / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "align" base_path: "{folder}" '
        "model_version_policy { specific { versions: 1 versions: 2 versions: 3 } } } }"
    )
    broken = folder / "2"
    broken.rename(folder.parent / "2")
    with ModelServer(None, model_config_file=config) as server:
        (folder.parent / "2").rename(broken)
        wait_for(lambda: loads.count("2") == 1 + servables.LOAD_RETRIES)
        shutil.rmtree(folder / "3")  # taken note of by a later poll
        wait_for(lambda: statuses(server)[3][0] == "END")
        assert loads.count("2") == 1 + servables.LOAD_RETRIES
        assert [state for state, *_ in statuses(server).values()] == ["END", "END", "AVAILABLE"]
        shutil.rmtree(broken)
        wait_for(lambda: 2 not in statuses(server))


def test_one_broken_model_leaves_the_others(folder, tmp_path):
    shutil.copytree(PROBE / "1", tmp_path / "other" / "1")
    config = tmp_path / "models.config"
    models = "".join(
        f'config {{ name: "{name}" base_path: "{tmp_path / name}" }} '
        for name in ("align", "other")
    )
    config.write_text(f"model_config_list {{ {models} }}")
    with ModelServer(None, model_config_file=config) as server:
        shutil.copytree(PROBE / "2", tmp_path / "part")
        write_records(tmp_path / "part", b"\xff no request")
        (tmp_path / "part").rename(folder / "2")
        wait_for(lambda: statuses(server).get(2, ("LOADING",))[0] == "END")
        shutil.copytree(PROBE / "2", tmp_path / "whole")
        (tmp_path / "whole").rename(tmp_path / "other" / "2")
        wait_for(lambda: statuses(server, "other").get(2, ("",))[0] == "AVAILABLE")


def test_the_watch_outlives_what_it_meets_and_says_it_once(folder, tmp_path, monkeypatch, capsys):
    listed, meet = pathlib.Path.iterdir, []

    def failing(path):
        if path == folder and len(meet) < 3:
            meet.append(path)
            raise MemoryError("no memory for a list")
        return listed(path)

    with ModelServer(folder) as server:
        monkeypatch.setattr(pathlib.Path, "iterdir", failing)
        wait_for(lambda: len(meet) == 3)
        shutil.copytree(PROBE / "2", tmp_path / "part")
        (tmp_path / "part").rename(folder / "2")
        wait_for(lambda: statuses(server).get(2, ("",))[0] == "AVAILABLE")
    assert capsys.readouterr().err == f"align-tf: {folder}: no memory for a list\n"


def test_a_base_path_that_is_away_for_a_moment(folder, tmp_path, loads):
    with ModelServer(folder) as server:
        shutil.copytree(folder, tmp_path / "away")
        shutil.copytree(PROBE / "2", tmp_path / "away" / "2")
        folder.rename(tmp_path / "old")
        assert statuses(server) == {1: ("AVAILABLE", "OK", "")}
        (tmp_path / "away").rename(folder)
        wait_for(lambda: statuses(server).get(2, ("",))[0] == "AVAILABLE")
    assert loads == ["1", "2"]


def test_a_folder_that_goes_while_it_is_loaded(folder, tmp_path, monkeypatch):
    load = servables.Servable

    def gone_before_it_is_read(path, *arguments):
        if path.name == "2":
            path.rename(tmp_path / "2")
        return load(path, *arguments)

    with ModelServer(folder) as server:
        monkeypatch.setattr(servables, "Servable", gone_before_it_is_read)
        shutil.copytree(PROBE / "2", tmp_path / "part")
        (tmp_path / "part").rename(folder / "2")
        wait_for((tmp_path / "2").exists)
        wait_for(lambda: list(statuses(server)) == [1])
        monkeypatch.setattr(servables, "Servable", load)
        (tmp_path / "2").rename(folder / "2")
        wait_for(lambda: statuses(server).get(2, ("",))[0] == "AVAILABLE")


def test_names_of_versions(tmp_path):
    for name in ("0", "00007", "7", "٣", "-1", "1e3", "99999999999999999999", "one", ".2"):
        (tmp_path / name).mkdir()
    (tmp_path / "3").write_text("a file")
    (tmp_path / "5").symlink_to(PROBE / "2")
    (tmp_path / "6").symlink_to(tmp_path / "nowhere")
    folders = ModelConfig("m", tmp_path, policy="all").folders()
    assert folders == {7: tmp_path / "7", 5: tmp_path / "5", 0: tmp_path / "0"}
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "7")
    with pytest.raises(ValueError, match="version 7 does not load"):
        ModelServer(tmp_path).start()
    shutil.rmtree(tmp_path / "00007")
    with ModelServer(tmp_path) as server:
        assert statuses(server) == {5: ("AVAILABLE", "OK", "")}
