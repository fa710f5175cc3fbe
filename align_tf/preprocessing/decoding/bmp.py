"""BMP: whatever is not run-length encoded."""

import tensorflow as tf

from align_tf.preprocessing.decoding.file_bytes import (
    bytes_between,
    clipped,
    little_endian,
    read_bytes,
)
from align_tf.preprocessing.decoding.pixels import BLANK, decode_where


def bmp_size(header: tf.Tensor) -> tf.Tensor:
    core = little_endian(header, [20, 18], 2)
    size = little_endian(header, [22, 18], 4)
    # The height is negative where the rows run from the top.
    size = tf.where((size >= 1 << 31) & [True, False], (1 << 32) - size, size)
    return tf.where(little_endian(header, 14, 4) == 12, core, size)


def decode_bmp(image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Decodes a BMP that is not run-length encoded, of 1, 4, 8, 16, 24 or 32 bits a pixel."""
    header_size, compression = little_endian(header, 14, 4), little_endian(header, 30, 4)
    core = header_size == 12  # the oldest kind, with short fields
    depth = tf.where(core, header[24], header[28])
    has_masks = ~core & (compression == 3)
    known = tf.reduce_any(header_size == [12, 40, 52, 56, 64, 108, 124])
    plain = core | (compression == 0) | (has_masks & (depth > 8))
    height, width = tf.unstack(size)
    stride = (width * tf.cast(depth, tf.int64) + 31) // 32 * 4
    entry = tf.where(core, 3, 4)  # blue, green, red and, in all but the oldest kind, a zero
    used = clipped(little_endian(header, 46, 4))
    colors = tf.where(core | (used == 0), tf.bitwise.left_shift(1, tf.minimum(depth, 8)), used)
    colors = tf.minimum(colors, 1 << 16)
    palette_at = 14 + clipped(header_size)
    start = clipped(little_endian(header, 10, 4))
    # Some writers state where the palette begins instead.
    start += tf.where((start == palette_at) & (depth <= 8), entry * colors, 0)
    pixels = bytes_between(image_bytes, start, clipped(tf.cast(start, tf.int64) + stride * height))
    complete = tf.cast(tf.strings.length(pixels), tf.int64) == stride * height
    sane = known & plain & tf.reduce_all(size > 0) & complete

    def rows() -> tf.Tensor:
        return tf.reshape(tf.io.decode_raw(pixels, tf.uint8), [height, stride])

    def palette_colors(depth: int) -> tf.Tensor:
        palette = tf.reshape(read_bytes(image_bytes, palette_at, entry * colors), [colors, entry])
        palette = tf.cast(palette[: 1 << depth, 2::-1], tf.uint8)
        palette = tf.pad(palette, [[0, (1 << depth) - tf.shape(palette)[0]], [0, 0]])
        return _bmp_palette_colors(rows(), depth, palette)

    masks = little_endian(header, [54, 58, 62], 4)  # red, green, blue
    masks = tf.where(has_masks, masks, tf.zeros_like(masks))  # zeros: in the usual order
    depths = (1, 4, 8, 16, 24, 32)
    branch = tf.reduce_sum(tf.where(depth == depths, range(6), 0))
    image = tf.switch_case(
        tf.where(sane & tf.reduce_any(depth == depths), branch, 6),
        [
            *[lambda d=d: palette_colors(d) for d in (1, 4, 8)],
            lambda: _bmp_high_colors(rows(), masks),
            lambda: tf.reshape(rows()[:, : width * 3], [height, width, 3])[..., ::-1],
            lambda: _bmp_true_colors(rows(), masks),
            lambda: BLANK,
        ],
    )
    image = image[:, :width]
    from_top = ~core & (header[25] == 0xFF)
    return tf.cond(from_top, lambda: image, lambda: image[::-1])


def _bmp_palette_colors(rows: tf.Tensor, depth: int, palette: tf.Tensor) -> tf.Tensor:
    shifts = tf.constant([*range(8 - depth, -1, -depth)], tf.uint8)  # the leftmost is the highest
    index = tf.bitwise.right_shift(rows[..., None], shifts)
    index = tf.bitwise.bitwise_and(index, tf.constant((1 << depth) - 1, tf.uint8))
    return tf.gather(palette, tf.cast(tf.reshape(index, [tf.shape(rows)[0], -1]), tf.int32))


def _bmp_high_colors(rows: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    has_six_green = tf.reduce_all(masks == [0xF800, 0x7E0, 0x1F])
    has_five = tf.reduce_all(masks == 0) | tf.reduce_all(masks == [0x7C00, 0x3E0, 0x1F])
    value = tf.range(1 << 16)[:, None]

    def table(shifts: list[int], highest: list[int]) -> tf.Tensor:
        levels = tf.bitwise.bitwise_and(tf.bitwise.right_shift(value, shifts), highest)
        return tf.cast(levels * 255 // highest, tf.uint8)

    colors = tf.cond(
        has_six_green,
        lambda: table([11, 5, 0], [31, 63, 31]),
        lambda: table([10, 5, 0], [31, 31, 31]),
    )
    pairs = tf.bitcast(tf.reshape(rows, [tf.shape(rows)[0], -1, 2]), tf.uint16)
    return decode_where(
        has_six_green | has_five, lambda: tf.gather(colors, tf.cast(pairs, tf.int32))
    )


def _bmp_true_colors(rows: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    usual = tf.constant([0xFF0000, 0xFF00, 0xFF], tf.int64)
    masks = tf.where(tf.reduce_all(masks == 0), usual, masks)
    found = masks[:, None] == tf.constant([0xFF << 8 * i for i in range(4)], tf.int64)
    sane = tf.reduce_all(tf.reduce_any(found, axis=1))
    order = tf.argmax(tf.cast(found, tf.int32), axis=1)
    pixels = tf.reshape(rows, [tf.shape(rows)[0], -1, 4])
    return decode_where(sane, lambda: tf.gather(pixels, order, axis=2))
