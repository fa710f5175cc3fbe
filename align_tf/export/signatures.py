"""The signatures of a SavedModel: raw bytes and strings, or tensors, to embeddings and classes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from align_tf.models.align import AlignModel
from align_tf.models.packing import text_features
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import TOKEN_INPUTS

# What an empty label gets for a logit, as it is none: the lowest float32, which JSON can hold.
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
        "embed_image": lambda image_bytes: {"image_embeds": embed.image(image_bytes)},
        "embed_text": lambda texts: {"text_embeds": embed.text(texts)},
        "embed_pixels": lambda pixel_values: {
            # A session takes any shape for an input; this op looks at it when it runs.
            "image_embeds": embed.pixels(tf.ensure_shape(pixel_values, size))
        },
        "embed_tokens": functools.partial(
            _embed_padded_tokens, embed, processor.tokenizer.cls_token_id
        ),
    }
    signatures = {}
    for name, function in functions.items():
        specs = [tf.TensorSpec(shape, dtype, key) for key, shape, dtype in inputs[name]]
        traced = _traced_once(function, input_signature=specs)
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
    own = tf.reshape(index, tf.shape(labels))
    logits = tf.matmul(image_embeds, embed.text(unique), transpose_b=True)  # (n, unique)
    logits /= model.temperature.value
    if model.has_logit_bias:
        logits += model.logit_bias.value
    logits = tf.where(unique == "", NO_LABEL_LOGIT, logits)
    # A label counts once, however often a row holds it: TensorFlow Serving pads the rows of a
    # short request with its first label (batching_util.cc, PadTensor), as a caller may repeat it.
    in_row = tf.math.bincount(
        own, minlength=tf.size(unique), maxlength=tf.size(unique), axis=-1, binary_output=True
    )
    probs = tf.nn.softmax(tf.where(in_row > 0, logits, NO_LABEL_LOGIT))
    probs = tf.where(unique == "", 0.0, probs)
    return {
        "logits": tf.gather(logits, own, batch_dims=1),
        "probs": tf.gather(probs, own, batch_dims=1),
    }


def _embed_padded_tokens(
    embed: _Embed,
    cls_token_id: int,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor,
    token_type_ids: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """Embeds token ids that a server may have padded with their request's first one."""
    # No text ends with [CLS]: where it is a request's first token, the end shows the padding.
    to_come = tf.cumsum(tf.cast(input_ids != cls_token_id, tf.int32), axis=1, reverse=True)
    padding = (to_come == 0) & (tf.range(tf.shape(input_ids)[1]) > 0)
    with tf.control_dependencies([_require_cls(cls_token_id, input_ids, attention_mask)]):
        attention_mask = tf.where(padding, 0, attention_mask)
    tokens = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
    }
    return {"text_embeds": embed.tokens(tokens)}


def _require_cls(
    cls_token_id: int, input_ids: tf.Tensor, attention_mask: tf.Tensor
) -> tf.Operation:
    """Refuses rows whose ends may be tokens as well as a server's padding.

    The first row of a request that was padded ends with what it begins with, attended to if that
    is. A row on its own was merged with no other.
    """
    rows, length = tf.unstack(tf.shape(input_ids))
    attended = attention_mask[:, :1] * attention_mask[:, -1:] != 0
    alike = (input_ids[:, :1] == input_ids[:, -1:]) & (input_ids[:, :1] != cls_token_id)
    unclear = tf.reduce_any(alike & attended, axis=1) & (rows > 1) & (length > 1)
    # One more, so that a batch of none has a first row too.
    row = tf.argmax(tf.cast(tf.pad(unclear, [[0, 1]]), tf.int32), output_type=tf.int32)
    message = tf.strings.join(
        [
            "input_ids[",
            tf.strings.as_string(row),
            f"]: begins and ends with one token that is not [CLS]: expected {cls_token_id} first",
        ]
    )
    return tf.debugging.Assert(~tf.reduce_any(unclear), [message])
