"""The original training code's checkpoints: the same embeddings, names, sizes, what is refused."""

import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from align_tf import AlignConfig, AlignModel, AlignTextModel, AlignVisionModel
from align_tf.checkpoints import import_plan, name_table, original, tensors as files
from align_tf.configuration.blocks import block_table
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.files import CheckpointError
from align_tf.models.initialization import no_init_weights

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "coyo_align"
B3, B7 = GOLDENS / "b3-narrow", GOLDENS / "b7-narrow"
HEADS = {
    B3: {"text_config": {"num_attention_heads": 2}},
    B7: {"text_config": {"num_attention_heads": 4}},
}
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
QUERY = "text_encoder/layer_with_weights-0/bert/encoder/layer/1/attention/self_attention/query"


@pytest.fixture(scope="module")
def b3() -> AlignModel:
    return AlignModel.from_pretrained(B3, config=HEADS[B3])


@pytest.fixture(scope="module")
def b7() -> AlignModel:
    return AlignModel.from_pretrained(B7, config=HEADS[B7])


def expected(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "expected.npz"))


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def text_error(model: AlignModel, arrays: dict[str, np.ndarray]) -> np.ndarray:
    tokens = {
        name: arrays[name].astype("int32")
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    features = ops.convert_to_numpy(model.get_text_features(tokens))
    return np.abs(unit(features) - unit(arrays["text_features"])).max(axis=-1)


def image_error(model: AlignModel, arrays: dict[str, np.ndarray]) -> np.ndarray:
    pixel_values = arrays["image"].astype("float32") / 127.5 - 1
    features = ops.convert_to_numpy(model.get_image_features(pixel_values))
    return np.abs(unit(features) - unit(arrays["image_features"])).max(axis=-1)


def rewrite(source: pathlib.Path, folder: pathlib.Path, change) -> pathlib.Path:
    """Writes the checkpoint of a folder anew, its tensors by key changed on the way."""
    reader = tf.train.load_checkpoint(str(source / "model-weights"))
    tensors = {
        key: reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        if not key.startswith("optimizer/")
    }
    change(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(folder / "model-weights"),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(value) for value in tensors.values()],
    )
    return folder


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A checkpoint to be spoilt."""
    for file in B3.glob("model-weights.*"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def refusal(source: pathlib.Path, model_class: type = AlignTextModel, config=HEADS[B3]) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_class.from_pretrained(source, config=config)
    return str(caught.value)


# --- the same numbers ----------------------------------------------------------------------


def test_b3_gives_the_embeddings_of_the_original(b3):
    arrays = expected(B3)
    assert image_error(b3, arrays).max() < 1e-5
    assert text_error(b3, arrays).max() < 1e-5
    assert float(ops.convert_to_numpy(b3.temperature)) == arrays["temperature"].astype("float32")


@pytest.mark.slow
def test_b7_gives_the_embeddings_of_the_original(b7):
    arrays = expected(B7)
    errors = image_error(b7, arrays)
    assert errors[[0, 2]].max() < 1e-5
    # The random weights amplify a rounding error in this image 10,000 times: in float64 a last
    # bit of its pixels moves it by 5e-5, and the value on file is 1.5e-3 off the one in float64.
    assert errors[1] < 5e-3
    assert text_error(b7, arrays).max() < 1e-5
    assert float(ops.convert_to_numpy(b7.temperature)) == arrays["temperature"].astype("float32")


def test_towers_load_alone(b3):
    arrays = expected(B3)
    text = AlignTextModel.from_pretrained(B3, config=HEADS[B3])
    ids = arrays["input_ids"].astype("int32")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(text(ids).last_hidden_state),
        ops.convert_to_numpy(b3.text_model(ids).last_hidden_state),
    )
    vision = AlignVisionModel.from_pretrained(B3, config=HEADS[B3])
    for weight, value in zip(vision.weights, b3.vision_model.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), ops.convert_to_numpy(value))


@pytest.mark.parametrize("name", ["", "model-weights", "model-weights.index"])
def test_a_folder_a_prefix_and_an_index_name_the_same(name):
    model = AlignTextModel.from_pretrained(B3 / name, config=HEADS[B3])
    assert model.config.vocab_size == 307


def test_the_residual_of_a_first_block_is_kept_in_the_config(b3, tmp_path):
    assert [block.spec.residual for block in b3.vision_model.blocks[:3]] == [True, True, False]
    b3.config.save_pretrained(tmp_path)
    assert AlignConfig.from_pretrained(tmp_path) == b3.config
    assert "first_block_residual" not in AlignVisionConfig().to_dict()


# --- sizes ---------------------------------------------------------------------------------


def test_sizes_come_from_the_shapes(b3, b7):
    for model, sizes in (
        (b3, (307, 32, 4, 2, 64, 64, 24, True, 0.2, 1.4, 64, 289)),
        (b7, (211, 48, 12, 4, 96, 64, 32, False, 0.1, 3.1, 32, 289)),
    ):
        text, vision = model.config.text_config, model.config.vision_config
        assert sizes == (
            text.vocab_size,
            text.hidden_size,
            text.num_hidden_layers,
            text.num_attention_heads,
            text.intermediate_size,
            text.max_position_embeddings,
            model.config.projection_dim,
            model.config.image_projection,
            vision.width_coefficient,
            vision.depth_coefficient,
            vision.hidden_dim,
            vision.image_size,
        )


def weights_of(vision: AlignVisionConfig, hidden_size: int = 768) -> dict[str, tuple[int, ...]]:
    """Lists the shapes that sizes are inferred from, BERT-base's if nothing is said."""
    blocks = "vision_model.encoder.blocks."
    shapes = {
        "text_model.embeddings.word_embeddings.weight": (30522, hidden_size),
        "text_model.embeddings.position_embeddings.weight": (512, hidden_size),
        "text_model.embeddings.token_type_embeddings.weight": (2, hidden_size),
        "text_projection.weight": (hidden_size, vision.embed_dim),
        "vision_model.embeddings.convolution.weight": (3, 3, 3, vision.stem_channels),
    }
    for i in range(12):
        shapes[f"text_model.encoder.layer.{i}.intermediate.dense.weight"] = (hidden_size, 3072)
    for i, spec in enumerate(block_table(vision)):
        wide, size = spec.in_channels * spec.expand_ratio, spec.kernel_size
        shapes[f"{blocks}{i}.depthwise_conv.depthwise_conv.weight"] = (size, size, wide, 1)
        shapes[f"{blocks}{i}.projection.project_conv.weight"] = (1, 1, wide, spec.out_channels)
    return shapes


@pytest.mark.parametrize("scaling", original.SCALINGS)
def test_an_efficientnet_is_known_by_its_scaling(scaling):
    width, depth = scaling
    given = AlignVisionConfig(width_coefficient=width, depth_coefficient=depth)
    values = original.infer_config(weights_of(given), {})["vision_config"]
    # B1 and B2 differ in width alone.
    assert (values["width_coefficient"], values["depth_coefficient"]) == scaling
    assert not values["first_block_residual"]


def test_stages_of_another_kind_have_to_be_given():
    vision = AlignVisionConfig(strides=[2, 2, 1, 2, 1, 2, 1], expand_ratios=[1, 4, 6, 6, 6, 6, 6])
    shapes = weights_of(vision)
    with pytest.raises(CheckpointError, match=r"55 blocks .* stem of 64 .* 640 after .* a config"):
        original.infer_config(shapes, {})
    given = {"strides": vision.strides, "expand_ratios": vision.expand_ratios}
    values = original.infer_config(shapes, {"vision_config": given})["vision_config"]
    assert values["strides"] == [2, 2, 1, 2, 1, 2, 1]
    assert (values["width_coefficient"], values["depth_coefficient"]) == (2.0, 3.1)


def test_heads_of_another_width_have_to_be_given():
    message = refusal(B3, config=None)
    assert "b3-narrow/model-weights.index: hidden_size=32 is no multiple of BERT's head" in message
    assert '{"text_config": {"num_attention_heads": ...}}' in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_config": {"hidden_size": 768}}, "text_config.hidden_size=768: the weights have 32"),
        ({"text_config": {"num_hidden_layers": 12}}, "num_hidden_layers=12: the weights have 4"),
        ({"projection_dim": 640}, "projection_dim=640: the weights have 24"),
        ({"image_projection": False}, "image_projection=False: the weights have True"),
        (
            {**HEADS[B3], "vision_config": {"width_coefficient": 2.0}},
            "with {'width_coefficient': 2.0}: give",
        ),
    ],
)
def test_a_given_size_is_checked(given, message):
    assert message in refusal(B3, config=given)


def test_a_whole_config_is_checked_against_the_weights(b3):
    config = AlignConfig.from_dict(b3.config.to_dict())
    assert AlignTextModel.from_pretrained(B3, config=config.text_config).config.vocab_size == 307
    config.text_config.intermediate_size = 65
    message = refusal(B3, config=config.text_config)
    key = "text_encoder/layer_with_weights-0/bert/encoder/layer/0/intermediate/dense/kernel"
    assert f"{key}{VALUE} (32, 64) does not fit layer_0/intermediate/kernel (32, 65)" in message


def test_a_config_beside_the_checkpoint_is_read_and_checked(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({"text_config": {"num_attention_heads": 2, "hidden_act": "relu"}}))
    assert AlignTextModel.from_pretrained(folder).config.hidden_act == "relu"
    given = {"text_config": {"hidden_act": "silu"}}  # goes before the file
    config = AlignTextModel.from_pretrained(folder, config=given).config
    assert (config.hidden_act, config.num_attention_heads) == ("silu", 2)
    path.write_text(json.dumps({"text_config": {"vocab_size": 30522}}))
    assert "vocab_size=30522: the weights have 307" in refusal(folder)


# --- names ---------------------------------------------------------------------------------


def test_what_is_left_out_is_named():
    index = B3 / "model-weights.index"
    assert import_plan.unused_tensors([index]) == {
        "optimizer": 824,
        "loss_tracker": 2,
        "loss_i2t_tracker": 2,
        "loss_t2i_tracker": 2,
    }
    assert len(files.read_header(index)) == 1395
    assert len(original.hugging_face_names(index)) == 1395 - 830


@pytest.mark.slow
def test_the_published_layout_at_full_size():
    """B7 and BERT-base: each key of the object graph is one weight of the full-size model."""
    index = B7 / "model-weights.index"
    names = original.hugging_face_names(index)
    with no_init_weights():
        model = AlignModel(AlignConfig.from_preset("align-base"))
    weights = model._relative_weights()
    table = name_table.to_hugging_face(weights, model.table)
    weights = {hf: weights[path] for path, (hf, _) in table.items()}
    assert sorted(names.values()) == sorted(weights)
    assert len(names) == 1232  # image tower 1030, BERT 199, projection 2, temperature
    graph = original._full_names(index)
    leftovers = {key.split("/")[0] for key in graph if key not in names}
    assert leftovers == {"optimizer", "loss_tracker", "loss_i2t_tracker", "loss_t2i_tracker"}

    efficientnet = json.loads((GOLDENS / "efficientnet_b7.json").read_text())
    shapes = {}
    for key, name in names.items():
        if key.startswith("image_encoder/"):
            full_name = graph[key].replace("depthwise_kernel", "kernel")  # as Keras 3 calls it
            shapes[name] = tuple(efficientnet.pop(full_name))
            assert shapes[name] == tuple(weights[name].shape), key
        else:
            shapes[name] = tuple(weights[name].shape)
    assert efficientnet == {}
    assert shapes["text_model.encoder.layer.11.output.dense.weight"] == (3072, 768)
    inferred = AlignConfig.from_dict(original.infer_config(shapes, {}))
    assert inferred == AlignConfig.from_preset("align-base")


def test_a_variable_that_is_not_in_the_table_is_named(tmp_path):
    def change(tensors):
        tensors[f"text_encoder/adapter/kernel{VALUE}"] = np.zeros((2, 3), "float32")

    message = refusal(rewrite(B3, tmp_path, change))
    assert f"unexpected tensor text_encoder/adapter/kernel{VALUE} (2, 3)" in message


def test_a_variable_that_is_missing_is_named(tmp_path):
    def change(tensors):
        del tensors[f"{QUERY}/bias{VALUE}"]

    message = refusal(rewrite(B3, tmp_path, change))
    assert "missing tensor encoder.layer.1.attention.self.query.bias" in message
    assert "for layer_1/attention/query/bias (32,)" in message


def test_a_shape_that_differs_is_named(tmp_path):
    def change(tensors):
        tensors[f"{QUERY}/kernel{VALUE}"] = np.zeros((32, 31), "float32")

    message = refusal(rewrite(B3, tmp_path, change))
    assert (
        f"{QUERY}/kernel{VALUE} (32, 31) does not fit layer_1/attention/query/kernel (32, 32)"
        in (message)
    )


def test_slots_and_counters_of_other_runs_are_left_out(tmp_path):
    def change(tensors):
        for key in (f"{QUERY}/bias/.OPTIMIZER_SLOT/optimizer/m", "optimizer/iter", "save_counter"):
            tensors[f"{key}{VALUE}"] = np.zeros((32,), "float32")

    AlignTextModel.from_pretrained(rewrite(B3, tmp_path, change), config=HEADS[B3])
    unused = import_plan.unused_tensors([tmp_path / "model-weights.index"])
    assert (unused["OPTIMIZER_SLOT"], unused["optimizer"], unused["save_counter"]) == (1, 1, 1)


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 100, 50_000, -1])
def test_a_truncated_index_is_refused(kept, folder):
    path = folder / "model-weights.index"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model-weights.index: not a whole TensorFlow checkpoint" in refusal(folder)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "truncated: its variables take 5062864 bytes, its .data files hold 0"),
        (600_000, "truncated: its variables take 5062864 bytes, its .data files hold 600000"),
        (-1, "not a whole TensorFlow checkpoint"),
    ],
)
def test_truncated_data_are_refused(kept, message, folder):
    path = folder / "model-weights.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"model-weights.index: {message}" in refusal(folder, AlignModel)


def test_a_flipped_bit_is_refused(folder):
    path = folder / "model-weights.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[-400] ^= 1  # in text_projection, the last of them
    path.write_bytes(content)
    assert "model-weights.index: not a whole TensorFlow checkpoint" in refusal(folder, AlignModel)


def test_a_missing_shard_is_named(folder):
    (folder / "model-weights.data-00000-of-00001").rename(
        folder / "model-weights.data-00000-of-00002"
    )
    message = "expected all of its model-weights.data-00000-of-... beside it, found model-weights.d"
    assert message in refusal(folder)
    (folder / "model-weights.data-00000-of-00002").unlink()
    assert "beside it, found none" in refusal(folder)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tf.train.Checkpoint(head=tf.Variable([1.0])).write(str(tmp_path / "ckpt"))
    message = "ckpt.index: no checkpoint of the original ALIGN code: it has no text_model."
    assert message in refusal(tmp_path)


def test_a_checkpoint_without_an_object_graph_is_refused(tmp_path):
    def change(tensors):
        del tensors["_CHECKPOINTABLE_OBJECT_GRAPH"]

    assert "no object graph in it" in refusal(rewrite(B3, tmp_path, change))


def test_of_several_checkpoints_one_has_to_be_named(folder):
    for file in list(folder.iterdir()):
        shutil.copyfile(file, folder / file.name.replace("model-weights", "chpt_2"))
    assert "several checkpoints: chpt_2, model-weights; name one" in refusal(folder)
    AlignTextModel.from_pretrained(folder / "chpt_2", config=HEADS[B3])


# --- the hub -------------------------------------------------------------------------------


def test_a_hub_id_loads_from_the_cache(folder, tmp_path):
    repository = tmp_path / "cache" / "models--someone--coyo"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for file in folder.glob("model-weights.*"):
        shutil.copyfile(file, snapshot / file.name)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = AlignTextModel.from_pretrained("someone/coyo", config=HEADS[B3], **options)
    assert model.config.vocab_size == 307


def test_a_hub_id_is_fetched(tmp_path):
    """Both files of the checkpoint come from a hub that has no other weights."""
    contents = {f"/{file.name}": file.read_bytes() for file in B3.glob("model-weights.*")}
    commit = "a" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix(f"/someone/coyo/resolve/{commit}").split("?")[0]
            body = contents.get(name)
            if self.path.startswith("/api/models/someone/coyo/tree"):
                body = json.dumps(
                    [
                        {"type": "file", "path": name[1:], "size": len(content), "oid": commit}
                        for name, content in contents.items()
                    ]
                ).encode()
            elif self.path.startswith("/api/models/someone/coyo"):
                siblings = [{"rfilename": name[1:]} for name in contents]
                body = json.dumps({"id": "someone/coyo", "sha": commit, "siblings": siblings})
                body = body.encode()
            self.send_response(404 if body is None else 200)
            if body is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{len(body or b"")}"')
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    script = (
        "from align_tf.checkpoints.tensors import weight_files\n"
        "from align_tf.hub import resolve_folder\n"
        "print(*weight_files(resolve_folder('someone/coyo', weights=True)))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        hub.shutdown()
    index = pathlib.Path(done.stdout.strip())
    assert index.name == "model-weights.index", done.stderr
    assert index.read_bytes() == contents["/model-weights.index"]
    assert original.read_header(index) == original.read_header(B3 / "model-weights.index")
