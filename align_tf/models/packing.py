"""The text tower without the padding, for inference on TensorFlow: all texts' tokens in one row."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from align_tf.models.align import AlignModel
from align_tf.models.bert import SelfAttention
from align_tf.models.text import AlignTextModel

# The row is rounded up to a multiple of so many tokens: kernels are prepared for each length of it.
MULTIPLE = 16


def text_features(model: AlignModel, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Embeds texts as `AlignModel.get_text_features` does, all but attention over tokens alone.

    Args:
        model: the model.
        inputs: `input_ids`, and `attention_mask` and `token_type_ids` where there are, int (n, t).

    Returns:
        (n, projection_dim), float32, before normalisation.

    Raises:
        ValueError: t is known to be more than max_position_embeddings.
    """
    return model.text_projection(_first_token_states(model.text_model, **inputs))


def _first_token_states(
    tower: AlignTextModel, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None
) -> tf.Tensor:
    tower._check_inputs(input_ids)
    mask = tf.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = tf.cast(mask, tf.bool)
    place, position = _pack(mask)
    column = position % tf.shape(mask)[1]
    tokens = {
        name: tf.gather(tf.reshape(ids, [-1]), position)[None]
        for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids))
        if ids is not None
    }
    x = tower.embeddings(**tokens, position_ids=column[None])[0]  # (m, hidden_size)
    for block in tower.blocks:
        attention = block.attention
        inputs, places = x, (place, place, place)
        if block is tower.blocks[-1]:
            x = tf.gather(x, place[:, 0])  # (n, hidden_size)
            position = tf.range(tf.shape(x)[0])
            places = (position[:, None], place, place)
        projected = zip(attention.project(x, inputs), places, strict=True)
        query, key, value = (_in_heads(attention, rows, where) for rows, where in projected)
        attended, _ = attention.attend(query, key, value, mask[:, None, None])
        x = block.after_attention(x, attention.output_dense(_out_of_heads(attended, position)))
    return x


def _pack(mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts the tokens in one row.

    Args:
        mask: bool (n, t), what to attend to.

    Returns:
        The place in the row of each token, int (n, t), of one that is left out some other's; and
        the position in the flattened mask of what is at each place, int (m,).
    """
    # The first token has a state though it be masked; without any token all are attended to alike.
    kept = mask | (tf.range(tf.shape(mask)[1]) == 0) | ~tf.reduce_any(mask, axis=1, keepdims=True)
    flat = tf.reshape(kept, [-1])
    place = tf.reshape(tf.cumsum(tf.cast(flat, tf.int32)) - 1, tf.shape(mask))
    position = tf.cast(tf.where(flat)[:, 0], tf.int32)
    return place, tf.pad(position, [[0, -tf.size(position) % MULTIPLE]])


def _in_heads(attention: SelfAttention, projected: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
    """Takes what is at `place` of a row (m, heads * head_size) to (n, heads, t, head_size)."""
    rows = tf.reshape(projected, [-1, attention.config.head_size])  # (m * heads, head_size)
    heads = attention.num_heads
    return tf.gather(rows, place[:, None] * heads + tf.range(heads)[:, None])


def _out_of_heads(x: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """Takes (n, heads, t, head_size) back to a row (m, heads * head_size)."""
    heads, length, size = x.shape[1], tf.shape(x)[2], x.shape[3]
    text, column = position // length, position % length
    index = (text[:, None] * heads + tf.range(heads)) * length + column[:, None]  # (m, heads)
    return tf.reshape(tf.gather(tf.reshape(x, [-1, size]), index), [-1, heads * size])
