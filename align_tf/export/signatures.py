"""The signatures of a SavedModel: raw bytes and strings, or tensors, to embeddings and classes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from align_tf.export.requirements import (
    require,
    require_cls,
    require_ids,
    require_pixels,
    require_tokens,
)
from align_tf.models.align import AlignModel
from align_tf.models.packing import text_features
from align_tf.preprocessing.apart import functions_apart
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import TOKEN_INPUTS

# What an empty label gets for a logit, as it is none: the lowest float32, which JSON can hold.
NO_LABEL_LOGIT = tf.float32.min

# How much of a request goes through the towers at once, whatever it holds.
IMAGES_AT_ONCE, TEXTS_AT_ONCE = 64, 256
SCORES_AT_ONCE = 2**20  # that a head gives the pairs of tokens of those texts
LOGITS_AT_ONCE = 2**22  # of those images

# What several signatures call is traced once: tracing is most of an export's time.
_traced_once = functools.partial(tf.function, autograph=False)


class _Embed(NamedTuple):
    """What the signatures call, each (n, d), of unit length."""

    image: Callable  # of the number of the first row, and image_bytes of IMAGES_AT_ONCE at most
    images: Callable  # of image_bytes
    pixels: Callable  # of pixel_values
    tokens: Callable  # of TOKEN_INPUTS
    text: Callable  # of strings


def make_signatures(model: AlignModel, processor: AlignProcessor) -> dict[str, Any]:
    """Traces the signatures of a model, by name; see `export_saved_model`."""
    embed = _embed(model, processor)
    # Of one size: a server that merges requests pads what a signature leaves open.
    size = [None, *processor.image_processor.output_shape]
    images = ("image_bytes", [None], tf.string)
    # signature: its inputs: name, shape, dtype
    inputs = {
        "serving_default": [images, ("labels", [None, None], tf.string)],
        "embed_image": [images],
        "embed_text": [("texts", [None], tf.string)],
        "embed_pixels": [("pixel_values", size, tf.float32)],
        "embed_tokens": [(name, [None, None], tf.int32) for name in TOKEN_INPUTS],
    }
    functions = {
        "serving_default": functools.partial(_classify, model, embed),
        "embed_image": lambda image_bytes: {"image_embeds": embed.images(image_bytes)},
        "embed_text": lambda texts: {"text_embeds": embed.text(texts)},
        "embed_pixels": functools.partial(_embed_pixels, embed),
        "embed_tokens": functools.partial(_embed_padded_tokens, model, processor, embed),
    }
    signatures = {}
    for name, function in functions.items():
        specs = [tf.TensorSpec(shape, dtype, key) for key, shape, dtype in inputs[name]]
        traced = _traced_once(_of_shapes(function, specs), input_signature=specs)
        with functions_apart():  # else each signature optimises them anew, at its first request
            signatures[name] = traced.get_concrete_function()
    return signatures


def _of_shapes(function: Callable, specs: Sequence[tf.TensorSpec]) -> Callable:
    """Has a signature look at the shapes of its inputs when it runs: a session takes any."""

    def checked(*inputs):
        pairs = zip(inputs, specs, strict=True)
        return function(*(tf.ensure_shape(value, spec.shape) for value, spec in pairs))

    return checked


def _embed(model: AlignModel, processor: AlignProcessor) -> _Embed:
    tokenizer = processor.tokenizer
    max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def embeds_in_chunks(function, inputs, at_once):
        width = model.config.projection_dim
        return _in_chunks(lambda *chunk: [function(*chunk)], inputs, at_once, [width])[0]

    @_traced_once
    def image_tower(pixel_values):
        return tf.math.l2_normalize(model.get_image_features(pixel_values), axis=-1)

    @_traced_once
    def text_tower(*tokens):
        features = text_features(model, dict(zip(TOKEN_INPUTS, tokens, strict=True)))
        return tf.math.l2_normalize(features, axis=-1)

    def image(first, image_bytes):
        return image_tower(processor.image_processor.pixel_values(image_bytes, first))

    def pixels(pixel_values):
        return embeds_in_chunks(lambda _, x: image_tower(x), [pixel_values], IMAGES_AT_ONCE)

    @_traced_once
    def tokens(*tokens):
        length = tf.shape(tokens[0])[1]
        at_once = tf.clip_by_value(
            SCORES_AT_ONCE // tf.maximum(length * length, 1), 1, TEXTS_AT_ONCE
        )
        return embeds_in_chunks(lambda _, *x: text_tower(*x), tokens, at_once)

    def images(image_bytes):
        return embeds_in_chunks(image, [image_bytes], IMAGES_AT_ONCE)

    # As a rule no text is so long that fewer than TEXTS_AT_ONCE go at once: one loop, not two.
    short = max_length**2 * TEXTS_AT_ONCE <= SCORES_AT_ONCE

    def some_texts(_, texts):
        encoded = tokenizer.encode(texts, padding="longest", max_length=max_length)
        return (text_tower if short else tokens)(*(encoded[name] for name in TOKEN_INPUTS))

    @_traced_once
    def text(texts):
        return embeds_in_chunks(some_texts, [texts], TEXTS_AT_ONCE)

    return _Embed(image, images, pixels, tokens, text)


def _in_chunks(
    function: Callable,
    inputs: Sequence[tf.Tensor],
    at_once: int | tf.Tensor,
    widths: Sequence[int | tf.Tensor],
) -> list[tf.Tensor]:
    """Takes the rows of tensors through a function, so many at a time.

    Args:
        function: takes the number of its first row, and some rows of each input; returns
            float32 (rows, width) for each width.
        inputs: tensors of as many rows each, which may be none.
        at_once: rows at a time.
        widths: of its outputs.

    Returns:
        The outputs of all rows.
    """
    rows = tf.shape(inputs[0])[0]
    chunks = (rows + at_once - 1) // at_once
    arrays = [
        tf.TensorArray(tf.float32, chunks, element_shape=[None], infer_shape=False) for _ in widths
    ]

    def step(chunk, *arrays):
        first = chunk * at_once
        outputs = function(first, *(tensor[first : first + at_once] for tensor in inputs))
        written = (
            array.write(chunk, tf.reshape(output, [-1]))
            for array, output in zip(arrays, outputs, strict=True)
        )
        return chunk + 1, *written

    _, *arrays = tf.while_loop(
        lambda chunk, *_: chunk < chunks, step, (0, *arrays), parallel_iterations=1
    )
    return [
        tf.reshape(array.concat(), [rows, width])
        for array, width in zip(arrays, widths, strict=True)
    ]


def _embed_pixels(embed: _Embed, pixel_values: tf.Tensor) -> dict[str, tf.Tensor]:
    with tf.control_dependencies([require_pixels(pixel_values)]):
        return {"image_embeds": embed.pixels(tf.identity(pixel_values))}


def _classify(
    model: AlignModel, embed: _Embed, image_bytes: tf.Tensor, labels: tf.Tensor
) -> dict[str, tf.Tensor]:
    images, (rows, columns) = tf.shape(image_bytes)[0], tf.unstack(tf.shape(labels))
    fit = require(rows == images, "labels: expected a row for each of image_bytes", rows, images)
    with tf.control_dependencies([fit]):
        # A label that occurs in several rows is encoded once.
        unique, index = tf.unique(tf.reshape(labels, [-1]))
    own = tf.reshape(index, tf.shape(labels))
    text_embeds = embed.text(unique)
    count = tf.size(unique)

    def some_rows(first, image_bytes, own):
        logits = tf.matmul(embed.image(first, image_bytes), text_embeds, transpose_b=True)
        logits /= model.temperature.value
        if model.has_logit_bias:
            logits += model.logit_bias.value
        logits = tf.where(unique == "", NO_LABEL_LOGIT, logits)
        # A label counts once, however often a row holds it: TensorFlow Serving pads the rows of a
        # short request with its first label (batching_util.cc, PadTensor), as a caller may
        # repeat it.
        in_row = tf.math.bincount(
            own, minlength=count, maxlength=count, axis=-1, binary_output=True
        )
        probs = tf.nn.softmax(tf.where(in_row > 0, logits, NO_LABEL_LOGIT))
        probs = tf.where(unique == "", 0.0, probs)
        return [tf.gather(values, own, batch_dims=1) for values in (logits, probs)]

    at_once = tf.clip_by_value(LOGITS_AT_ONCE // tf.maximum(count, 1), 1, IMAGES_AT_ONCE)
    logits, probs = _in_chunks(some_rows, [image_bytes, own], at_once, [columns, columns])
    return {"logits": logits, "probs": probs}


def _embed_padded_tokens(
    model: AlignModel,
    processor: AlignProcessor,
    embed: _Embed,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor,
    token_type_ids: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """Embeds token ids that a server may have padded with their request's first one."""
    config, cls_token_id = model.config.text_config, processor.tokenizer.cls_token_id
    named = dict(zip(TOKEN_INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
    with tf.control_dependencies(require_tokens(named, config.max_position_embeddings)):
        named = {name: tf.identity(value) for name, value in named.items()}
    input_ids, attention_mask, token_type_ids = named.values()
    # No text ends with [CLS]: where it is a request's first token, the end shows the padding.
    to_come = tf.cumsum(tf.cast(input_ids != cls_token_id, tf.int32), axis=1, reverse=True)
    padding = (to_come == 0) & (tf.range(tf.shape(input_ids)[1]) > 0)
    requirements = [
        require_ids("input_ids", input_ids, config.vocab_size),
        require_ids("token_type_ids", token_type_ids, config.type_vocab_size),
        require_cls(cls_token_id, input_ids, attention_mask),
    ]
    with tf.control_dependencies(requirements):
        attention_mask = tf.where(padding, 0, attention_mask)
    return {"text_embeds": embed.tokens(input_ids, attention_mask, token_type_ids)}
