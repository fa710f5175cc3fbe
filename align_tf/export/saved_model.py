"""Export of a model and its processor as a SavedModel that takes raw bytes and strings."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import keras
import tensorflow as tf

import align_tf
from align_tf.models.align import AlignModel
from align_tf.models.inference_copy import inference_copy
from align_tf.models.packing import text_features
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import TOKEN_INPUTS

WARMUP_NAME = "tf_serving_warmup_requests"
METADATA_NAME = "align_tf.json"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")

# What a label that is none gets for a logit, an empty one or one that pads a short list: the lowest
# float32, so that a softmax over the row agrees with `probs`, and JSON can hold it.
NO_LABEL_LOGIT = tf.float32.min

# What a process on the TensorFlow backend does for another backend.
EXPORT = """
import sys
from align_tf import AlignModel, AlignProcessor, export_saved_model

folder, dtype, directory, version = sys.argv[1:]
model, processor = AlignModel.from_pretrained(folder), AlignProcessor.from_pretrained(folder)
export_saved_model(model, processor, directory, version=int(version), dtype=dtype)
"""


def export_saved_model(
    model: AlignModel,
    processor: AlignProcessor,
    directory: str | os.PathLike,
    *,
    version: int | None = None,
    dtype: str | None = None,
) -> pathlib.Path:
    """Writes a SavedModel for TensorFlow Serving, warmup requests included.

    BatchNorm is folded into the convolutions, and texts go through their tower without padding.
    The weights stay variables: constants were 1.05 times as fast at align-base's size, but took
    17 GB to write, and several times the memory to serve.

    Where Keras runs on another backend than TensorFlow, as on a Colab TPU, a process on
    TensorFlow and the CPU gets the model in a temporary checkpoint and writes it.

    Its signatures, each with the batch as the first dimension and no row depending on another, so
    that the server may merge requests, and pad them with `pad_variable_length_inputs`:

        serving_default  image_bytes (n), labels (n, m)    -> logits (n, m), probs (n, m)
        embed_image      image_bytes (n)                   -> image_embeds (n, d)
        embed_text       texts (n)                         -> text_embeds (n, d)
        embed_pixels     pixel_values (n, h, w, 3)         -> image_embeds (n, d)
        embed_tokens     input_ids, attention_mask,
                         token_type_ids int32 (n, t)       -> text_embeds (n, d)

    Args:
        model: the model; its outputs are float32 whatever it was trained in.
        processor: the processor; its image and text settings go into the graph.
        directory: the model's folder, which holds one numbered folder for each version.
        version: the version to write; None takes the next free number.
        dtype: of weights and activations, `float32`, `bfloat16` or `float16`; None takes the one
            that the model computes in. Inputs and outputs are float32 whatever it is.

    Returns:
        The version's folder.

    Raises:
        RuntimeError: the process on TensorFlow failed; the message is its own.
        FileExistsError: that version is there already.
        ValueError: version is not a positive number, or dtype is none of those.
    """
    dtype = model.dtype_policy.compute_dtype if dtype is None else dtype
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(EXPORT_DTYPES)}")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    version = _next_version(directory) if version is None else version
    if version < 1:
        raise ValueError(f"version={version}: expected a positive number")
    target = directory / str(version)
    if target.exists():
        raise FileExistsError(f"{target}: this version is there already")
    if keras.backend.backend() != "tensorflow":
        _export_in_tensorflow(model, processor, directory, version, dtype)
        return target

    model = inference_copy(model, dtype)
    signatures = _signatures(model, processor)
    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    # A server scans for numbered folders, so it sees the version only when it is whole.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{version}.", dir=directory))
    try:
        tf.saved_model.save(module, os.fspath(temporary), signatures=signatures)
        _write_extras(temporary / "assets.extra", model, processor, dtype)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _export_in_tensorflow(
    model: AlignModel,
    processor: AlignProcessor,
    directory: pathlib.Path,
    version: int,
    dtype: str,
) -> None:
    """Hands a model over to a process on the TensorFlow backend, which exports it."""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("XLA_FLAGS", None)  # JAX's; TensorFlow ends at one it does not know
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        arguments = [folder, dtype, str(directory), str(version)]
        done = subprocess.run(
            [sys.executable, "-c", EXPORT, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"export on TensorFlow failed:\n{done.stderr[-2000:]}")


def _next_version(directory: pathlib.Path) -> int:
    return max((int(p.name) for p in directory.iterdir() if p.name.isdecimal()), default=0) + 1


def _signatures(model: AlignModel, processor: AlignProcessor) -> dict[str, Any]:
    images, tokenizer = processor.image_processor, processor.tokenizer
    max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    # What several signatures call is traced once: tracing is most of an export's time.
    traced_once = functools.partial(tf.function, autograph=False)

    @traced_once
    def embed_pixels(pixel_values):
        return tf.math.l2_normalize(model.get_image_features(pixel_values), axis=-1)

    @traced_once
    def embed_tokens(tokens):
        return tf.math.l2_normalize(text_features(model, tokens), axis=-1)

    @traced_once
    def embed_image(image_bytes):
        return embed_pixels(images.pixel_values(image_bytes))

    @traced_once
    def embed_text(texts):
        return embed_tokens(tokenizer.encode(texts, padding="longest", max_length=max_length))

    def classify(image_bytes, labels):
        image_embeds = embed_image(image_bytes)  # (n, d)
        # A label that occurs in several rows is encoded once.
        unique, index = tf.unique(tf.reshape(labels, [-1]))
        cosines = tf.matmul(image_embeds, embed_text(unique), transpose_b=True)  # (n, unique)
        own = tf.reshape(index, tf.shape(labels))
        logits = tf.gather(cosines, own, batch_dims=1) / model.temperature.value  # (n, m)
        if model.has_logit_bias:
            logits += model.logit_bias.value
        none = tf.equal(labels, "") | _server_padding(own)
        logits = tf.where(none, NO_LABEL_LOGIT, logits)
        probs = tf.where(none, 0.0, tf.nn.softmax(logits))
        return {"logits": logits, "probs": probs}

    def embed_padded_tokens(input_ids, attention_mask, token_type_ids):
        # A text begins with [CLS] and never ends with it.
        padding = tf.equal(input_ids, tokenizer.cls_token_id) & _server_padding(input_ids)
        tokens = {
            "input_ids": input_ids,
            "attention_mask": tf.where(padding, 0, attention_mask),
            "token_type_ids": token_type_ids,
        }
        return {"text_embeds": embed_tokens(tokens)}

    def spec(name, shape, dtype=tf.string):
        return tf.TensorSpec(shape, dtype, name)

    # signature: (function, inputs)
    table = {
        "serving_default": (
            classify,
            (spec("image_bytes", [None]), spec("labels", [None, None])),
        ),
        "embed_image": (
            lambda image_bytes: {"image_embeds": embed_image(image_bytes)},
            (spec("image_bytes", [None]),),
        ),
        "embed_text": (
            lambda texts: {"text_embeds": embed_text(texts)},
            (spec("texts", [None]),),
        ),
        "embed_pixels": (
            lambda pixel_values: {"image_embeds": embed_pixels(pixel_values)},
            (spec("pixel_values", [None, None, None, 3], tf.float32),),
        ),
        "embed_tokens": (
            embed_padded_tokens,
            tuple(spec(name, [None, None], tf.int32) for name in TOKEN_INPUTS),
        ),
    }
    return {
        name: traced_once(function, input_signature=inputs).get_concrete_function()
        for name, (function, inputs) in table.items()
    }


def _server_padding(values: tf.Tensor) -> tf.Tensor:
    """Marks the end of each row, (n, m), as far as it repeats the row's first value.

    So look the rows of a short request that TensorFlow Serving merged with a longer one: it pads
    with the request's first value (batching_util.cc, PadTensor), not with "" or 0.
    """
    differs = tf.cast(tf.not_equal(values, values[:, :1]), tf.int32)
    differ_from_here = tf.cumsum(differs, axis=1, reverse=True)
    return tf.equal(differ_from_here, 0) & (tf.range(tf.shape(values)[1]) > 0)


def _write_extras(
    folder: pathlib.Path, model: AlignModel, processor: AlignProcessor, dtype: str
) -> None:
    folder.mkdir()
    metadata = {
        "align_tf_version": align_tf.__version__,
        "dtype": dtype,
        "image_mode": processor.image_processor.mode,
        "projection_dim": model.config.projection_dim,
    }
    (folder / METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n")
    image = tf.io.encode_jpeg(tf.zeros([64, 64, 3], tf.uint8)).numpy()
    size = model.config.vision_config.image_size
    tokens = tf.ones([1, 8], tf.int32)
    # signature: inputs
    requests = {
        "serving_default": {"image_bytes": [image], "labels": [["a cat", "a dog"]]},
        "embed_image": {"image_bytes": [image]},
        "embed_text": {"texts": ["a cat"]},
        "embed_pixels": {"pixel_values": tf.zeros([1, size, size, 3])},
        "embed_tokens": {
            "input_ids": tokens,
            "attention_mask": tokens,
            "token_type_ids": tokens * 0,
        },
    }
    with tf.io.TFRecordWriter(os.fspath(folder / WARMUP_NAME)) as writer:
        for signature, inputs in requests.items():
            writer.write(_prediction_log(signature, inputs))


def _prediction_log(signature: str, inputs: dict[str, Any]) -> bytes:
    """Encodes a PredictionLog of TensorFlow Serving, which the core install has no classes for.

    Numbers of the fields: tensorflow_serving/apis/{prediction_log,predict,model}.proto.
    """
    request = _field(1, _field(3, signature.encode()))  # model_spec.signature_name
    for name, value in inputs.items():
        tensor = tf.make_tensor_proto(value).SerializeToString()
        request += _field(2, _field(1, name.encode()) + _field(2, tensor))  # map entry of inputs
    return _field(6, _field(1, request))  # predict_log.request


def _field(number: int, payload: bytes) -> bytes:
    """Encodes one length-delimited protobuf field."""
    length, size = len(payload), b""
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + payload
