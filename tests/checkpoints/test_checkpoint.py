"""Checkpoints: the name table, every file format, the hub's cache, and what is refused."""

import dataclasses
import http.server
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from align_tf import AlignConfig, AlignModel, AlignTextModel, AlignVisionModel
from align_tf.checkpoints import name_table, tensors as tensors_module
from align_tf.files import CheckpointError
from align_tf.hub import resolve_folder

BLOCK = "vision_model.encoder.blocks.1."
LAYER = "text_model.encoder.layer.1."


@pytest.fixture(scope="module")
def saved(tiny_config, tmp_path_factory) -> pathlib.Path:
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    AlignModel(tiny_config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    """A checkpoint of a tiny model, to be spoilt."""
    return shutil.copytree(saved, tmp_path / "tiny")


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def logits(model: AlignModel, pairs: dict[str, np.ndarray]) -> np.ndarray:
    return ops.convert_to_numpy(model(pairs).logits_per_image)


def refusal(folder: pathlib.Path, model_class: type = AlignModel) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_class.from_pretrained(folder)
    return str(caught.value)


def shard(folder: pathlib.Path, count: int = 3) -> pathlib.Path:
    """Splits a checkpoint into shards with an index, as transformers writes them."""
    tensors = read(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(count):
        name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[index::count])
        safetensors.numpy.save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


# --- the name table ------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_reference(folder):
    shapes = {name: array.shape for name, array in read(folder).items()}
    assert len(shapes) == 108  # 99 weights, and a count of updates for each of 9 BatchNorms
    for name, shape in {
        "temperature": (),
        "text_projection.weight": (8, 16),
        "text_projection.bias": (8,),
        "text_model.embeddings.word_embeddings.weight": (40, 16),
        "text_model.embeddings.position_embeddings.weight": (16, 16),
        "text_model.embeddings.token_type_embeddings.weight": (2, 16),
        "text_model.embeddings.LayerNorm.weight": (16,),
        f"{LAYER}attention.self.query.weight": (16, 16),
        f"{LAYER}attention.output.dense.bias": (16,),
        f"{LAYER}attention.output.LayerNorm.bias": (16,),
        f"{LAYER}intermediate.dense.weight": (20, 16),
        f"{LAYER}output.dense.weight": (16, 20),
        f"{LAYER}output.LayerNorm.weight": (16,),
        "text_model.pooler.dense.weight": (16, 16),
        "vision_model.embeddings.convolution.weight": (8, 3, 3, 3),
        "vision_model.embeddings.batchnorm.running_var": (8,),
        "vision_model.embeddings.batchnorm.num_batches_tracked": (),
        f"{BLOCK}expansion.expand_conv.weight": (16, 8, 1, 1),
        f"{BLOCK}expansion.expand_bn.running_mean": (16,),
        f"{BLOCK}depthwise_conv.depthwise_conv.weight": (16, 1, 5, 5),
        f"{BLOCK}depthwise_conv.depthwise_norm.weight": (16,),
        f"{BLOCK}squeeze_excite.reduce.weight": (2, 16, 1, 1),
        f"{BLOCK}squeeze_excite.expand.bias": (16,),
        f"{BLOCK}projection.project_conv.weight": (8, 16, 1, 1),
        f"{BLOCK}projection.project_bn.bias": (8,),
    }.items():
        assert shapes[name] == shape, name


@pytest.mark.parametrize(
    ("transform", "hugging_face", "expected"),
    [
        ("same", (2, 3), (2, 3)),
        ("dense", (2, 3), (3, 2)),
        ("conv", (2, 3, 5, 7), (5, 7, 3, 2)),
        ("depthwise", (2, 1, 5, 7), (5, 7, 2, 1)),
    ],
)
def test_axes_turn_and_turn_back(transform, hugging_face, expected):
    array = np.arange(np.prod(hugging_face)).reshape(hugging_face)
    turned = name_table.permute(array, transform, to_keras=True)
    assert turned.shape == expected
    np.testing.assert_array_equal(name_table.permute(turned, transform, to_keras=False), array)


def test_the_table_is_one_to_one():
    for table in (
        name_table.TEXT_TABLE,
        name_table.VISION_TABLE,
        name_table.JOINT_TABLE,
    ):
        rows = list(name_table._rows(table))
        for column in (0, 1):
            names = [row[column] for row in rows]
            assert len(names) == len(set(names))


def test_a_weight_outside_the_table_is_an_error():
    with pytest.raises(CheckpointError, match="head/kernel: a weight that stands in no row"):
        name_table.to_hugging_face(
            ["text_projection/kernel", "head/kernel"], name_table.JOINT_TABLE
        )


# --- what loads ----------------------------------------------------------------------------


def test_a_round_trip_changes_nothing(folder, pairs, tmp_path):
    model = AlignModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (folder / "config.json").read_text()
    one, other = read(folder), read(tmp_path / "again")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_towers_load_from_a_joint_checkpoint_and_from_their_own(folder, pairs, tmp_path):
    model = AlignModel.from_pretrained(folder)
    for tower, tower_class, key in (
        (model.text_model, AlignTextModel, "input_ids"),
        (model.vision_model, AlignVisionModel, "pixel_values"),
    ):
        tower.save_pretrained(tmp_path / tower.name)
        expected = ops.convert_to_numpy(tower(pairs[key]).pooler_output)
        for source in (folder, tmp_path / tower.name):
            again = tower_class.from_pretrained(source)
            assert again.config.model_type == tower_class.config_class.model_type
            actual = ops.convert_to_numpy(again(pairs[key]).pooler_output)
            np.testing.assert_array_equal(actual, expected)


def test_an_image_projection_survives(tiny_config, pairs, tmp_path):
    config = dataclasses.replace(tiny_config, projection_dim=12, image_projection=True)
    model = AlignModel(config)
    model.save_pretrained(tmp_path)
    assert read(tmp_path)["image_projection.weight"].shape == (12, 8)
    again = AlignModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(again, pairs), logits(model, pairs))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_of_a_file(dtype, folder, pairs, tmp_path):
    model = AlignModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / dtype, dtype=dtype)
    stored = read(tmp_path / dtype)
    assert stored.pop(f"{BLOCK}expansion.expand_bn.num_batches_tracked").dtype == "int64"
    weights = [array for name, array in stored.items() if "num_batches_tracked" not in name]
    assert {str(array.dtype) for array in weights} == {dtype}
    assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype

    again = AlignModel.from_pretrained(tmp_path / dtype)
    assert {weight.dtype for weight in again.weights} == {"float32"}
    kernel = ops.convert_to_numpy(again.text_projection.kernel)
    np.testing.assert_array_equal(kernel, stored["text_projection.weight"].astype("float32").T)
    tolerance = {"float32": 0, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    np.testing.assert_allclose(logits(again, pairs), logits(model, pairs), atol=tolerance)


def test_bfloat16_is_read_by_value(tmp_path):
    values = [1.0, -3.140625, 2.0**100, 0.0]  # each of them a bfloat16
    stored = {"x": np.array(values, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    ((name, array),) = tensors_module.read_tensors(tmp_path / "model.safetensors", ["x"])
    assert name == "x"
    np.testing.assert_array_equal(array.astype("float32"), np.array(values, "float32"))


def test_an_unknown_dtype_is_refused_before_anything_is_written(folder, tmp_path):
    with pytest.raises(
        ValueError, match="dtype='int8': expected one of float32, float16, bfloat16"
    ):
        AlignModel.from_pretrained(folder).save_pretrained(tmp_path / "new", dtype="int8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_a_policy_may_be_given(policy, folder):
    model = AlignModel.from_pretrained(folder, dtype=policy)
    query = model.text_model.blocks[0].attention.query
    assert query.compute_dtype == policy.removeprefix("mixed_")
    assert query.variable_dtype == ("float32" if "mixed" in policy else policy)


def test_keys_of_the_config_may_be_given(folder):
    given = {"text_config": {"hidden_dropout_prob": 0.5}}
    config = AlignTextModel.from_pretrained(folder, config=given).config
    assert (config.hidden_dropout_prob, config.vocab_size) == (0.5, 40)
    assert AlignTextModel.from_pretrained(folder, config=config).config == config
    with pytest.raises(CheckpointError, match=r"\(40, 16\) does not fit .*/embeddings \(41, 16\)"):
        AlignTextModel.from_pretrained(folder, config={"text_config": {"vocab_size": 41}})


def test_loaded_weights_share_no_memory(folder, pairs):
    model = AlignModel.from_pretrained(folder)
    before = [ops.convert_to_numpy(weight).copy() for weight in model.weights]
    chosen = model.text_model.blocks[0].attention.query.kernel
    chosen.assign_add(ops.ones((16, 16)))
    for value, weight in zip(before, model.weights, strict=True):
        changed = 1 if weight is chosen else 0
        np.testing.assert_allclose(ops.convert_to_numpy(weight), value + changed, atol=1e-6)


def test_shards(folder, pairs):
    expected = logits(AlignModel.from_pretrained(folder), pairs)
    shard(folder)
    np.testing.assert_array_equal(logits(AlignModel.from_pretrained(folder), pairs), expected)
    again = AlignTextModel.from_pretrained(folder)
    assert again(pairs["input_ids"]).last_hidden_state.shape == (4, 6, 16)


def test_old_names_and_leftover_buffers(folder, pairs):
    expected = logits(AlignModel.from_pretrained(folder), pairs)
    tensors = {}
    for name, array in read(folder).items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        tensors[name] = array
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    tensors["text_model.embeddings.token_type_ids"] = np.zeros((1, 16), "int64")
    tensors[f"{BLOCK}expansion.expand_bn.num_batches_tracked"] = np.array(7)
    write(folder, tensors)
    np.testing.assert_array_equal(logits(AlignModel.from_pretrained(folder), pairs), expected)
    AlignTextModel.from_pretrained(folder)
    AlignVisionModel.from_pretrained(folder)


@pytest.mark.parametrize("size", [1, 3000])
def test_a_file_larger_than_what_one_opening_reads(size, folder, monkeypatch, pairs):
    expected = logits(AlignModel.from_pretrained(folder), pairs)
    monkeypatch.setattr(tensors_module, "BYTES_PER_OPENING", size)
    np.testing.assert_array_equal(logits(AlignModel.from_pretrained(folder), pairs), expected)


# --- what does not fit ---------------------------------------------------------------------


def test_a_missing_tensor_is_named(folder):
    tensors = read(folder)
    del tensors[f"{BLOCK}projection.project_bn.running_var"]
    write(folder, tensors)
    message = refusal(folder)
    assert "model.safetensors: the checkpoint does not fit the model" in message
    assert (
        f"missing tensor {BLOCK}projection.project_bn.running_var for "
        "vision_model/block_1/project_bn/moving_variance (8,)"
    ) in message


def test_an_unexpected_tensor_is_named(folder):
    write(folder, {**read(folder), "image_projection.weight": np.zeros((8, 8), "float32")})
    assert "unexpected tensor image_projection.weight (8, 8)" in refusal(folder)


def test_a_wrong_shape_names_both(folder):
    tensors = read(folder)
    tensors["text_projection.weight"] = np.zeros((8, 17), "float32")
    tensors["temperature"] = np.ones((2,), "float32")
    tensors[f"{BLOCK}expansion.expand_conv.weight"] = np.zeros((16, 8), "float32")
    write(folder, tensors)
    message = refusal(folder)
    assert "text_projection.weight (8, 17) does not fit text_projection/kernel (16, 8)" in message
    assert "temperature (2,) does not fit temperature ()" in message
    assert "expand_conv.weight (16, 8) does not fit vision_model/block_1/expand_conv/k" in message


def test_a_transposed_tensor_of_the_same_size_is_refused(folder):
    tensors = read(folder)
    name = f"{LAYER}intermediate.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    write(folder, tensors)
    assert f"{name} (16, 20) does not fit text_model/layer_1/intermediate/kernel" in refusal(folder)


def test_the_same_weight_twice_is_refused(folder):
    tensors = read(folder)
    name = "text_model.embeddings.LayerNorm"
    write(folder, {**tensors, f"{name}.gamma": tensors[f"{name}.weight"]})
    assert f"unexpected tensor {name}." in refusal(folder)


def test_many_problems_are_cut_short(folder):
    write(folder, {"temperature": np.array(1.0, "float32")})
    message = refusal(folder)
    assert message.count("missing tensor") == 10
    assert "and 88 more" in message


def test_a_text_tower_is_no_vision_tower(folder, tmp_path):
    AlignTextModel.from_pretrained(folder).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="model_type='align_text_model': expected 'align_vision_m"):
        AlignVisionModel.from_pretrained(tmp_path / "text")


def test_weights_of_another_kind_are_refused(folder):
    tensors = read(folder)
    tensors["temperature"] = np.array(1)
    write(folder, tensors)
    assert "temperature is of I64, expected floating-point numbers" in refusal(folder)


def test_a_failed_load_leaves_the_model_unchanged(folder, tiny_config):
    keras.utils.set_random_seed(7)
    model = AlignModel(tiny_config)
    before = [ops.convert_to_numpy(weight) for weight in model.weights]
    tensors = read(folder)
    del tensors["temperature"]
    write(folder, tensors)
    with pytest.raises(CheckpointError, match="missing tensor temperature"):
        model._load(folder)
    for value, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


# --- broken and hostile files --------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 3000, -1])
def test_a_truncated_file_is_refused(kept, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 64, b"PK\x03\x04 a zip", (10**15).to_bytes(8, "little") + b"{}"],
    ids=["noise", "zip", "endless header"],
)
def test_a_foreign_file_is_refused(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors: not a whole safetensors file" in refusal(folder)


def test_a_truncated_shard_is_named(folder):
    shard(folder)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model-00002-of-00003.safetensors: not a whole safetensors file" in refusal(folder)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = "model-00002-of-00003.safetensors: the shard that .*index.json names is missing"
    with pytest.raises(FileNotFoundError, match=message):
        AlignModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_may_name_plain_files_alone(name, folder):
    index = shard(folder)
    index.write_text(json.dumps({"weight_map": {"temperature": name}}))
    assert f"index.json: shard {name!r} is not a plain file name" in refusal(folder)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[1]"]
)
def test_a_broken_index_is_named(content, folder):
    index = shard(folder)
    index.write_text(content)
    assert "model.safetensors.index.json: " in refusal(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no weights; expected model.safetensors, model.sa"
    ):
        AlignModel.from_pretrained(folder)


# --- the hub -------------------------------------------------------------------------------


@pytest.fixture
def cache(folder, tmp_path) -> pathlib.Path:
    """A cache of huggingface_hub that holds someone/tiny: `main` and, hotter, `v2`."""
    repository = tmp_path / "cache" / "models--someone--tiny"
    hotter = read(folder)
    hotter["temperature"] = np.array(2.0, "float32")
    for branch, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        write(snapshot, read(folder) if branch == "main" else hotter)
    return tmp_path / "cache"


def test_a_hub_id_loads_from_the_cache(cache):
    options = {"cache_dir": cache, "local_files_only": True}
    assert AlignConfig.from_pretrained("someone/tiny", **options).projection_dim == 8
    for revision, temperature in ((None, 1.0), ("main", 1.0), ("v2", 2.0), ("b" * 40, 2.0)):
        model = AlignModel.from_pretrained("someone/tiny", revision=revision, **options)
        assert float(ops.convert_to_numpy(model.temperature)) == temperature


def test_shards_load_from_the_cache(cache):
    shard(cache / "models--someone--tiny" / "snapshots" / ("a" * 40))
    AlignModel.from_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)


def test_a_hostile_index_of_the_hub_is_refused(cache):
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("a" * 40)
    shard(snapshot).write_text(json.dumps({"weight_map": {"temperature": "../../x"}}))
    with pytest.raises(CheckpointError, match=r"shard '../../x' is not a plain file name"):
        AlignModel.from_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "revision"),
    [("someone/nothing", None), ("someone/tiny", "v9"), ("some one/tiny", None)],
)
def test_what_the_cache_does_not_hold_is_named(name, revision, cache):
    with pytest.raises(FileNotFoundError, match=f"'{name}': no such folder"):
        AlignModel.from_pretrained(name, revision=revision, cache_dir=cache, local_files_only=True)


def test_weights_that_the_cache_does_not_hold_are_told(cache):
    (cache / "models--someone--tiny" / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="'someone/tiny': no such folder, and the Hugging"):
        AlignModel.from_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "../up/here", ""])
def test_a_name_that_is_no_folder_and_no_id(name):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint folder, align-tiny, or a"):
        resolve_folder(name or "/nowhere")


RESOLVE = "import sys; from align_tf.hub import resolve_folder; print(resolve_folder(sys.argv[1]))"


def resolve(name: str, **environment: str) -> subprocess.CompletedProcess:
    """Asks in a process of its own: huggingface_hub reads its environment once."""
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, name], env=environment, capture_output=True, text=True
    )


def test_offline_mode_uses_the_cache(cache):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    done = resolve("someone/tiny", **environment)
    assert done.stdout.strip().endswith("a" * 40), done.stderr
    done = resolve("someone/nothing", **environment)
    assert "FileNotFoundError: 'someone/nothing': no such folder" in done.stderr


def test_an_id_that_the_hub_does_not_know(tmp_path):
    class Hub(http.server.BaseHTTPRequestHandler):
        """Answers as the hub does for a repository that is not there."""

        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        done = resolve("someone/nothing", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
        hub.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: 'someone/nothing': no such folder, and the Hugging ")
    assert "Repository Not Found for url" in last


AVAILABLE = "import sys; from align_tf.hub import is_available; "
AVAILABLE += "print([is_available(name, timeout=float(sys.argv[1])) for name in sys.argv[2:]])"


def available(*names: str, timeout: float = 60, **environment: str) -> str:
    command = [sys.executable, "-c", AVAILABLE, str(timeout), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_here_is_available_without_the_hub(folder, cache):
    names = ("align-tiny", str(folder), "someone/tiny", "someone/nothing", "nowhere")
    found = available(*names, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert found == "[True, True, True, False, False]"


def test_what_the_hub_answers_for_is_available(cache):
    asked_slow, done = threading.Event(), threading.Event()

    class Hub(http.server.BaseHTTPRequestHandler):
        """Has someone/tiny, and someone/slow, for which it lets wait."""

        def do_HEAD(self):
            if "/slow/" in self.path:
                asked_slow.set()
                done.wait(60)
            known = self.path.startswith(("/someone/tiny/resolve/", "/someone/slow/resolve/"))
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    shutil.rmtree(cache)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        hub.daemon_threads = True
        hub.block_on_close = False
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        environment["HF_HUB_CACHE"] = str(cache)
        found = available("someone/tiny", "someone/nothing", **environment)
        slow = available("someone/slow", timeout=0.1, **environment)
        assert asked_slow.wait(60)
        done.set()
        hub.shutdown()
    assert (found, slow) == ("[True, False]", "[False]")
    assert available("someone/tiny", **environment) == "[False]"


# --- writing -------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(folder, monkeypatch):
    model = AlignModel.from_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()

    def fails(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_files_get_the_usual_rights(folder):
    (folder / "probe").touch()
    usual = (folder / "probe").stat().st_mode
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).stat().st_mode == usual


def test_a_file_for_pytorch_says_so(folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
