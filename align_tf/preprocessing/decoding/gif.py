"""GIF: its first frame alone, on the canvas."""

import tensorflow as tf

from align_tf.preprocessing.decoding.file_bytes import (
    MAX_BLOCKS,
    bytes_between,
    little_endian,
    read_bytes,
    starts_with,
)
from align_tf.preprocessing.decoding.pixels import attempt, decode_stock, decode_where, on_canvas


def gif_size(header: tf.Tensor) -> tf.Tensor:
    return little_endian(header, [8, 6], 2)


def decode_gif(image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Decodes the first frame alone, from a file rewritten to hold nothing else."""
    size = tf.cast(size, tf.int32)  # of the canvas
    has_palette, palette_size = _gif_palette(header[10])
    first = 13 + palette_size
    start, transparent = _skip_extensions(image_bytes, first)
    descriptor = read_bytes(image_bytes, start, 10)
    has_own, own_size = _gif_palette(descriptor[9])
    # top, left, height, width
    frame = tf.cast(little_endian(descriptor, [3, 1, 7, 5], 2), tf.int32)
    sane = (descriptor[0] == ord(",")) & (has_own | has_palette)
    sane &= tf.reduce_all(frame[:2] + frame[2:] <= size)

    # Around a frame smaller than the canvas, Pillow shows the transparent color, or the first.
    palette_at = tf.where(has_own, start + 10, 13) + 3 * tf.maximum(transparent, 0)
    color = tf.cast(read_bytes(image_bytes, palette_at, 3), tf.uint8)
    return decode_where(
        sane,
        lambda: on_canvas(
            attempt(decode_stock, _frame_alone(image_bytes, first, start, own_size)),
            color,
            size,
            frame,
        ),
    )


def _frame_alone(
    image_bytes: tf.Tensor, first: tf.Tensor, start: tf.Tensor, own_size: tf.Tensor
) -> tf.Tensor:
    """Makes a frame a GIF of its own: its size in the header, no offset, no extension."""
    stop = _after_blocks(image_bytes, start + 11 + own_size, 1 << 16)
    return tf.strings.join(
        [
            bytes_between(image_bytes, 0, 6),
            bytes_between(image_bytes, start + 5, start + 9),
            bytes_between(image_bytes, 10, first),
            b",\0\0\0\0",
            bytes_between(image_bytes, start + 5, stop),
            b";",
        ]
    )


def _gif_palette(flags: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Says whether a palette follows, and its size in bytes."""
    present = tf.bitwise.bitwise_and(flags, 0x80) > 0
    size = 3 * tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
    return present, tf.where(present, size, 0)


def _skip_extensions(image_bytes: tf.Tensor, at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where the first frame begins, and its transparent color or -1."""

    def skip(at: tf.Tensor, transparent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        block = read_bytes(image_bytes, at, 7)
        index = tf.where(block[3] % 2 == 1, block[6], -1)
        transparent = tf.where(starts_with(block, 1, b"\xf9\4"), index, transparent)
        return _after_blocks(image_bytes, at + 2, 1 << 12), transparent

    return tf.while_loop(
        lambda at, _: read_bytes(image_bytes, at, 1)[0] == ord("!"),
        skip,
        (at, tf.constant(-1)),
        maximum_iterations=MAX_BLOCKS,
    )


def _after_blocks(image_bytes: tf.Tensor, at: tf.Tensor, window: int) -> tf.Tensor:
    """Returns the place after a chain of sub-blocks: each begins with its length, the last has 0.

    From every place of a window one is sent on to the next block, and then twice as far with
    each turn, so that the time does not depend on how long the blocks are.
    """
    window = tf.minimum(window, tf.strings.length(image_bytes))
    place = tf.range(window)

    def step(at: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        length = read_bytes(image_bytes, at, window)
        after = tf.where(length == 0, place, place + length + 1)

        def double(after: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            inside = tf.gather(after, tf.minimum(after, window - 1))
            further = tf.where(after < window, inside, after)
            return further, further[0] != after[0]

        after, _ = tf.while_loop(lambda _, moved: moved, double, (after, tf.constant(True)))
        return at + after[0], after[0] >= window

    at, _ = tf.while_loop(lambda _, more: more, step, (at, tf.constant(True)))
    return at + 1
