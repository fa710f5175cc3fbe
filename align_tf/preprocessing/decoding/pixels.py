"""Decoding that no file makes fail, on pixels or none, and in bands that bound the memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

BAND_PIXELS = 1 << 20  # of an image, computed at a time
BLANK = np.zeros([0, 0, 3], np.uint8)


def decode_stock(image_bytes: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def attempt(decode: Callable, image_bytes: tf.Tensor, failed: Any = BLANK) -> Any:
    """Returns decode(image_bytes), or what stands for its failure.

    A data set can leave out what fails, where an operation would end the graph. It is set up
    anew with each call, so that it should hold few operations.
    """
    rows = tf.data.Dataset.from_tensors(image_bytes).map(decode).ignore_errors()
    return rows.concatenate(tf.data.Dataset.from_tensors(failed)).take(1).get_single_element()


def decode_where(condition: tf.Tensor, decode: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Decodes if a condition holds; otherwise there are no pixels."""
    return tf.cond(
        condition,
        lambda: tf.ensure_shape(decode(), [None, None, 3]),
        lambda: tf.ensure_shape(BLANK, [None, None, 3]),
    )


def in_bands(function: Callable[..., tf.Tensor], length: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Joins function(start, stop), uint8 (?, ?), over bands of an axis, to bound the memory."""
    band = tf.maximum(BAND_PIXELS // other, 1)
    count = (length + band - 1) // band
    results = tf.TensorArray(tf.uint8, count, infer_shape=False, element_shape=[None, None])
    _, results = tf.while_loop(
        lambda i, _: i < count,
        lambda i, results: (i + 1, results.write(i, function(i * band, (i + 1) * band))),
        (0, results),
        parallel_iterations=1,
    )
    return results.concat()


def on_canvas(pixels: tf.Tensor, color: tf.Tensor, size: tf.Tensor, frame: tf.Tensor) -> tf.Tensor:
    """Puts a frame, if there is one, on a canvas of a color; frame: top, left, height, width."""

    def paste() -> tf.Tensor:
        rest = size - frame[:2] - frame[2:]
        padding = tf.concat([tf.stack([frame[:2], rest], axis=1), [[0, 0]]], 0)
        covered = tf.pad(tf.ones_like(pixels, tf.bool), padding)
        return tf.where(covered, tf.pad(pixels, padding), color)

    partial = tf.reduce_any(frame[2:] != size) & (tf.size(pixels) > 0)
    return tf.cond(partial, paste, lambda: pixels)
