"""Export of the towers as LiteRT (TensorFlow Lite) files, for phones and other small machines."""

import json
import os
import tempfile
from collections.abc import Callable

import keras
import tensorflow as tf

from align_tf import addresses
from align_tf.export.matching import check_fit
from align_tf.export.temporary import put, temporary_folder
from align_tf.export.tower_files import check_quantize, examples, least_cosine, tower_settings
from align_tf.extras import extra
from align_tf.models.align import AlignModel
from align_tf.models.plain_copy import plain_copy
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import TOKEN_INPUTS
from align_tf.progress import track

IMAGE_TOWER, TEXT_TOWER = "image_tower.tflite", "text_tower.tflite"
SETTINGS_NAME = "litert.json"


def export_litert(
    model: AlignModel,
    processor: AlignProcessor,
    directory: str | os.PathLike,
    *,
    quantize: str | None = None,
    progress: bool = False,
) -> addresses.Place:
    """Writes the towers as LiteRT files, with what an app needs to feed them.

    They hold built-in operations alone, so that any LiteRT runtime reads them. Batch and length
    may be resized; a row does not depend on another, nor on padding.

        file                 signature     inputs                              output
        image_tower.tflite   embed_pixels  pixel_values float32 (n, h, w, 3)   image_embeds (n, d)
        text_tower.tflite    embed_tokens  input_ids, attention_mask,
                                           token_type_ids int32 (n, t)         text_embeds (n, d)

    The embeddings have unit length. Beside the towers are the processor's files and
    `litert.json`: the temperature that cosines are divided by, `height` and `width` of an image,
    `scale` and `offset` of each channel, by which the levels 0..255 become `pixel_values`, and
    the longest text that the text tower takes.

    Args:
        model: the model; its towers are written in float32 whatever it was trained in, with LoRA
            merged and what Keras quantized as floating point: `quantize` is of its own.
        processor: its processor.
        directory: made if it is not there; files of the same names in it are replaced, once all
            of the new ones are written.
        quantize: `int8` stores weights as int8, a quarter of the size, and has activations
            rounded while the towers run: `compare_litert` says what that costs a model. None
            keeps float32.
        progress: show it on stderr.

    Returns:
        The directory.

    Raises:
        FileExistsError: a file is in the place of the directory.
        ValueError: quantize is neither, Keras runs on another backend than TensorFlow, model and
            processor do not fit each other, or the model cannot be copied: see `plain_copy`.
    """
    check_quantize(quantize)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "LiteRT export runs on Keras's TensorFlow backend alone: save the model, then "
            "align-tf export --format litert --model FOLDER"
        )
    check_fit(model, processor)
    directory = addresses.place(directory)
    with temporary_folder(directory, "litert") as new:
        towers = _towers(plain_copy(model, "float32"), processor)
        for row in track(towers, "Converting", show=progress):
            file, signature, function, inputs, weights = row
            content = _convert(signature, function, inputs, weights, quantize)
            (new / file).write_bytes(content)
        processor.save_pretrained(new)
        settings = json.dumps(tower_settings(model, processor, quantize), indent=2)
        (new / SETTINGS_NAME).write_text(settings + "\n")
        for path in new.iterdir():
            put(path, directory / path.name)
    return directory


def _towers(model: AlignModel, processor: AlignProcessor) -> list[tuple]:
    """Returns file, signature, function, inputs and weights of each tower."""

    def embed_pixels(pixel_values):
        features = model.get_image_features(pixel_values)
        return {"image_embeds": tf.math.l2_normalize(features, axis=-1)}

    def embed_tokens(**tokens):
        return {"text_embeds": tf.math.l2_normalize(model.get_text_features(tokens), axis=-1)}

    shape = [None, *processor.image_processor.output_shape]
    pixels = {"pixel_values": tf.TensorSpec(shape, tf.float32)}
    tokens = {name: tf.TensorSpec([None, None], tf.int32) for name in TOKEN_INPUTS}
    image_weights, text_weights = model.vision_model.weights, model.text_model.weights
    if model.config.image_projection:
        image_weights = image_weights + model.image_projection.weights
    text_weights = text_weights + model.text_projection.weights
    return [
        (IMAGE_TOWER, "embed_pixels", embed_pixels, pixels, image_weights),
        (TEXT_TOWER, "embed_tokens", embed_tokens, tokens, text_weights),
    ]


def _convert(
    signature: str,
    function: Callable,
    inputs: dict[str, tf.TensorSpec],
    weights: list,
    quantize: str | None,
) -> bytes:
    # By way of a SavedModel: it has the converter take variables for constants, so that it folds
    # BatchNorm into the convolutions, and needs a third of the memory of freezing them here.
    module = tf.Module()
    module.weights = [weight.value for weight in weights]
    graph = tf.function(function, autograph=False).get_concrete_function(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={signature: graph})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[signature])
        if quantize:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        return converter.convert()


def compare_litert(
    directory: str | os.PathLike, model: AlignModel, processor: AlignProcessor
) -> dict[str, dict[str, float]]:
    """Compares the written towers, in ai-edge-litert, with the model they were written from.

    The inputs are align-tiny's example pictures and their names.

    Args:
        directory: what `export_litert` wrote.
        model: the model.
        processor: its processor.

    Returns:
        For each file its size, `bytes`, and `cosine`, the least one between an embedding of the
        tower and the model's.

    Raises:
        ModuleNotFoundError: ai-edge-litert is not installed.
    """
    with extra("litert", "running LiteRT files needs ai-edge-litert"):
        from ai_edge_litert import interpreter

    inputs, expected = examples(model, processor)
    pixels = {"pixel_values": inputs["pixel_values"]}
    tokens = {name: inputs[name] for name in TOKEN_INPUTS}
    figures = {}
    # file, inputs, output
    for file, values, output in (
        (IMAGE_TOWER, pixels, "image_embeds"),
        (TEXT_TOWER, tokens, "text_embeds"),
    ):
        with addresses.fetched(addresses.place(directory) / file) as path:
            runner = interpreter.Interpreter(os.fspath(path)).get_signature_runner()
            cosine = least_cosine(runner(**values)[output], expected[output])
            figures[file] = {"bytes": path.stat().st_size, "cosine": cosine}
    return figures
