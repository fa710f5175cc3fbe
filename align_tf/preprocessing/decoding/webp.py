"""WebP: a still image, or an animation's first frame."""

import numpy as np
import tensorflow as tf

from align_tf.preprocessing.decoding.file_bytes import (
    MAX_BLOCKS,
    bytes_between,
    clipped,
    little_endian,
    read_bytes,
    starts_with,
)
from align_tf.preprocessing.decoding.pixels import attempt, decode_where, on_canvas

ALL_BYTES = np.array([bytes([value]) for value in range(256)], dtype=object)


def webp_size(header: tf.Tensor) -> tf.Tensor:
    fields = little_endian(header, 21, 4)
    lossless = 1 + tf.stack([fields // (1 << 14), fields]) % (1 << 14)
    lossy = little_endian(header, [28, 26], 2) % (1 << 14)
    still = tf.where(starts_with(header, 12, b"VP8L"), lossless, lossy)
    canvas = 1 + little_endian(header, [27, 24], 3)
    return tf.where(starts_with(header, 12, b"VP8X"), canvas, still)


def decode_webp(image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    animated = starts_with(header, 12, b"VP8X") & (tf.bitwise.bitwise_and(header[20], 2) > 0)

    return tf.cond(
        animated,
        lambda: _decode_first_webp_frame(image_bytes, size),
        lambda: attempt(_still_webp, image_bytes),
    )


def _still_webp(image_bytes: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(image_bytes, expand_animations=False)
    return tf.ensure_shape(image, [None, None, None])[..., :3]


def _decode_first_webp_frame(image_bytes: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Decodes an animation's first frame, from a file rewritten as a still image.

    Chunks and their fields: developers.google.com/speed/webp/docs/riff_container.
    """
    end = tf.strings.length(image_bytes)

    def is_frame(at: tf.Tensor) -> tf.Tensor:
        return starts_with(read_bytes(image_bytes, at, 4), 0, b"ANMF")

    def size_of(at: tf.Tensor) -> tf.Tensor:
        return tf.minimum(clipped(little_endian(read_bytes(image_bytes, at + 4, 4), 0, 4)), end)

    [at] = tf.while_loop(
        lambda at: (at < end) & ~is_frame(at),
        lambda at: [at + 8 + size_of(at) + size_of(at) % 2],
        [tf.constant(12)],
        maximum_iterations=MAX_BLOCKS,
    )
    size = tf.cast(size, tf.int32)  # of the canvas
    fields = read_bytes(image_bytes, at, 24)
    place = tf.cast(little_endian(fields, [11, 8, 17, 14], 3), tf.int32)
    frame = place * [2, 2, 1, 1] + [0, 0, 1, 1]  # top, left, height, width
    sane = is_frame(at) & (at + 24 < end) & tf.reduce_all(frame[:2] + frame[2:] <= size)
    length = tf.maximum(size_of(at) - 16, 0)
    alone = tf.strings.join(
        [
            b"RIFF",
            _encode_little(length + 22),
            b"WEBPVP8X\x0a\0\0\0\x10\0\0\0",  # 0x10: it may have alpha
            bytes_between(image_bytes, at + 14, at + 20),  # width and height, less one
            bytes_between(image_bytes, at + 24, at + 24 + length),
        ]
    )
    black = tf.zeros([3], tf.uint8)
    return decode_where(sane, lambda: on_canvas(attempt(_still_webp, alone), black, size, frame))


def _encode_little(number: tf.Tensor) -> tf.Tensor:
    """Encodes a number as four little-endian bytes."""
    digits = tf.bitwise.right_shift(number, tf.constant([0, 8, 16, 24])) % 256
    return tf.strings.reduce_join(tf.gather(tf.constant(ALL_BYTES), digits))
