"""JPEG: with Pillow's inverse transform, and CMYK by what TensorFlow gives of it."""

import tensorflow as tf

from align_tf.preprocessing.decoding.file_bytes import (
    MAX_BLOCKS,
    big_endian,
    bytes_between,
    read_bytes,
    starts_with,
)
from align_tf.preprocessing.decoding.pixels import (
    BLANK,
    attempt,
    decode_stock,
    decode_where,
    in_bands,
)
from align_tf.preprocessing.decoding.webp import ALL_BYTES

MAX_SCANS = 100  # of a JPEG
SEARCHED = 1 << 16  # bytes that are looked through at a time for a marker
JPEG_MAGIC = b"\xff\xd8\xff"


def read_jpeg(image_bytes: tf.Tensor, max_pixels: int, exact: bool) -> tuple[tf.Tensor, tf.Tensor]:
    # A progressive file takes a pass over all pixels for each scan, of which a few bytes suffice.
    # What looks like one may also be part of a thumbnail, or of what lies behind the image's end,
    # such as the film of a phone's photo: only where there is too much of it is it looked at.
    scans = tf.size(tf.strings.split([image_bytes], b"\xff\xda").values) - 1
    scans = tf.cond(scans > MAX_SCANS, lambda: _count_scans(image_bytes), lambda: scans)

    def load(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.image.extract_jpeg_shape(image_bytes, output_type=tf.int64)
        sane = (tf.reduce_prod(shape[:2]) <= max_pixels) & (scans <= MAX_SCANS)
        if not exact:
            return shape, decode_where(sane, lambda: decode_stock(image_bytes))
        return shape, decode_where(sane & (shape[2] < 4), lambda: _accurate_jpeg(image_bytes))

    shape, pixels = attempt(load, image_bytes, (tf.zeros([3], tf.int64), BLANK))
    if exact:
        is_cmyk = (tf.reduce_prod(shape[:2]) <= max_pixels) & (scans <= MAX_SCANS) & (shape[2] == 4)
        pixels = tf.cond(is_cmyk, lambda: _decode_cmyk_jpeg(image_bytes), lambda: pixels)
    return pixels, shape[:2]


def _count_scans(image_bytes: tf.Tensor) -> tf.Tensor:
    """Counts the scans of a JPEG up to the end that its markers say, and MAX_SCANS + 1 at most."""
    end = tf.strings.length(image_bytes)

    def more(at: tf.Tensor, scans: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
        return (at < end) & (scans <= MAX_SCANS)

    def step(at: tf.Tensor, scans: tf.Tensor, segments: tf.Tensor) -> tuple[tf.Tensor, ...]:
        segment = read_bytes(image_bytes, at, 4)
        marker = segment[1]
        is_alone = (marker == 0x01) | (marker == 0xD8)
        length = tf.where(is_alone, 0, tf.cast(big_endian(segment, 2, 2), tf.int32))
        following = tf.where(marker == 0xD9, end, at + 2 + length)
        scans += tf.cast(marker == 0xDA, tf.int32)
        scans = tf.where(segments < MAX_BLOCKS, scans, MAX_SCANS + 1)
        return _next_marker(image_bytes, following, end), scans, segments + 1

    start = _next_marker(image_bytes, tf.constant(2), end)
    return tf.while_loop(more, step, (start, tf.constant(0), tf.constant(0)))[1]


def _next_marker(image_bytes: tf.Tensor, at: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """Finds the next marker that is no part of a scan; the file's end if there is none."""

    def step(at: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        piece = read_bytes(image_bytes, at, SEARCHED + 1)
        code = piece[1:]
        in_scan = (code == 0) | (code == 0xFF) | ((code >= 0xD0) & (code <= 0xD7))
        is_marker = (piece[:-1] == 0xFF) & ~in_scan
        found = tf.reduce_any(is_marker)
        offset = tf.argmax(tf.cast(is_marker, tf.int32), output_type=tf.int32)
        return at + tf.where(found, offset, SEARCHED), found

    at, found = tf.while_loop(lambda at, found: (at < end) & ~found, step, (at, tf.constant(False)))
    return tf.where(found, at, end)


def _accurate_jpeg(image_bytes: tf.Tensor) -> tf.Tensor:
    # Pillow's inverse transform; TensorFlow's own choice is a faster one.
    return tf.io.decode_jpeg(image_bytes, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_cmyk_jpeg(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG of four components, of which TensorFlow gives only products.

    With Adobe's marker in the file it gives a = floor(k * c / 255), without it
    b = floor((255 - k) * (255 - c) / 255), so that k + c = 255 + a - b. The same of the file
    with c replaced by a constant 128 gives k, and so all of the components.
    """
    scan, frame, adobe = _cmyk_segments(image_bytes)
    sane = (frame > 0) & (frame + 22 < scan)
    return decode_where(sane, lambda: _cmyk_pixels(image_bytes, scan, frame, adobe))


def _cmyk_pixels(
    image_bytes: tf.Tensor, scan: tf.Tensor, frame: tf.Tensor, adobe: tf.Tensor
) -> tf.Tensor:
    is_ycck = (adobe > 0) & (read_bytes(image_bytes, adobe + 15, 1)[0] != 0)

    # A marker that decoders pass over in place of Adobe's own.
    plain = tf.cond(
        adobe > 0,
        lambda: tf.strings.join(
            [
                bytes_between(image_bytes, 0, adobe + 1),
                b"\xef",
                bytes_between(image_bytes, adobe + 2, scan),
            ]
        ),
        lambda: bytes_between(image_bytes, 0, scan),
    )
    # Its first three components quantized by a table of zeros, one that the fourth has not.
    unused = (read_bytes(image_bytes, frame + 21, 1)[0] + 1) % 4
    slot = tf.gather(tf.constant(ALL_BYTES), unused)
    cuts = [frame + 12, frame + 15, frame + 18]
    head = [bytes_between(plain, 0, cuts[0])]
    for cut, end in zip(cuts, [*cuts[1:], scan], strict=True):
        head += [slot, bytes_between(plain, cut + 1, end)]
    muted = tf.strings.join([*head, b"\xff\xdb\0\x43", slot, bytes(64)])
    rest = bytes_between(image_bytes, scan, tf.strings.length(image_bytes))

    images = [
        attempt(_accurate_jpeg, tf.strings.join([head, marker, rest]))
        for head in (plain, muted)
        for marker in (b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0", b"")
    ]
    height, width = tf.unstack(tf.shape(images[0])[:2])

    def rows(start: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
        a, b, muted_a, muted_b = (tf.cast(image[start:stop], tf.int32) for image in images)
        k = 127 + muted_a - muted_b
        c = 255 + a - b - k
        sane = tf.reduce_all((k * c // 255 == a) & (c >= 0) & (c <= 255))
        c = tf.cond(is_ycck, lambda: _ycc_to_cmy(c), lambda: c)
        rows = tf.reshape(_cmyk_to_rgb(c, k), [-1, width * 3])
        return tf.cond(sane, lambda: rows, lambda: rows[:0])

    def join() -> tf.Tensor:
        pixels = tf.reshape(in_bands(rows, height, width), [-1, width, 3])
        return decode_where(tf.shape(pixels)[0] == height, lambda: pixels)

    shapes = tf.stack([tf.shape(image) for image in images])
    return decode_where(tf.reduce_all(shapes == shapes[0]) & (height > 0), join)


def _cmyk_segments(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finds the first scan of a JPEG, its frame header and Adobe's marker, 0 if there is none."""

    def step(at: tf.Tensor, frame: tf.Tensor, adobe: tf.Tensor) -> tuple[tf.Tensor, ...]:
        segment = read_bytes(image_bytes, at, 16)
        marker = segment[1]
        other = tf.reduce_any(marker == [0xC4, 0xC8, 0xCC])
        frame = tf.where((marker >= 0xC0) & (marker <= 0xCF) & ~other, at, frame)
        adobe = tf.where((marker == 0xEE) & starts_with(segment, 4, b"Adobe"), at, adobe)
        return at + 2 + tf.cast(big_endian(segment, 2, 2), tf.int32), frame, adobe

    def more(at: tf.Tensor, *_) -> tf.Tensor:
        marker = read_bytes(image_bytes, at, 2)
        return (marker[0] == 0xFF) & (marker[1] != 0xDA)

    scan, frame, adobe = tf.while_loop(
        more, step, (tf.constant(2), tf.constant(0), tf.constant(0)), maximum_iterations=MAX_BLOCKS
    )
    return scan, frame, adobe


def _ycc_to_cmy(components: tf.Tensor) -> tf.Tensor:
    """Takes luma and chroma to the inks they stand for, in libjpeg's 16-bit fixed point."""
    luma, blue, red = tf.unstack(components - [0, 128, 128], axis=-1)
    half = 1 << 15

    def scaled(number: tf.Tensor) -> tf.Tensor:
        return tf.bitwise.right_shift(number + half, 16)

    rgb = [
        luma + scaled(91881 * red),  # 1.402
        luma + scaled(-22554 * blue - 46802 * red),  # 0.34414, 0.71414
        luma + scaled(116130 * blue),  # 1.772
    ]
    return tf.clip_by_value(255 - tf.stack(rgb, axis=-1), 0, 255)


def _cmyk_to_rgb(c: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Multiplies inks as Pillow does, which takes every CMYK JPEG for an inverted one."""
    product = (255 - c) * k + 128
    product = tf.bitwise.right_shift(product + tf.bitwise.right_shift(product, 8), 8)
    return tf.cast(tf.clip_by_value(k - product, 0, 255), tf.uint8)
