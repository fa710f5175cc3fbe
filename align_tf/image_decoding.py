"""Encoded images to uint8 RGB, inside the TensorFlow graph, with the pixels that Pillow gives."""

import numpy as np
import tensorflow as tf

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WebP")
EXPECTED = "JPEG, PNG, GIF, BMP or WebP"

HEADER_BYTES = 64  # holds every field that says how large an image is, except JPEG's
EXIF_BYTES = 1 << 17  # EXIF is one of the first segments, and a segment has 64 KB at most
MAX_BLOCKS = 1000  # before the first frame of a GIF or a WebP; a file with more is refused
BYTES = np.array([bytes([value]) for value in range(256)], dtype=object)


# --- headers -------------------------------------------------------------------------------


def _header(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the first bytes as int32 (HEADER_BYTES,), zeros after the file's end."""
    start = tf.strings.substr(image_bytes, 0, HEADER_BYTES)
    padded = tf.strings.join([start, tf.constant(bytes(HEADER_BYTES))])
    return tf.cast(tf.io.decode_raw(padded, tf.uint8)[:HEADER_BYTES], tf.int32)


def _little(data: tf.Tensor, at: tf.Tensor | int, count: int) -> tf.Tensor:
    """Reads a little-endian number of `count` bytes as int64."""
    digits = tf.cast(data[at : at + count], tf.int64)
    return tf.reduce_sum(digits * [1 << 8 * i for i in range(count)])


def _big(data: tf.Tensor, at: tf.Tensor | int, count: int) -> tf.Tensor:
    """Reads a big-endian number of `count` bytes as int64."""
    return _little(data[at : at + count][::-1], 0, count)


def _starts(header: tf.Tensor, at: int, magic: bytes) -> tf.Tensor:
    return tf.reduce_all(header[at : at + len(magic)] == list(magic))


def image_format(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the place in FORMATS of what the first bytes say, len(FORMATS) for anything else."""
    header = _header(image_bytes)
    matches = tf.stack(
        [
            _starts(header, 0, b"\xff\xd8\xff"),
            _starts(header, 0, b"\x89PNG\r\n\x1a\n"),
            _starts(header, 0, b"GIF87a") | _starts(header, 0, b"GIF89a"),
            _starts(header, 0, b"BM"),
            _starts(header, 0, b"RIFF") & _starts(header, 8, b"WEBP"),
            tf.constant(True),
        ]
    )
    return tf.argmax(tf.cast(matches, tf.int32), output_type=tf.int32)


def declared_size(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads an image's size from its header; no pixel is decoded.

    Args:
        image_bytes: an encoded image, scalar string.

    Returns:
        int64 (2,), height and width; zeros where the format is none of FORMATS.

    Raises:
        tf.errors.InvalidArgumentError: a JPEG whose header is broken.
    """
    header = _header(image_bytes)

    def size(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return tf.stack([height, width])

    def bmp() -> tf.Tensor:
        height = _little(header, 22, 4)  # negative where the rows run from the top
        height = tf.where(height >= 1 << 31, (1 << 32) - height, height)
        core = size(_little(header, 20, 2), _little(header, 18, 2))
        return tf.where(_little(header, 14, 4) == 12, core, size(height, _little(header, 18, 4)))

    def webp() -> tf.Tensor:
        lossless = _little(header, 21, 4)
        extended = size(1 + _little(header, 27, 3), 1 + _little(header, 24, 3))
        lossy = size(_little(header, 28, 2) % (1 << 14), _little(header, 26, 2) % (1 << 14))
        lossless = size(1 + lossless // (1 << 14) % (1 << 14), 1 + lossless % (1 << 14))
        lossless = tf.where(_starts(header, 12, b"VP8L"), lossless, lossy)
        return tf.where(_starts(header, 12, b"VP8X"), extended, lossless)

    return tf.switch_case(
        image_format(image_bytes),
        [
            lambda: tf.cast(tf.image.extract_jpeg_shape(image_bytes)[:2], tf.int64),
            lambda: size(_big(header, 20, 4), _big(header, 16, 4)),
            lambda: size(_little(header, 8, 2), _little(header, 6, 2)),
            bmp,
            webp,
            lambda: tf.zeros([2], tf.int64),
        ],
    )


# --- decoding ------------------------------------------------------------------------------


def decode(image_bytes: tf.Tensor, dct_method: str = "INTEGER_ACCURATE") -> tf.Tensor:
    """Decodes one image to the RGB pixels of Pillow's `convert("RGB")`.

    Alpha is dropped. Of an animation it is the first frame, and no other is unpacked.

    Args:
        image_bytes: JPEG, PNG, GIF, BMP or WebP, scalar string.
        dct_method: JPEG's inverse transform; INTEGER_ACCURATE is the one that Pillow takes.

    Returns:
        uint8 (h, w, 3).

    Raises:
        tf.errors.InvalidArgumentError: it is none of these, or broken.
    """
    image = tf.switch_case(
        image_format(image_bytes),
        [
            lambda: tf.io.decode_jpeg(image_bytes, channels=3, dct_method=dct_method),
            lambda: _decode_png(image_bytes),
            lambda: _decode_gif(image_bytes),
            lambda: _decode_bmp(image_bytes),
            lambda: _decode_webp(image_bytes),
            lambda: _refuse(f"not an image ({EXPECTED})"),
        ],
    )
    return tf.ensure_shape(image, [None, None, 3])


def _refuse(reason: str) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(False, [reason])]):
        return tf.zeros([0, 0, 3], tf.uint8)


def _decode_png(image_bytes: tf.Tensor) -> tf.Tensor:
    header = _header(image_bytes)

    def gray16() -> tf.Tensor:
        # Pillow clips its 16-bit gray mode to 8 bits; all others lose their low byte.
        gray = tf.io.decode_png(image_bytes, channels=1, dtype=tf.uint16)
        gray = tf.cast(tf.minimum(tf.cast(gray, tf.int32), 255), tf.uint8)
        return tf.repeat(gray, 3, axis=-1)

    return tf.cond(
        (header[24] == 16) & (header[25] == 0),
        gray16,
        lambda: tf.io.decode_png(image_bytes, channels=3),
    )


def _decode_gif(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes the first frame alone, from a file rewritten to hold nothing else."""
    data = tf.cast(tf.io.decode_raw(image_bytes, tf.uint8), tf.int32)
    end = tf.size(data)
    has_palette = tf.bitwise.bitwise_and(data[10], 0x80) > 0
    palette_size = 3 * tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(data[10], 7))
    first = 13 + tf.where(has_palette, palette_size, 0)

    # Where a chain of sub-blocks ends: each begins with its length, the last has none. Every
    # place is sent on to the next block, and then twice as far with each turn.
    place = tf.range(end)
    after = tf.where(data == 0, place, tf.minimum(place + data + 1, end - 1))
    _, chain_end = tf.while_loop(
        lambda last, after: tf.reduce_any(last != after),
        lambda last, after: (after, tf.gather(after, after)),
        (place, after),
    )

    def skip_extension(
        at: tf.Tensor, transparent: tf.Tensor, count: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        control = tf.reduce_all(data[at + 1 : at + 3] == [0xF9, 4]) & (at + 6 < end)
        flags = data[tf.minimum(at + 3, end - 1)]
        index = tf.where(flags % 2 == 1, data[tf.minimum(at + 6, end - 1)], -1)
        transparent = tf.where(control, index, transparent)
        return tf.gather(chain_end, at + 2) + 1, transparent, count + 1

    start, transparent, _ = tf.while_loop(
        lambda at, _, count: (at + 2 < end) & (data[at] == 0x21) & (count < MAX_BLOCKS),
        skip_extension,
        (first, tf.constant(-1), tf.constant(0)),
    )
    with tf.control_dependencies(
        [tf.debugging.Assert((start + 10 < end) & (data[start] == 0x2C), ["no frame in the GIF"])]
    ):
        flags = data[start + 9]
    own_palette = tf.bitwise.bitwise_and(flags, 0x80) > 0
    own_size = 3 * tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
    blocks = start + 11 + tf.where(own_palette, own_size, 0)
    stop = tf.gather(chain_end, blocks) + 1
    size = tf.cast([_little(data, 8, 2), _little(data, 6, 2)], tf.int32)  # of the canvas
    frame = tf.cast(tf.stack([_little(data, start + i, 2) for i in (3, 1, 7, 5)]), tf.int32)
    inside = tf.reduce_all(frame[:2] + frame[2:] <= size) & (own_palette | has_palette)
    with tf.control_dependencies([tf.debugging.Assert(inside, ["broken frame in the GIF"])]):
        # The frame as a canvas of its own: its size in the header, no offset, no extension.
        alone = tf.strings.join(
            [
                tf.strings.substr(image_bytes, 0, 6),
                tf.strings.substr(image_bytes, start + 5, 4),
                tf.strings.substr(image_bytes, 10, first - 10),
                tf.constant(b",\0\0\0\0"),
                tf.strings.substr(image_bytes, start + 5, stop - start - 5),
                tf.constant(b";"),
            ]
        )
        pixels = tf.io.decode_image(alone, channels=3, expand_animations=False)
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    # Around a frame smaller than the canvas, Pillow shows the transparent color, or the first.
    palette_at = tf.where(own_palette, start + 10, 13) + 3 * tf.maximum(transparent, 0)
    color = tf.cast(tf.gather(data, tf.minimum(palette_at + tf.range(3), end - 1)), tf.uint8)
    return tf.cond(
        tf.reduce_all(frame[2:] == size),
        lambda: pixels,
        lambda: _paste(pixels, tf.broadcast_to(color, [*tf.unstack(size), 3]), frame),
    )


def _paste(pixels: tf.Tensor, canvas: tf.Tensor, frame: tf.Tensor) -> tf.Tensor:
    """Puts pixels on a canvas; frame holds top, left, height and width."""
    top, left, height, width = tf.unstack(frame)
    rest = tf.shape(canvas)[:2] - [top + height, left + width]
    padding = [[top, rest[0]], [left, rest[1]], [0, 0]]
    covered = tf.pad(tf.ones_like(pixels, tf.bool), padding)
    return tf.where(covered, tf.pad(pixels, padding), canvas)


def _decode_bmp(image_bytes: tf.Tensor) -> tf.Tensor:
    header = _header(image_bytes)
    core = _little(header, 14, 4) == 12
    depth = tf.where(core, header[24], header[28])

    def colors() -> tf.Tensor:
        # TensorFlow reads more formats by channels; a fourth one is alpha.
        return tf.ensure_shape(tf.io.decode_bmp(image_bytes), [None, None, None])[..., :3]

    plain = core | (_little(header, 30, 4) == 0)  # not run-length encoded
    return tf.cond(
        (depth <= 8) & plain, lambda: _decode_palette_bmp(image_bytes, header, core), colors
    )


def _decode_palette_bmp(image_bytes: tf.Tensor, header: tf.Tensor, core: tf.Tensor) -> tf.Tensor:
    depth = tf.where(core, header[24], header[28])
    height, width = tf.unstack(tf.cast(declared_size(image_bytes), tf.int32))
    data = tf.io.decode_raw(image_bytes, tf.uint8)
    pixels_at = tf.cast(_little(header, 10, 4), tf.int32)
    palette_at = 14 + tf.cast(_little(header, 14, 4), tf.int32)
    entry = tf.where(core, 3, 4)  # blue, green, red and, in all but the oldest kind, a zero
    used = tf.cast(_little(header, 46, 4), tf.int32)
    full = tf.bitwise.left_shift(1, depth)
    count = tf.where(core | (used == 0), full, tf.minimum(used, full))
    palette = tf.reshape(data[palette_at : palette_at + entry * count], [count, entry])
    palette = tf.pad(palette[:, 2::-1], [[0, 256 - count], [0, 0]])
    stride = (width * depth + 31) // 32 * 4
    rows = tf.reshape(data[pixels_at : pixels_at + stride * height], [height, stride, 1])
    shifts = tf.range(8 - depth, -1, -depth)  # the leftmost pixel is the highest
    index = tf.bitwise.right_shift(tf.cast(rows, tf.int32), shifts)
    index = tf.bitwise.bitwise_and(index, full - 1)  # (height, stride, pixels of a byte)
    index = tf.reshape(index, [height, -1])[:, :width]
    from_top = header[25] >= 128
    index = tf.cond(from_top & ~core, lambda: index, lambda: index[::-1])
    return tf.gather(palette, index)


def _decode_webp(image_bytes: tf.Tensor) -> tf.Tensor:
    header = _header(image_bytes)
    animated = _starts(header, 12, b"VP8X") & (tf.bitwise.bitwise_and(header[20], 2) > 0)

    def still(image_bytes: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(image_bytes, expand_animations=False)
        return tf.ensure_shape(image, [None, None, None])[..., :3]

    return tf.cond(
        animated, lambda: _decode_first_webp_frame(image_bytes, still), lambda: still(image_bytes)
    )


def _decode_first_webp_frame(image_bytes: tf.Tensor, still) -> tf.Tensor:
    """Decodes an animation's first frame, from a file rewritten as a still image.

    Chunks and their fields: developers.google.com/speed/webp/docs/riff_container.
    """
    data = tf.cast(tf.io.decode_raw(image_bytes, tf.uint8), tf.int32)
    end = tf.size(data)

    def is_frame(at: tf.Tensor) -> tf.Tensor:
        return tf.reduce_all(data[at : at + 4] == list(b"ANMF"))

    def next_chunk(at: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        size = tf.minimum(_little(data, at + 4, 4), tf.cast(end, tf.int64))
        return at + 8 + tf.cast(size + size % 2, tf.int32), count + 1

    at, _ = tf.while_loop(
        lambda at, count: (at + 24 < end) & ~is_frame(at) & (count < MAX_BLOCKS),
        next_chunk,
        (tf.constant(12), tf.constant(0)),
    )
    with tf.control_dependencies(
        [tf.debugging.Assert(at + 24 < end, ["no frame in the WebP animation"])]
    ):
        length = tf.minimum(_little(data, at + 4, 4) - 16, tf.cast(end - at - 24, tf.int64))
    place = tf.cast(tf.stack([_little(data, at + i, 3) for i in (11, 8, 17, 14)]), tf.int32)
    frame = place * [2, 2, 1, 1] + [0, 0, 1, 1]  # top, left, height, width
    size = tf.cast([1 + _little(data, 27, 3), 1 + _little(data, 24, 3)], tf.int32)
    inside = tf.reduce_all(frame[:2] + frame[2:] <= size)
    with tf.control_dependencies([tf.debugging.Assert(inside, ["broken frame in the WebP"])]):
        alone = tf.strings.join(
            [
                tf.constant(b"RIFF"),
                _encode_little(length + 22),
                tf.constant(b"WEBPVP8X\x0a\0\0\0\x10\0\0\0"),  # 0x10: it may have alpha
                tf.strings.substr(image_bytes, at + 14, 6),  # width and height, less one
                tf.strings.substr(image_bytes, at + 24, tf.cast(length, tf.int32)),
            ]
        )
        pixels = still(alone)
    canvas = tf.zeros([*tf.unstack(size), 3], tf.uint8)
    return tf.cond(
        tf.reduce_all(frame[2:] == size), lambda: pixels, lambda: _paste(pixels, canvas, frame)
    )


def _encode_little(number: tf.Tensor) -> tf.Tensor:
    """Encodes a number as four little-endian bytes."""
    digits = tf.bitwise.right_shift(number, tf.constant([0, 8, 16, 24], tf.int64)) % 256
    return tf.strings.reduce_join(tf.gather(tf.constant(BYTES), digits))


# --- orientation ---------------------------------------------------------------------------


def exif_orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads how a JPEG photograph is turned, from its EXIF tag 0x0112.

    Returns:
        int32 scalar, 1 (upright) to 8; 1 where there is no tag.
    """
    start = tf.strings.join(
        [tf.strings.substr(image_bytes, 0, EXIF_BYTES), tf.constant(bytes(HEADER_BYTES))]
    )
    data = tf.cast(tf.io.decode_raw(start, tf.uint8), tf.int32)
    end = tf.size(data) - HEADER_BYTES

    def is_exif(at: tf.Tensor) -> tf.Tensor:
        return (data[at + 1] == 0xE1) & _starts(data[at : at + HEADER_BYTES], 4, b"Exif\0\0")

    def more(at: tf.Tensor) -> tf.Tensor:
        # The segments before the first that holds pixels: APPn, tables, comments.
        marker = data[at + 1]
        ahead = (marker >= 0xE0) | (marker == 0xDB) | (marker == 0xC4)
        return (at < end) & (data[at] == 0xFF) & ahead & ~is_exif(at)

    at = tf.while_loop(
        more,
        lambda at: [tf.minimum(at + 2 + tf.cast(_big(data, at + 2, 2), tf.int32), end)],
        [tf.constant(2)],
        maximum_iterations=MAX_BLOCKS,
    )[0]

    def orientation() -> tf.Tensor:
        tiff = at + 10
        little = data[tiff] == ord("I")

        def number(offset: tf.Tensor, count: int) -> tf.Tensor:
            value = tf.where(little, _little(data, offset, count), _big(data, offset, count))
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
    is_jpeg = image_format(image_bytes) == FORMATS.index("JPEG")
    found = tf.cond(is_jpeg & (at < end), lambda: is_exif(at), lambda: tf.constant(False))
    return tf.cond(found, orientation, lambda: upright)


def turn_upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes an EXIF orientation, 1 to 8, of an image (h, w, 3)."""
    swapped = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    left_right = tf.reduce_any(orientation == [2, 3, 6, 7])
    up_down = tf.reduce_any(orientation == [3, 4, 7, 8])
    swapped = tf.cond(left_right, lambda: swapped[:, ::-1], lambda: swapped)
    return tf.cond(up_down, lambda: swapped[::-1], lambda: swapped)
