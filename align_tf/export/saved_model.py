"""Export of a model and its processor as a SavedModel that takes raw bytes and strings."""

import json
import numbers
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import keras
import tensorflow as tf

import align_tf
from align_tf import addresses
from align_tf.export.matching import check_fit
from align_tf.export.signatures import make_signatures
from align_tf.export.temporary import put, temporary_folder
from align_tf.models.align import AlignModel
from align_tf.models.inference_copy import inference_copy
from align_tf.models.plain_copy import check_configured
from align_tf.preprocessing.processor import AlignProcessor

WARMUP_NAME = "tf_serving_warmup_requests"
METADATA_NAME = "align_tf.json"
# Outside TensorFlow Serving, whose image has them, the tokenizer's operations are to be registered.
TO_LOAD = "import tensorflow_text before tf.saved_model.load(folder)"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
VERSION_END = 2**63  # a server takes no number from here on

# What a process on the TensorFlow backend does for another backend, and how it ends where the model
# cannot be had so, which it then says.
REFUSED = 3
EXPORT = f"""
import sys
from align_tf import AlignModel, AlignProcessor, export_saved_model

folder, dtype, directory, version = sys.argv[1:]
model, processor = AlignModel.from_pretrained(folder), AlignProcessor.from_pretrained(folder)
try:
    export_saved_model(model, processor, directory, version=int(version), dtype=dtype)
except ValueError as error:
    print(error)
    sys.exit({REFUSED})
"""


def export_saved_model(
    model: AlignModel,
    processor: AlignProcessor,
    directory: str | os.PathLike,
    *,
    version: int | None = None,
    dtype: str | None = None,
) -> addresses.Place:
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
        model: the model; its outputs are float32 whatever it was trained in. LoRA is merged into
            the weights. Of what Keras quantized to int8 or int4 the weights are written in
            floating point; inputs are not rounded, as Keras does in int8: embeddings are close
            to the model's, not equal (see `inference_copy`).
        processor: the processor; its image and text settings go into the graph.
        directory: the model's folder, which holds one numbered folder for each version.
        version: the version to write; None takes the next number.
        dtype: of weights and activations, `float32`, `bfloat16` or `float16`; None takes the one
            that the model computes in. Inputs and outputs are float32 whatever it is.

    Returns:
        The version's folder.

    Raises:
        RuntimeError: the process on TensorFlow failed; the message is its own.
        FileExistsError: that version is there already, or a file in the place of the directory.
        ValueError: version is none that a server takes, dtype is none of those, model and processor
            do not fit each other, or the model cannot be copied: a weight is NaN or more than
            the dtype can hold, a layer is quantized to another thing, or computes what the
            configuration does not say.
    """
    check_fit(model, processor)
    dtype = _dtype_name(model.dtype_policy.compute_dtype if dtype is None else dtype)
    directory = addresses.place(directory)
    there = _versions(directory)
    version = max(there, default=0) + 1 if version is None else version
    whole_number = isinstance(version, numbers.Integral) and not isinstance(version, bool)
    if not whole_number or not 1 <= version < VERSION_END:
        raise ValueError(f"version={version!r}: expected a whole number, at least 1, of 63 bits")
    if version in there:
        raise FileExistsError(f"{directory / there[version]}: this version is there already")
    target = directory / str(version)
    if keras.backend.backend() != "tensorflow":
        check_configured(model)
        _export_in_tensorflow(model, processor, directory, version, dtype)
        return target

    # A server scans for numbered folders, so it sees the version only when it is whole.
    with temporary_folder(directory, str(version)) as temporary:
        model = inference_copy(model, dtype)
        signatures = make_signatures(model, processor)
        module = tf.Module()
        module.weights = [weight.value for weight in model.weights]
        whole = temporary / target.name
        tf.saved_model.save(module, os.fspath(whole), signatures=signatures)
        _write_extras(whole / "assets.extra", model, processor, dtype)
        put(whole, target, last="saved_model.pb")
    return target


def _export_in_tensorflow(
    model: AlignModel,
    processor: AlignProcessor,
    directory: addresses.Place,
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
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == REFUSED:
        raise ValueError(done.stdout.strip())
    if done.returncode:
        raise RuntimeError(f"export on TensorFlow failed:\n{done.stderr[-2000:]}")


def _dtype_name(dtype: Any) -> str:
    """Returns the name of a dtype, given as Keras takes it."""
    try:
        name = keras.backend.standardize_dtype(dtype)
    except (TypeError, ValueError):
        name = ""
    if name not in EXPORT_DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(EXPORT_DTYPES)}")
    return name


def _versions(directory: addresses.Place) -> dict[int, str]:
    """Returns the names in a folder that a server takes for a version, as 3 or 003, by number."""
    numbered = (name for name in addresses.names(directory) if name.isascii() and name.isdecimal())
    return {int(name): name for name in numbered if int(name) < VERSION_END}


def _write_extras(
    folder: pathlib.Path, model: AlignModel, processor: AlignProcessor, dtype: str
) -> None:
    folder.mkdir()
    metadata = {
        "align_tf_version": align_tf.__version__,
        "dtype": dtype,
        "image_mode": processor.image_processor.mode,
        "projection_dim": model.config.projection_dim,
        "to_load": TO_LOAD,
    }
    (folder / METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n")
    image = tf.io.encode_jpeg(tf.zeros([64, 64, 3], tf.uint8)).numpy()
    height, width, channels = processor.image_processor.output_shape
    default = model.config.vision_config.image_size  # where each image keeps its own size
    pixels = tf.zeros([1, height or default, width or default, channels])
    tokens = tf.ones([1, min(8, model.config.text_config.max_position_embeddings)], tf.int32)
    # signature: inputs
    requests = {
        "serving_default": {"image_bytes": [image], "labels": [["a cat", "a dog"]]},
        "embed_image": {"image_bytes": [image]},
        "embed_text": {"texts": ["a cat"]},
        "embed_pixels": {"pixel_values": pixels},
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
