"""The exported SavedModel: signatures, equality with the model, batching, errors, versions."""

import concurrent.futures
import io
import json
import os
import pathlib
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
from image_files import declare
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.protobuf import config_pb2, saved_model_pb2

from align_tf import export_saved_model
from align_tf.export import saved_model

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

NO_LABEL = np.finfo(np.float32).min
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "serving_ops"
SERVING_README = pathlib.Path(__file__).parents[2] / "serving" / "README.md"


def picture(seed: int, format: str = "PNG", size: tuple[int, int] = (40, 50)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
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
            "initializer_range": 0.3,
        },
        vision_config={
            "image_size": 32,
            "initializer_range": 0.3,  # the default's pictures would all be embedded as zeros
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 16],
            "out_channels": [16, 32],
            "strides": [1, 2],
            "num_block_repeats": [1, 2],
            "expand_ratios": [1, 2],
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


@pytest.mark.slow
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


def serve_merged(signature, requests, allowed_batch_size):
    """Answers requests in one batch, as TensorFlow Serving's BatchingSession does.

    Each is padded to the widest with its own first value (batching_util.cc, PadTensor), the batch
    with the first row of the last request (batching_session.cc, MergeInputTensors), and what
    comes out is split by rows.
    """
    sizes = [len(next(iter(request.values()))) for request in requests]
    inputs = {}
    for name in requests[0]:
        arrays = [np.asarray(request[name]) for request in requests]
        width = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
        padded = []
        for array in arrays:
            array = array.astype(object) if array.dtype.kind in "SU" else array
            full = np.full((len(array), *width), array.flat[0], array.dtype)
            full[tuple(slice(size) for size in array.shape)] = array
            padded.append(full)
        padded += [padded[-1][:1]] * (allowed_batch_size - sum(sizes))
        inputs[name] = np.concatenate(padded)
    outputs = run(signature, inputs)
    splits = np.cumsum(sizes)
    return [
        {name: np.split(value, splits)[index] for name, value in outputs.items()}
        for index in range(len(requests))
    ]


def run(signature, inputs):
    feeds = {name: tf.constant(np.asarray(value).tolist()) for name, value in inputs.items()}
    feeds = {
        name: tf.cast(feed, signature.structured_input_signature[1][name].dtype)
        if feed.dtype != tf.string
        else feed
        for name, feed in feeds.items()
    }
    return {name: value.numpy() for name, value in signature(**feeds).items()}


def tokens(processor, texts):
    """Token ids as long as the longest text, which the server has to pad."""
    encoded = processor.tokenizer.encode(tf.constant(texts), padding="longest")
    return {key: value.numpy() for key, value in encoded.items()}


def without_cls(encoded, rows):
    """The same without the [CLS] of these rows, which is no longer their first token."""
    encoded["input_ids"] = encoded["input_ids"].copy()
    encoded["input_ids"][rows, 0] = VOCAB.index("car")
    return encoded


def pixels(processor, seeds):
    return {"pixel_values": processor(images=[picture(seed) for seed in seeds])["pixel_values"]}


# signature: the requests that share a batch, made from the processor
CALLERS = {
    "serving_default": lambda _: [
        {"image_bytes": [picture(4)], "labels": [["a cat", "a dog", "red cars"]]},
        {"image_bytes": [picture(5), picture(6)], "labels": [["a dog"], ["a dog"]]},
        {"image_bytes": [picture(7)], "labels": [["red", "a cat", "", ""]]},
        # Lists that differ within a request begin with an empty label.
        {"image_bytes": [picture(8)] * 2, "labels": [["", "a car", "dog"], ["", "cat", ""]]},
        {"image_bytes": [picture(9)], "labels": [["a cat", "a dog", "a cat", "car", "red", "a"]]},
        {"image_bytes": [picture(3)], "labels": [["red", "car", "red"]]},
        {"image_bytes": [picture(2)], "labels": [["dog", "dog"]]},
        {"image_bytes": [picture(1)] * 2, "labels": [["", "a", "a"], ["", "", "dog"]]},
    ],
    "embed_image": lambda _: [
        {"image_bytes": [picture(1)]},
        {"image_bytes": [picture(2, "JPEG"), picture(3, size=(7, 90))]},
    ],
    "embed_text": lambda _: [
        {"texts": ["a"]},
        {"texts": ["a red cat " * 5, ""]},
        {"texts": ["dogs", "cars"]},
    ],
    "embed_pixels": lambda processor: [pixels(processor, [1]), pixels(processor, [2, 3])],
    "embed_tokens": lambda processor: [
        tokens(processor, ["a red cat " * 5]),
        tokens(processor, ["a"]),
        tokens(processor, ["a dog", "dogs a car"]),
        without_cls(tokens(processor, ["a cat", "cats a dog", "red"]), [1, 2]),
    ],
}


@pytest.mark.parametrize("name", CALLERS)
def test_callers_who_share_a_batch_get_what_they_get_alone(signatures, processor, name):
    requests = CALLERS[name](processor)
    if name == "embed_tokens":
        assert len({request["input_ids"].shape[1] for request in requests}) == 3
    together = serve_merged(signatures[name], requests, allowed_batch_size=16)
    for request, answer in zip(requests, together, strict=True):
        alone = run(signatures[name], request)
        assert set(answer) == set(alone)
        for output, expected in alone.items():
            got = answer[output]
            if name == "serving_default":  # wider than the caller's own list
                beyond, got = got[:, expected.shape[1] :], got[:, : expected.shape[1]]
                assert (beyond == got[:, :1]).all()  # the request's first label once more
            np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_label_counts_once_however_often_a_row_holds_it(signatures):
    lists = [["a", "dog", "a", "a"], ["dog", "a", "", "a"], ["a"] * 4, ["a", "a", "dog", "car"]]
    logits, probs = classify(signatures, [picture(6)] * 4, lists)
    own = dict(zip(["a", "dog", "car"], logits[3, 1:].tolist(), strict=True))
    for row, labels in enumerate(lists):
        total = sum(np.exp(own[label]) for label in {*labels} - {""})
        expected = [np.exp(own[label]) / total if label else 0 for label in labels]
        np.testing.assert_allclose(probs[row], expected, atol=1e-6)
        assert logits[row].tolist() == [own.get(label, NO_LABEL) for label in labels]
    assert probs[2].tolist() == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def raw_pixels(folder):
    """Runs the signature of pixels as a server does: no shape is looked at in Python."""
    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        meta = tf.compat.v1.saved_model.load(session, ["serve"], os.fspath(folder))
    info = meta.signature_def["embed_pixels"]
    options = config_pb2.CallableOptions(
        feed=[tensor.name for tensor in info.inputs.values()],
        fetch=[output.name for output in info.outputs.values()],
    )
    yield session._make_callable_from_options(options)
    session.close()


@pytest.mark.parametrize("shape", [(2, 24, 24, 3), (1, 32, 40, 3), (1, 32, 32, 4)])
def test_pixels_of_another_size_are_refused_where_no_one_looks_at_shapes(raw_pixels, shape):
    (embeds,) = raw_pixels(np.ones((2, 32, 32, 3), "float32"))
    assert embeds.shape == (2, 32)
    message = re.escape(f"[{','.join(map(str, shape))}] is not compatible")
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"pixel_values.*{message}") as error:
        raw_pixels(np.ones(shape, "float32"))
    assert "expected shape [?,32,32,3]" in error.value.message


def test_token_rows_whose_padding_cannot_be_seen_are_named(signatures, processor):
    car, dog, cls = (VOCAB.index(word) for word in ("car", "dog", "[CLS]"))

    def ask(*rows, first_mask=1):
        ids = np.array(rows, np.int32)
        mask = np.ones_like(ids)
        mask[:, 0] = first_mask
        request = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
        return run(signatures["embed_tokens"], request)["text_embeds"]

    message = rf"input_ids\[1\]: begins and ends with one token.*expected {cls} first"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ask([cls, car, dog], [car, dog, car])
    alone = ask([car, dog, car])  # merged with no other, and so not padded
    assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-5)
    for rows in ([[car, dog]] * 2, [[car]] * 2, [[cls, car, cls]] * 2):
        assert ask(*rows).shape == (2, 32)
    assert ask([car, dog, car], [cls, car, dog], first_mask=0).shape == (2, 32)


def test_empty_labels_have_no_part_in_the_answer(signatures):
    logits, probs = classify(signatures, [picture(6)] * 2, [["a cat", ""], ["", ""]])
    assert probs[0].tolist() == [1.0, 0.0]
    assert probs[1].tolist() == [0.0, 0.0]
    assert np.isfinite(logits).all()


def test_a_broken_image_is_named_by_its_row(signatures):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"image_bytes\[1\]"):
        signatures["embed_image"](image_bytes=tf.constant([picture(7), b"no image at all"]))


def test_more_rows_than_go_through_the_towers_at_once(signatures):
    images = [picture(seed) for seed in range(4)] * 33
    texts = [f"{'a dog ' * (number % 40)}car {number}" for number in range(300)]
    few = run(signatures["embed_image"], {"image_bytes": images[:4]})["image_embeds"]
    many = run(signatures["embed_image"], {"image_bytes": images})["image_embeds"]
    np.testing.assert_allclose(many, np.tile(few, [33, 1]), atol=1e-6)
    many = run(signatures["embed_text"], {"texts": texts})["text_embeds"]
    few = run(signatures["embed_text"], {"texts": texts[250:260]})["text_embeds"]
    np.testing.assert_allclose(many[250:260], few, atol=1e-6)
    labels = [["a dog", text] for text in texts[: len(images)]]
    logits, probs = classify(signatures, images, labels)
    few = classify(signatures, images[60:70], labels[60:70])
    for answers in zip((logits, probs), few, strict=True):
        np.testing.assert_allclose(answers[0][60:70], answers[1], atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"image_bytes\[130\]: not a decod"):
        classify(signatures, [*images[:130], b"no image", images[0]], labels)


def test_no_rows_are_answered_by_none(signatures):
    strings, ints = (tf.zeros([0], dtype) for dtype in (tf.string, tf.int32))
    size = signatures["embed_pixels"].structured_input_signature[1]["pixel_values"].shape[1:]
    tokens = tf.reshape(ints, [0, 0])
    tokens = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
    labels = tf.reshape(strings, [0, 3])
    for name, inputs, shape in (
        ("embed_image", {"image_bytes": strings}, (0, 32)),
        ("embed_pixels", {"pixel_values": tf.zeros([0, *size])}, (0, 32)),
        ("embed_text", {"texts": strings}, (0, 32)),
        ("embed_tokens", tokens, (0, 32)),
        ("serving_default", {"image_bytes": strings, "labels": labels}, (0, 3)),
    ):
        assert {value.shape for value in signatures[name](**inputs).values()} == {shape}


CLS = VOCAB.index("[CLS]")
IDS = {"input_ids": [[CLS, 6], [CLS, 7]], "attention_mask": [[1, 1]] * 2}
IDS["token_type_ids"] = [[0, 1]] * 2
PIXELS = np.zeros((3, 32, 32, 3), "float32")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": [[CLS, 6], [CLS, -1]]}, "input_ids[1]: expected ids from 0 to "),
        (
            {"input_ids": [[len(VOCAB), 6]] * 2},
            f"input_ids[0]: expected ids from 0 to {len(VOCAB) - 1}",
        ),
        ({"token_type_ids": [[0, 0], [0, 2]]}, "token_type_ids[1]: expected ids from 0 to 1"),
        ({"attention_mask": [[1, 1]]}, "attention_mask: expected the shape of input_ids"),
        ({key: [[CLS] * 65] for key in IDS}, "input_ids: expected 1 to 64 tokens"),
        (dict.fromkeys(IDS, np.zeros([2, 0], int)), "input_ids: expected 1 to 64 tokens"),
        (
            {"pixel_values": np.stack([PIXELS[0], PIXELS[0] + np.inf])},
            "pixel_values[1]: expected num",
        ),
        ({"pixel_values": PIXELS - np.nan}, "pixel_values[0]: expected numbers from -32 to 32"),
        ({"pixel_values": PIXELS + 255}, "pixel_values[0]: expected numbers from -32 to 32"),
        (
            {"labels": [["a"]] * 2, "image_bytes": [picture(1)]},
            "labels: expected a row for each of",
        ),
    ],
)
def test_values_that_make_no_sense_are_named(signatures, changed, message):
    (name,) = {"input_ids", "pixel_values", "labels"} & {*changed} or {"input_ids"}
    signature = {"input_ids": "embed_tokens", "pixel_values": "embed_pixels"}.get(name)
    inputs = IDS | changed if signature == "embed_tokens" else changed
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        run(signatures[signature or "serving_default"], inputs)


def test_the_server_names_the_row_of_a_bad_image(folder, tmp_path):
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
    (tmp_path / "1").mkdir()
    for part in ("saved_model.pb", "variables"):  # not what warms up the other signatures
        (tmp_path / "1" / part).symlink_to(folder / part)
    with (
        ModelServer(tmp_path) as server,
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


@pytest.mark.slow
def test_the_server_merges_pixels_of_the_right_size_alone(folder, signatures, processor):
    pytest.importorskip("tensorflow_serving")
    from align_tf.client import AlignClient, AlignServerError
    from align_tf.server import ModelServer
    from align_tf.server.batching import BatchingParameters

    right = [pixels(processor, [seed])["pixel_values"] for seed in (1, 2)]
    small = np.ascontiguousarray(right[0][:, 4:28, 4:28])
    parameters = BatchingParameters(
        3, batch_timeout_micros=500_000, pad_variable_length_inputs=True
    )
    with (
        ModelServer(folder, batching=parameters) as server,
        AlignClient(f"127.0.0.1:{server.grpc_port}", protocol="grpc") as client,
        concurrent.futures.ThreadPoolExecutor(3) as callers,
    ):
        asked = [
            callers.submit(client.predict, {"pixel_values": values}, "embed_pixels")
            for values in (right[0], small, right[1])
        ]
        message = r"pixel_values.*\[1,24,24,3\] is not compatible with expected shape \[\?,32,32,3"
        with pytest.raises(AlignServerError, match=message) as error:
            asked[1].result()
        assert error.value.status == 400
        for values, answer in zip(right, asked[::2], strict=True):
            expected = run(signatures["embed_pixels"], {"pixel_values": values})["image_embeds"]
            np.testing.assert_allclose(answer.result()["image_embeds"], expected, atol=2e-5)


def test_versions_count_up_and_are_never_overwritten(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "make_signatures", lambda *_: {})
    (tmp_path / "7").mkdir()
    assert export_saved_model(model, processor, tmp_path).name == "8"
    with pytest.raises(FileExistsError, match="8"):
        export_saved_model(model, processor, tmp_path, version=8)
    with pytest.raises(ValueError, match="version=0"):
        export_saved_model(model, processor, tmp_path, version=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"]


def test_a_version_is_one_that_a_server_takes(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "make_signatures", lambda *_: {})
    for name in ("003", "٤", "99999999999999999999"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match="/003: this version is there already"):
        export_saved_model(model, processor, tmp_path, version=3)
    for version in (True, 1.5, "5", 2**63):
        with pytest.raises(ValueError, match=f"version={version!r}: expected a whole number"):
            export_saved_model(model, processor, tmp_path, version=version)
    assert export_saved_model(model, processor, tmp_path, dtype=tf.float32).name == "4"
    (tmp_path / str(2**63 - 1)).mkdir()
    with pytest.raises(ValueError, match="version=9223372036854775808: expected a whole number"):
        export_saved_model(model, processor, tmp_path)


def test_a_failed_export_leaves_nothing(model, processor, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(saved_model, "make_signatures", lambda *_: {})
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


def test_metadata_names_the_image_mode_and_the_dtype(folder):
    metadata = json.loads((folder / "assets.extra" / "align_tf.json").read_text())
    assert (metadata["image_mode"], metadata["dtype"]) == ("hf", "float32")


@pytest.mark.slow
def test_a_bfloat16_export_takes_and_gives_float32(model, processor, signatures, tmp_path):
    folder = export_saved_model(model, processor, tmp_path, dtype="bfloat16")
    loaded = tf.saved_model.load(os.fspath(folder)).signatures
    pictures = tf.constant([picture(0), picture(1)])
    exact, rounded = (
        each["embed_image"](image_bytes=pictures)["image_embeds"].numpy()
        for each in (signatures, loaded)
    )
    assert rounded.dtype == np.float32
    cosines = np.sum(exact * rounded, axis=-1)
    assert 0.999 < cosines.min() < 1.0 - 1e-6


def test_an_unknown_dtype_is_told(model, processor, tmp_path):
    with pytest.raises(
        ValueError, match="dtype='int8': expected one of float32, bfloat16, float16"
    ):
        export_saved_model(model, processor, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"dtype=tf\.int8: expected one of float32"):
        export_saved_model(model, processor, tmp_path, dtype=tf.int8)


# --- ops -----------------------------------------------------------------------------------


def registries():
    """Reads ops.txt: by server, by op, its attributes and whether a node has to have them."""
    servers = ("2.18", "2.19", "2.20")
    found = {server: {} for server in servers}
    for line in (GOLDENS / "ops.txt").read_text().splitlines():
        (op, where), *attrs = [word.partition("@")[::2] for word in line.split()]
        for server in where.split(",") if where else servers:
            found[server][op] = {
                attr.rstrip("!"): attr.endswith("!")
                for attr, where in attrs
                if not where or server in where.split(",")
            }
    return found


def takes(registry, node):
    """Tells whether a server can run a node: it has the op, and knows its attributes."""
    if node.op not in registry:
        return False
    attrs, given = registry[node.op], {name for name in node.attr if not name.startswith("_")}
    return given <= set(attrs) and {name for name, needed in attrs.items() if needed} <= given


def functions_of(node, library):
    if node.op in library:
        yield node.op
    for value in node.attr.values():
        for function in (value.func, *value.list.func):
            if function.name:
                yield function.name


def nodes_of(signature, graph):
    """Returns the nodes that a signature runs, those of its functions too."""
    library = {function.signature.name: function for function in graph.library.function}
    by_name = {node.name: node for node in graph.node}
    found, seen, functions = [], set(), []
    names = [info.name for info in signature.outputs.values()]
    while names:
        name = names.pop().lstrip("^").split(":")[0]
        if name not in seen:
            seen.add(name)
            found.append(by_name[name])
            names += by_name[name].input
    for node in found:  # grows
        for name in functions_of(node, library):
            if name not in functions:
                functions.append(name)
                found += library[name].node_def
    return [node for node in found if node.op not in library]


@pytest.fixture(scope="module")
def meta_graph(folder):
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return saved.meta_graphs[0]


def test_every_op_is_one_that_the_stock_servers_register(meta_graph):
    graph = meta_graph.graph_def
    library = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(n for function in graph.library.function for n in function.node_def)]
    assert len(nodes) > 1000
    for server, registry in registries().items():
        unknown = {n.op for n in nodes if n.op not in library and not takes(registry, n)}
        assert unknown == set(), server


def test_an_op_or_attribute_that_a_server_lacks_is_seen():
    registry = registries()
    webp = node_def_pb2.NodeDef(op="DecodeWebP")
    assert [takes(registry[server], webp) for server in registry] == [False, False, True]
    cast = node_def_pb2.NodeDef(op="Cast")
    cast.attr["SrcT"].type = cast.attr["DstT"].type = 1
    assert takes(registry["2.18"], cast)
    cast.attr["later"].b = True
    assert not takes(registry["2.18"], cast)


def test_the_oldest_server_of_each_signature_is_the_one_stated(meta_graph):
    oldest = {}
    for name, signature in meta_graph.signature_def.items():
        if signature.method_name:
            nodes = nodes_of(signature, meta_graph.graph_def)
            servers = [v for v, r in registries().items() if all(takes(r, n) for n in nodes)]
            oldest[name] = min(servers)
    table = SERVING_README.read_text().split("oldest server |")[1].split("\n\n")[0]
    assert oldest == dict(re.findall(r"`(\w+)` \| ([\d.]+)", table))
