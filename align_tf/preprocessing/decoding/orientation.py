"""How a JPEG photograph is turned, by its EXIF, and turning it upright."""

import tensorflow as tf

from align_tf.preprocessing.decoding.file_bytes import (
    HEADER_BYTES,
    MAX_BLOCKS,
    big_endian,
    bytes_between,
    little_endian,
    starts_with,
)
from align_tf.preprocessing.decoding.jpeg import JPEG_MAGIC

EXIF_BYTES = 1 << 17  # EXIF is one of the first segments, and a segment has 64 KB at most


def exif_orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads how a JPEG photograph is turned, from its EXIF tag 0x0112.

    Returns:
        int32 scalar, 1 (upright) to 8; 1 where there is no tag.
    """
    start = tf.strings.join(
        [bytes_between(image_bytes, 0, EXIF_BYTES), tf.constant(bytes(HEADER_BYTES))]
    )
    data = tf.cast(tf.io.decode_raw(start, tf.uint8), tf.int32)
    end = tf.size(data) - HEADER_BYTES

    def is_exif(at: tf.Tensor) -> tf.Tensor:
        return (data[at + 1] == 0xE1) & starts_with(data[at : at + HEADER_BYTES], 4, b"Exif\0\0")

    def more(at: tf.Tensor) -> tf.Tensor:
        # The segments before the first that holds pixels: APPn, tables, comments.
        marker = data[at + 1]
        ahead = (marker >= 0xE0) | (marker == 0xDB) | (marker == 0xC4)
        return (at < end) & (data[at] == 0xFF) & ahead & ~is_exif(at)

    at = tf.while_loop(
        more,
        lambda at: [tf.minimum(at + 2 + tf.cast(big_endian(data, at + 2, 2), tf.int32), end)],
        [tf.constant(2)],
        maximum_iterations=MAX_BLOCKS,
    )[0]

    def orientation() -> tf.Tensor:
        tiff = at + 10
        little = data[tiff] == ord("I")

        def number(offset: tf.Tensor, count: int) -> tf.Tensor:
            value = tf.where(
                little, little_endian(data, offset, count), big_endian(data, offset, count)
            )
            return tf.cast(tf.minimum(value, EXIF_BYTES), tf.int32)

        directory = tf.minimum(tiff + number(tiff + 4, 4), end)
        count = tf.minimum(number(directory, 2), (end - directory) // 12)
        entries = directory + 2 + 12 * tf.range(count)
        low = tf.where(little, 0, 1)
        tags = tf.gather(data, entries + low) + 256 * tf.gather(data, entries + 1 - low)
        values = tf.gather(data, entries + 8 + low)
        found = tf.boolean_mask(values, tags == 0x0112)
        value = tf.concat([found, [1]], 0)[0]
        return tf.where((value >= 1) & (value <= 8), value, 1)

    upright = tf.constant(1)
    is_jpeg = starts_with(data, 0, JPEG_MAGIC)
    found = tf.cond(is_jpeg & (at < end), lambda: is_exif(at), lambda: tf.constant(False))
    return tf.cond(found, orientation, lambda: upright)


def turn_upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes an EXIF orientation, 1 to 8, of an image (h, w, 3)."""
    swapped = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    left_right = tf.reduce_any(orientation == [2, 3, 6, 7])
    up_down = tf.reduce_any(orientation == [3, 4, 7, 8])
    swapped = tf.cond(left_right, lambda: swapped[:, ::-1], lambda: swapped)
    return tf.cond(up_down, lambda: swapped[::-1], lambda: swapped)
