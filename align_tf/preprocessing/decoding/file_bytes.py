"""The bytes of a file inside the graph: read in pieces, and the numbers in them."""

from typing import Any

import numpy as np
import tensorflow as tf

HEADER_BYTES = 72  # holds every field that says how large an image is, except JPEG's
# A file with more of them is refused, as it would cost more time than its size suggests.
MAX_BLOCKS = 1000  # segments, chunks or extensions before the first pixels


def bytes_between(
    image_bytes: tf.Tensor, start: tf.Tensor | int, stop: tf.Tensor | int
) -> tf.Tensor:
    """Returns the bytes from start to stop, as far as the file has them."""
    end = tf.strings.length(image_bytes)
    start = tf.clip_by_value(start, 0, end)
    return tf.strings.substr(image_bytes, start, tf.clip_by_value(stop, start, end) - start)


def read_bytes(image_bytes: tf.Tensor, at: tf.Tensor | int, count: tf.Tensor | int) -> tf.Tensor:
    """Returns `count` bytes from a place on as int32, zeros after the file's end.

    A file is read in such pieces, so that no copy of it as numbers is made.
    """
    piece = tf.io.decode_raw(bytes_between(image_bytes, at, at + count), tf.uint8)
    piece = tf.cast(piece, tf.int32)
    return tf.pad(piece, [[0, count - tf.size(piece)]])


def read_header(image_bytes: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(read_bytes(image_bytes, 0, HEADER_BYTES), [HEADER_BYTES])


def little_endian(data: tf.Tensor, at: Any, count: int) -> tf.Tensor:
    """Reads a little-endian number of `count` bytes as int64, or one from each place of a list."""
    return _number(data, at, range(count))


def big_endian(data: tf.Tensor, at: Any, count: int) -> tf.Tensor:
    """Reads a big-endian number of `count` bytes as int64, or one from each place of a list."""
    return _number(data, at, range(count)[::-1])


def _number(data: tf.Tensor, at: Any, places: range) -> tf.Tensor:
    """Reads numbers whose digits, the lowest first, are at such places behind `at`."""
    index = at + tf.constant([*places]) if tf.is_tensor(at) else np.add.outer(at, places)
    digits = tf.cast(tf.gather(data, index), tf.int64)
    return tf.reduce_sum(digits * [1 << 8 * i for i in range(len(places))], axis=-1)


def starts_with(header: tf.Tensor, at: int, magic: bytes) -> tf.Tensor:
    return tf.reduce_all(header[at : at + len(magic)] == list(magic))


def clipped(number: tf.Tensor) -> tf.Tensor:
    """Takes int64 to int32; what is too large for it is beyond any file's end."""
    return tf.cast(tf.minimum(number, tf.int32.max // 4), tf.int32)
