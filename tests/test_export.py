"""The exported SavedModel: signatures, equality with the model, batching, errors, versions."""

import io
import json
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

from align_tf import AlignConfig, AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

import tensorflow as tf
from test_hostile_images import declare

from align_tf import export_saved_model

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "##s", "car"]

# Loads the export as a server does, without this package, and answers with what it got.
READER = """
import json, sys
import numpy as np
import tensorflow as tf
import tensorflow_text
sys.modules["align_tf"] = None  # importing it would fail

folder, given, answer = sys.argv[1:]
feeds = {name: np.load(given, allow_pickle=True)[name] for name in ("image_bytes", "labels")}
results = {}
loaded = tf.saved_model.load(folder)
outputs = loaded.signatures["serving_default"](
    **{name: tf.constant(list(value)) for name, value in feeds.items()}
)
results.update({"v2_" + name: value.numpy() for name, value in outputs.items()})
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    meta = tf.compat.v1.saved_model.load(session, ["serve"], folder)
    signature = meta.signature_def["serving_default"]
    values = session.run(
        {name: info.name for name, info in signature.outputs.items()},
        {signature.inputs[name].name: value for name, value in feeds.items()},
    )
results.update({"v1_" + name: value for name, value in values.items()})
np.savez(answer, **results)
"""

# Ops of tf-text that every stock serving image registers (tf-text 2.12.1 and later).
TEXT_OPS = {
    "FastBertNormalize",
    "FastWordpieceTokenizeWithOffsets",
    "WordpieceTokenizeWithOffsets",
    "RegexSplitWithOffsets",
    "CaseFoldUTF8",
    "NormalizeUTF8",
    "WhitespaceTokenizeWithOffsets",
    "WhitespaceTokenizeWithOffsetsV2",
}


def picture(seed: int, format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    config = AlignConfig(
        text_config={
            "vocab_size": len(VOCAB),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
        },
        vision_config={
            "image_size": 32,
            "width_coefficient": 0.1,
            "depth_coefficient": 0.1,
            "hidden_dim": 32,
        },
        projection_dim=32,
        temperature_init_value=0.2,
    )
    return AlignModel(config)


@pytest.fixture(scope="module")
def processor():
    images = AlignImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
    )
    return AlignProcessor(images, AlignTokenizer(VOCAB))


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    return export_saved_model(model, processor, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def signatures(folder):
    return tf.saved_model.load(os.fspath(folder)).signatures


def classify(signatures, images, labels):
    outputs = signatures["serving_default"](
        image_bytes=tf.constant(images), labels=tf.constant(labels)
    )
    return outputs["logits"].numpy(), outputs["probs"].numpy()


def test_signatures_have_the_documented_inputs_and_outputs(signatures):
    found = {
        name: (
            {
                key: (spec.dtype.name, spec.shape.rank)
                for key, spec in f.structured_input_signature[1].items()
            },
            {key: spec.dtype.name for key, spec in f.structured_outputs.items()},
        )
        for name, f in signatures.items()
    }
    assert found == {
        "serving_default": (
            {"image_bytes": ("string", 1), "labels": ("string", 2)},
            {"logits": "float32", "probs": "float32"},
        ),
        "embed_image": ({"image_bytes": ("string", 1)}, {"image_embeds": "float32"}),
        "embed_text": ({"texts": ("string", 1)}, {"text_embeds": "float32"}),
        "embed_pixels": ({"pixel_values": ("float32", 4)}, {"image_embeds": "float32"}),
        "embed_tokens": (
            {
                "input_ids": ("int32", 2),
                "attention_mask": ("int32", 2),
                "token_type_ids": ("int32", 2),
            },
            {"text_embeds": "float32"},
        ),
    }


def test_signatures_give_what_the_model_gives(model, processor, signatures):
    images, texts = [picture(0), picture(1, "JPEG")], ["a cat", "red cars", "a dog"]
    inputs = processor(images=images, text=texts)
    expected = model(inputs)
    got = signatures["embed_image"](image_bytes=tf.constant(images))["image_embeds"]
    np.testing.assert_allclose(got, expected.image_embeds, atol=1e-5)
    got = signatures["embed_text"](texts=tf.constant(texts))["text_embeds"]
    np.testing.assert_allclose(got, expected.text_embeds, atol=1e-5)
    got = signatures["embed_pixels"](pixel_values=tf.constant(inputs["pixel_values"]))
    np.testing.assert_allclose(got["image_embeds"], expected.image_embeds, atol=1e-5)
    tokens = {key: inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    got = signatures["embed_tokens"](**{k: tf.constant(v, tf.int32) for k, v in tokens.items()})
    np.testing.assert_allclose(got["text_embeds"], expected.text_embeds, atol=1e-5)
    logits, probs = classify(signatures, images, [texts, texts])
    np.testing.assert_allclose(logits, expected.logits_per_image, atol=1e-4)
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-6)


def test_a_process_without_this_package_reads_it(folder, signatures, tmp_path):
    images, labels = [picture(2), picture(3)], [["a cat", "a dog"], ["red car", "a cat"]]
    np.savez(
        tmp_path / "given.npz",
        image_bytes=np.array(images, object),
        labels=np.array(labels, object),
    )
    arguments = [os.fspath(p) for p in (folder, tmp_path / "given.npz", tmp_path / "answer.npz")]
    subprocess.run([sys.executable, "-c", READER, *arguments], check=True, cwd=tmp_path)
    answer = np.load(tmp_path / "answer.npz")
    logits, probs = classify(signatures, images, labels)
    for loader in ("v1", "v2"):
        np.testing.assert_allclose(answer[f"{loader}_logits"], logits, atol=1e-5)
        np.testing.assert_allclose(answer[f"{loader}_probs"], probs, atol=1e-6)


def test_rows_of_different_callers_may_share_a_batch(signatures):
    callers = [([picture(4)], [["a cat", "a dog", "red cars"]]), ([picture(5)], [["a dog"]])]
    images = [image for images, _ in callers for image in images]
    labels = [([*row, "", ""])[:3] for _, rows in callers for row in rows]
    logits, probs = classify(signatures, images, labels)
    for index, (image, row) in enumerate(callers):
        alone_logits, alone_probs = classify(signatures, image, row)
        width = len(row[0])
        np.testing.assert_allclose(logits[index, :width], alone_logits[0], atol=1e-5)
        np.testing.assert_allclose(probs[index, :width], alone_probs[0], atol=1e-6)
        assert (probs[index, width:] == 0).all()


def test_empty_labels_have_no_part_in_the_answer(signatures):
    logits, probs = classify(signatures, [picture(6)] * 2, [["a cat", ""], ["", ""]])
    assert probs[0].tolist() == [1.0, 0.0]
    assert probs[1].tolist() == [0.0, 0.0]
    assert np.isfinite(logits).all()


def test_a_broken_image_is_named_by_its_row(signatures):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"image_bytes\[1\]"):
        signatures["embed_image"](image_bytes=tf.constant([picture(7), b"no image at all"]))


def test_the_server_names_the_row_of_a_bad_image(folder):
    grpc = pytest.importorskip("grpc")
    apis = pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc")
    from tensorflow_serving.apis import predict_pb2

    from align_tf.server import ModelServer

    def request(images):
        made = predict_pb2.PredictRequest()
        made.model_spec.name, made.model_spec.signature_name = "align", "embed_image"
        made.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images))
        return made

    bad = {
        b"no image": r"image_bytes\[1\]: not a decodable image",
        b"\xff\xd8\xff\xe0" + bytes(range(256)): r"image_bytes\[1\]: not a decodable image",
        declare(picture(7), "PNG", 65535): r"image_bytes\[1\]: the image declares 65535 x 65535",
        declare(picture(7, "GIF"), "GIF", 65535): r"image_bytes\[1\]: the image declares 65535",
    }
    with (
        ModelServer(folder.parent) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        stub = apis.PredictionServiceStub(channel)
        for image, message in bad.items():
            with pytest.raises(grpc.RpcError) as error:
                stub.Predict(request([picture(7), image, picture(8)]), timeout=60)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert re.search(message, error.value.details())
        answer = stub.Predict(request([picture(7)]), timeout=60)
        assert tf.make_ndarray(answer.outputs["image_embeds"]).shape == (1, 32)


def test_versions_count_up_and_are_never_overwritten(model, processor, tmp_path):
    (tmp_path / "7").mkdir()
    assert export_saved_model(model, processor, tmp_path).name == "8"
    with pytest.raises(FileExistsError, match="8"):
        export_saved_model(model, processor, tmp_path, version=8)
    with pytest.raises(ValueError, match="version=0"):
        export_saved_model(model, processor, tmp_path, version=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"]


def test_a_failed_export_leaves_nothing(model, processor, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(model, processor, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_warmup_requests_are_those_a_server_reads(folder, signatures):
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    records = tf.data.TFRecordDataset(
        os.fspath(folder / "assets.extra" / "tf_serving_warmup_requests")
    )
    seen = set()
    for record in records:
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        signatures[request.model_spec.signature_name](
            **{name: tf.constant(value) for name, value in inputs.items()}
        )
        seen.add(request.model_spec.signature_name)
    assert seen == set(signatures)


def test_metadata_names_the_image_mode(folder):
    metadata = json.loads((folder / "assets.extra" / "align_tf.json").read_text())
    assert metadata["image_mode"] == "hf"


def test_graphs_use_only_ops_that_the_stock_server_registers(folder):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    ops = {node.op for node in graph.node}
    ops |= {node.op for function in graph.library.function for node in function.node_def}
    known = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, tensorflow as tf\n"
            "from tensorflow.python.framework import op_def_registry as registry\n"
            "print(*[op for op in sys.stdin.read().split() if registry.get(op) is not None])",
        ],
        input=" ".join(ops),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert ops - set(known) <= TEXT_OPS
