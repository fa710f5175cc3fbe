"""What a signature asks of the values that it is given; an error names the input, and the row."""

from collections.abc import Mapping

import tensorflow as tf

from align_tf.models.inputs import LARGEST_PIXEL


def require(fine: tf.Tensor, message: str, *found: tf.Tensor) -> tf.Operation:
    """Refuses a request, with INVALID_ARGUMENT, unless it is fine."""
    return tf.debugging.Assert(fine, [message, *found])


def require_pixels(pixel_values: tf.Tensor) -> tf.Operation:
    """Refuses what no processor gives, as the model does: NaN, infinities, levels of 0..255."""
    fine = tf.reduce_all(tf.abs(pixel_values) <= LARGEST_PIXEL, axis=[1, 2, 3])
    expected = f"numbers from -{LARGEST_PIXEL:g} to {LARGEST_PIXEL:g}, as the processor gives them"
    return _require_rows(fine, "pixel_values", f": expected {expected}")


def require_tokens(named: Mapping[str, tf.Tensor], most: int) -> list[tf.Operation]:
    """Refuses inputs of different shapes, texts without a token, and those of too many."""
    (first, input_ids), *others = named.items()
    shape = tf.shape(input_ids)
    rows, length = tf.unstack(shape)
    same = [
        require(
            tf.reduce_all(tf.shape(value) == shape),
            f"{name}: expected the shape of {first}; found this and that:",
            tf.shape(value),
            shape,
        )
        for name, value in others
    ]
    fits = (length <= most) & ((length > 0) | (rows == 0))
    return [*same, require(fits, f"{first}: expected 1 to {most} tokens, found", length)]


def require_ids(name: str, ids: tf.Tensor, end: int) -> tf.Operation:
    """Refuses ids that are not in the table: a negative one would count from its end."""
    fine = tf.reduce_all((ids >= 0) & (ids < end), axis=1)
    return _require_rows(fine, name, f": expected ids from 0 to {end - 1}")


def require_cls(cls_token_id: int, input_ids: tf.Tensor, attention_mask: tf.Tensor) -> tf.Operation:
    """Refuses rows whose ends may be tokens as well as a server's padding.

    The first row of a request that was padded ends with what it begins with, attended to if that
    is. A row on its own was merged with no other.
    """
    rows, length = tf.unstack(tf.shape(input_ids))
    attended = (attention_mask[:, :1] != 0) & (attention_mask[:, -1:] != 0)
    alike = (input_ids[:, :1] == input_ids[:, -1:]) & (input_ids[:, :1] != cls_token_id)
    unclear = tf.reduce_any(alike & attended, axis=1) & (rows > 1) & (length > 1)
    reason = f": begins and ends with one token that is not [CLS]: expected {cls_token_id} first"
    return _require_rows(~unclear, "input_ids", reason)


def _require_rows(fine: tf.Tensor, name: str, reason: str) -> tf.Operation:
    """Refuses a request one of whose rows is not fine, by the first of them."""
    # One more, so that a batch of none has a first row too.
    row = tf.argmax(tf.cast(tf.pad(~fine, [[0, 1]]), tf.int32), output_type=tf.int32)
    message = tf.strings.join([f"{name}[", tf.strings.as_string(row), f"]{reason}"])
    return tf.debugging.Assert(tf.reduce_all(fine), [message])
