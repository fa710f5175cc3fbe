"""PNG: its header, palette and pixels alone."""

import functools

import tensorflow as tf

from align_tf.preprocessing.decoding.file_bytes import (
    MAX_BLOCKS,
    big_endian,
    bytes_between,
    read_bytes,
    starts_with,
)
from align_tf.preprocessing.decoding.pixels import attempt, decode_stock, decode_where

MAX_IDATS = 1 << 14  # chunks of a PNG's pixels
SLACK = 1 << 16  # bytes that a PNG's pixels may take beyond eight each


# Height and width, int64 (2,), of what is no JPEG, whose header has its fields in fixed places.


def png_size(header: tf.Tensor) -> tf.Tensor:
    return big_endian(header, [20, 16], 4)


def decode_png(
    image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor, exact: bool
) -> tf.Tensor:
    """Decodes a file that is rewritten to hold only its header, palette and pixels.

    The rest has no part in the pixels, and libpng unpacks texts and profiles to megabytes each.
    """
    end = tf.strings.length(image_bytes)

    def kind_is(at: tf.Tensor, kind: bytes) -> tf.Tensor:
        return starts_with(read_bytes(image_bytes, at + 4, 4), 0, kind)

    def chunk(at: tf.Tensor) -> tf.Tensor:  # its length, all in all
        length = big_endian(read_bytes(image_bytes, at, 4), 0, 4)
        return tf.cast(tf.minimum(length + 12, tf.cast(end, tf.int64)), tf.int32)

    first, palette = tf.while_loop(
        lambda at, _: (at < end) & ~kind_is(at, b"IDAT"),
        lambda at, palette: (at + chunk(at), tf.where(kind_is(at, b"PLTE"), at, palette)),
        (tf.constant(33), tf.constant(0)),
        maximum_iterations=MAX_BLOCKS,
    )
    [stop] = tf.while_loop(
        lambda at: (at < end) & kind_is(at, b"IDAT"),
        lambda at: [at + chunk(at)],
        [first],
        maximum_iterations=MAX_IDATS,
    )
    needed = tf.strings.join(
        [
            bytes_between(image_bytes, 0, 33),
            bytes_between(image_bytes, palette, tf.where(palette > 0, palette + chunk(palette), 0)),
            bytes_between(image_bytes, first, stop),
            b"\0\0\0\0IEND\xae\x42\x60\x82",
        ]
    )
    # What is left over would be unpacked too, a thousand bytes out of one.
    most = 8 * tf.reduce_prod(size) + SLACK
    sane = tf.cast(stop - first, tf.int64) <= most
    is_gray16 = (header[24] == 16) & (header[25] == 0)
    decode = functools.partial(_png_pixels, is_gray16=is_gray16) if exact else decode_stock
    return decode_where(sane, lambda: attempt(decode, needed))


def _png_pixels(image_bytes: tf.Tensor, is_gray16: tf.Tensor) -> tf.Tensor:
    def gray16() -> tf.Tensor:
        # Pillow clips its 16-bit gray mode to 8 bits; all others lose their low byte.
        gray = tf.io.decode_png(image_bytes, channels=1, dtype=tf.uint16)
        gray = tf.cast(tf.minimum(gray, tf.constant(255, tf.uint16)), tf.uint8)
        return tf.repeat(gray, 3, axis=-1)

    return tf.cond(is_gray16, gray16, lambda: tf.io.decode_png(image_bytes, channels=3))
