"""The signatures of a SavedModel: raw bytes and strings, or tensors, to embeddings and classes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from align_tf.models.align import AlignModel
from align_tf.models.packing import text_features
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import TOKEN_INPUTS

# signature: its inputs: name, shape, dtype
INPUTS = {
    "serving_default": (
        ("image_bytes", [None], tf.string),
        ("labels", [None, None], tf.string),
    ),
    "embed_image": (("image_bytes", [None], tf.string),),
    "embed_text": (("texts", [None], tf.string),),
    "embed_pixels": (("pixel_values", [None, None, None, 3], tf.float32),),
    "embed_tokens": tuple((name, [None, None], tf.int32) for name in TOKEN_INPUTS),
}

# What a label that is none gets for a logit, an empty one or one that pads a short list: the lowest
# float32, so that a softmax over the row agrees with `probs`, and JSON can hold it.
NO_LABEL_LOGIT = tf.float32.min

# What several signatures call is traced once: tracing is most of an export's time.
_traced_once = functools.partial(tf.function, autograph=False)


class _Embed(NamedTuple):
    """What the signatures call, each (n, d), of unit length."""

    pixels: Callable  # of pixel_values
    tokens: Callable  # of a dict of TOKEN_INPUTS
    image: Callable  # of image_bytes
    text: Callable  # of strings


def make_signatures(model: AlignModel, processor: AlignProcessor) -> dict[str, Any]:
    """Traces the signatures of a model, by name; see `export_saved_model`."""
    embed = _embed(model, processor)
    functions = {
        "serving_default": functools.partial(_classify, model, embed),
        "embed_image": lambda image_bytes: {"image_embeds": embed.image(image_bytes)},
        "embed_text": lambda texts: {"text_embeds": embed.text(texts)},
        "embed_pixels": lambda pixel_values: {"image_embeds": embed.pixels(pixel_values)},
        "embed_tokens": functools.partial(
            _embed_padded_tokens, embed, processor.tokenizer.cls_token_id
        ),
    }
    signatures = {}
    for name, inputs in INPUTS.items():
        specs = [tf.TensorSpec(shape, dtype, input_name) for input_name, shape, dtype in inputs]
        traced = _traced_once(functions[name], input_signature=specs)
        signatures[name] = traced.get_concrete_function()
    return signatures


def _embed(model: AlignModel, processor: AlignProcessor) -> _Embed:
    images, tokenizer = processor.image_processor, processor.tokenizer
    max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    @_traced_once
    def pixels(pixel_values):
        return tf.math.l2_normalize(model.get_image_features(pixel_values), axis=-1)

    @_traced_once
    def tokens(tokens):
        return tf.math.l2_normalize(text_features(model, tokens), axis=-1)

    @_traced_once
    def image(image_bytes):
        return pixels(images.pixel_values(image_bytes))

    @_traced_once
    def text(texts):
        return tokens(tokenizer.encode(texts, padding="longest", max_length=max_length))

    return _Embed(pixels, tokens, image, text)


def _classify(
    model: AlignModel, embed: _Embed, image_bytes: tf.Tensor, labels: tf.Tensor
) -> dict[str, tf.Tensor]:
    image_embeds = embed.image(image_bytes)  # (n, d)
    # A label that occurs in several rows is encoded once.
    unique, index = tf.unique(tf.reshape(labels, [-1]))
    cosines = tf.matmul(image_embeds, embed.text(unique), transpose_b=True)  # (n, unique)
    own = tf.reshape(index, tf.shape(labels))
    logits = tf.gather(cosines, own, batch_dims=1) / model.temperature.value  # (n, m)
    if model.has_logit_bias:
        logits += model.logit_bias.value
    none = tf.equal(labels, "") | _server_padding(own)
    logits = tf.where(none, NO_LABEL_LOGIT, logits)
    probs = tf.where(none, 0.0, tf.nn.softmax(logits))
    return {"logits": logits, "probs": probs}


def _embed_padded_tokens(
    embed: _Embed,
    cls_token_id: int,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor,
    token_type_ids: tf.Tensor,
) -> dict[str, tf.Tensor]:
    # A text begins with [CLS] and never ends with it.
    padding = tf.equal(input_ids, cls_token_id) & _server_padding(input_ids)
    tokens = {
        "input_ids": input_ids,
        "attention_mask": tf.where(padding, 0, attention_mask),
        "token_type_ids": token_type_ids,
    }
    return {"text_embeds": embed.tokens(tokens)}


def _server_padding(values: tf.Tensor) -> tf.Tensor:
    """Marks the end of each row, (n, m), as far as it repeats the row's first value.

    So look the rows of a short request that TensorFlow Serving merged with a longer one: it pads
    with the request's first value (batching_util.cc, PadTensor), not with "" or 0.
    """
    differs = tf.cast(tf.not_equal(values, values[:, :1]), tf.int32)
    differ_from_here = tf.cumsum(differs, axis=1, reverse=True)
    return tf.equal(differ_from_here, 0) & (tf.range(tf.shape(values)[1]) > 0)
