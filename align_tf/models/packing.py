"""The text tower without the padding, for inference on TensorFlow: all texts' tokens in one row."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from align_tf.models.align import AlignModel
from align_tf.models.bert import EncoderLayer, SelfAttention
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
    # What lies where is the same in all blocks of as many heads.
    into = functools.cache(functools.partial(_into_heads, place))
    into_joined = functools.cache(functools.partial(_into_joined_heads, place))
    out_of = functools.cache(functools.partial(_out_of_heads, position, tf.shape(mask)[1]))
    *blocks, last = tower.blocks
    for block in blocks:
        attention, heads = block.attention, block.attention.num_heads
        if hasattr(attention.project, "joined"):  # one gather for three
            joined = _in_heads(attention, attention.project.joined(x), into_joined(heads))
            query, key, value = (joined[part] for part in range(3))
        else:
            projected = attention.project(x, x)
            query, key, value = (_in_heads(attention, rows, into(heads)) for rows in projected)
        attended, _ = attention.attend(query, key, value, mask[:, None, None])
        attended = _in_a_row(attended, out_of(heads))
        x = block.after_attention(x, attention.output_dense(attended))
    return _first_states(last, x, place, mask, into)


def _first_states(
    block: EncoderLayer, x: tf.Tensor, place: tf.Tensor, mask: tf.Tensor, into: Callable
) -> tf.Tensor:
    """Runs the last block, in which the first token of each text alone asks."""
    attention, heads = block.attention, block.attention.num_heads
    first = tf.gather(x, place[:, 0])  # (n, hidden_size)
    query, key, value = attention.project(first, x)
    query = tf.reshape(query, [-1, heads, 1, attention.config.head_size])
    key, value = (_in_heads(attention, rows, into(heads)) for rows in (key, value))
    attended, _ = attention.attend(query, key, value, mask[:, None, None])
    attended = tf.reshape(attended, [-1, heads * attention.config.head_size])
    return block.after_attention(first, attention.output_dense(attended))


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


def _into_heads(place: tf.Tensor, heads: int) -> tf.Tensor:
    """Says where the parts of a head lie in rows (m * heads, head_size), int (n, heads, t)."""
    return place[:, None] * heads + tf.range(heads)[:, None]


def _out_of_heads(position: tf.Tensor, length: tf.Tensor, heads: int) -> tf.Tensor:
    """Says where the heads of a place lie in rows (n * heads * t, head_size), int (m, heads)."""
    text, column = position // length, position % length
    return (text[:, None] * heads + tf.range(heads)) * length + column[:, None]


def _into_joined_heads(place: tf.Tensor, heads: int) -> tf.Tensor:
    """As `_into_heads` of query, key and value side by side, int (3, n, heads, t)."""
    parts = tf.reshape(tf.range(3 * heads), [3, 1, heads, 1])
    return place[:, None] * (3 * heads) + parts


def _in_heads(attention: SelfAttention, rows: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Takes a row (m, heads * head_size) to (n, heads, t, head_size)."""
    return tf.gather(tf.reshape(rows, [-1, attention.config.head_size]), index)


def _in_a_row(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Takes (n, heads, t, head_size) back to a row (m, heads * head_size)."""
    heads, size = x.shape[1], x.shape[3]
    return tf.reshape(tf.gather(tf.reshape(x, [-1, size]), index), [-1, heads * size])
