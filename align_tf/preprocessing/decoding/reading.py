"""Encoded images to uint8 RGB, inside the TensorFlow graph, with the pixels that Pillow gives."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

EXPECTED = "JPEG, PNG, GIF, WebP, or BMP without run-length encoding"

HEADER_BYTES = 72  # holds every field that says how large an image is, except JPEG's
EXIF_BYTES = 1 << 17  # EXIF is one of the first segments, and a segment has 64 KB at most
# A file with more of them is refused, as it would cost more time than its size suggests.
MAX_BLOCKS = 1000  # segments, chunks or extensions before the first pixels
MAX_IDATS = 1 << 14  # chunks of a PNG's pixels
MAX_SCANS = 100  # of a JPEG
SLACK = 1 << 16  # bytes that a PNG's pixels may take beyond eight each
BAND_PIXELS = 1 << 20  # of an image, computed at a time
JPEG_MAGIC = b"\xff\xd8\xff"
BLANK = np.zeros([0, 0, 3], np.uint8)
BYTES = np.array([bytes([value]) for value in range(256)], dtype=object)


# --- headers -------------------------------------------------------------------------------


def _part(image_bytes: tf.Tensor, start: tf.Tensor | int, stop: tf.Tensor | int) -> tf.Tensor:
    """Returns the bytes from start to stop, as far as the file has them."""
    end = tf.strings.length(image_bytes)
    start = tf.clip_by_value(start, 0, end)
    return tf.strings.substr(image_bytes, start, tf.clip_by_value(stop, start, end) - start)


def _read(image_bytes: tf.Tensor, at: tf.Tensor | int, count: tf.Tensor | int) -> tf.Tensor:
    """Returns `count` bytes from a place on as int32, zeros after the file's end.

    A file is read in such pieces, so that no copy of it as numbers is made.
    """
    piece = tf.io.decode_raw(_part(image_bytes, at, at + count), tf.uint8)
    piece = tf.cast(piece, tf.int32)
    return tf.pad(piece, [[0, count - tf.size(piece)]])


def _header(image_bytes: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(_read(image_bytes, 0, HEADER_BYTES), [HEADER_BYTES])


def _little(data: tf.Tensor, at: Any, count: int) -> tf.Tensor:
    """Reads a little-endian number of `count` bytes as int64, or one from each place of a list."""
    return _number(data, at, range(count))


def _big(data: tf.Tensor, at: Any, count: int) -> tf.Tensor:
    """Reads a big-endian number of `count` bytes as int64, or one from each place of a list."""
    return _number(data, at, range(count)[::-1])


def _number(data: tf.Tensor, at: Any, places: range) -> tf.Tensor:
    """Reads numbers whose digits, the lowest first, are at such places behind `at`."""
    index = at + tf.constant([*places]) if tf.is_tensor(at) else np.add.outer(at, places)
    digits = tf.cast(tf.gather(data, index), tf.int64)
    return tf.reduce_sum(digits * [1 << 8 * i for i in range(len(places))], axis=-1)


def _starts(header: tf.Tensor, at: int, magic: bytes) -> tf.Tensor:
    return tf.reduce_all(header[at : at + len(magic)] == list(magic))


def _format(header: tf.Tensor) -> tf.Tensor:
    """Returns what the first bytes say: 0 to 4 for JPEG, PNG, GIF, BMP, WebP, 5 for all else."""
    matches = tf.stack(
        [
            _starts(header, 0, JPEG_MAGIC),
            _starts(header, 0, b"\x89PNG\r\n\x1a\n"),
            _starts(header, 0, b"GIF87a") | _starts(header, 0, b"GIF89a"),
            _starts(header, 0, b"BM"),
            _starts(header, 0, b"RIFF")
            & _starts(header, 8, b"WEBPVP8")
            & tf.reduce_any(header[15] == list(b" LX")),
            tf.constant(True),
        ]
    )
    return tf.argmax(tf.cast(matches, tf.int32), output_type=tf.int32)


# Height and width, int64 (2,), of what is no JPEG, whose header has its fields in fixed places.


def _png_size(header: tf.Tensor) -> tf.Tensor:
    return _big(header, [20, 16], 4)


def _gif_size(header: tf.Tensor) -> tf.Tensor:
    return _little(header, [8, 6], 2)


def _bmp_size(header: tf.Tensor) -> tf.Tensor:
    core = _little(header, [20, 18], 2)
    size = _little(header, [22, 18], 4)
    # The height is negative where the rows run from the top.
    size = tf.where((size >= 1 << 31) & [True, False], (1 << 32) - size, size)
    return tf.where(_little(header, 14, 4) == 12, core, size)


def _webp_size(header: tf.Tensor) -> tf.Tensor:
    fields = _little(header, 21, 4)
    lossless = 1 + tf.stack([fields // (1 << 14), fields]) % (1 << 14)
    lossy = _little(header, [28, 26], 2) % (1 << 14)
    still = tf.where(_starts(header, 12, b"VP8L"), lossless, lossy)
    canvas = 1 + _little(header, [27, 24], 3)
    return tf.where(_starts(header, 12, b"VP8X"), canvas, still)


# --- decoding ------------------------------------------------------------------------------


def read(
    image_bytes: tf.Tensor, max_pixels: int, exact: bool = True
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes one image to the RGB pixels of Pillow's `convert("RGB")`; no file makes it fail.

    Alpha is dropped. Of an animation it is the first frame, and no other is unpacked.

    Args:
        image_bytes: JPEG, PNG, GIF, BMP or WebP, scalar string.
        max_pixels: an image whose header declares more is not decoded.
        exact: as Pillow; otherwise JPEG, PNG and BMP have the pixels of `tf.io.decode_image`.

    Returns:
        uint8 (h, w, 3), without pixels if the file is none of these, broken or too large; and the
        height and width that its header declares, int64 (2,), zeros if there is none.
    """
    if tf.executing_eagerly():
        return _read_any(image_bytes, max_pixels, exact)
    return _reader(max_pixels, exact)(image_bytes)


@functools.cache
def _reader(max_pixels: int, exact: bool) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Traces `_read_any` once, which takes two seconds; each graph that reads images calls it."""
    return tf.function(
        lambda image_bytes: _read_any(image_bytes, max_pixels, exact),
        autograph=False,
        input_signature=[tf.TensorSpec([], tf.string)],
    )


def _read_any(image_bytes: tf.Tensor, max_pixels: int, exact: bool) -> tuple[tf.Tensor, tf.Tensor]:
    header = _header(image_bytes)

    def sized(size_of: Callable, decode: Callable) -> tuple[tf.Tensor, tf.Tensor]:
        size = size_of(header)
        small = tf.reduce_prod(size) <= max_pixels
        return _where(small, lambda: decode(image_bytes, header, size)), size

    def stock(image_bytes: tf.Tensor, *_) -> tf.Tensor:
        return _attempt(_stock, image_bytes)

    pixels, size = tf.switch_case(
        _format(header),
        [
            lambda: _read_jpeg(image_bytes, max_pixels, exact),
            lambda: sized(_png_size, functools.partial(_decode_png, exact=exact)),
            lambda: sized(_gif_size, _decode_gif),
            lambda: sized(_bmp_size, _decode_bmp if exact else stock),
            lambda: sized(_webp_size, _decode_webp),
            lambda: (BLANK, tf.zeros([2], tf.int64)),
        ],
    )
    return tf.ensure_shape(pixels, [None, None, 3]), size


def _stock(image_bytes: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def _attempt(decode: Callable, image_bytes: tf.Tensor, failed: Any = BLANK) -> Any:
    """Returns decode(image_bytes), or what stands for its failure.

    A data set can leave out what fails, where an operation would end the graph. It is set up
    anew with each call, so that it should hold few operations.
    """
    rows = tf.data.Dataset.from_tensors(image_bytes).map(decode).ignore_errors()
    return rows.concatenate(tf.data.Dataset.from_tensors(failed)).take(1).get_single_element()


def _where(condition: tf.Tensor, decode: Callable[[], tf.Tensor]) -> tf.Tensor:
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


# --- JPEG ----------------------------------------------------------------------------------


def _read_jpeg(image_bytes: tf.Tensor, max_pixels: int, exact: bool) -> tuple[tf.Tensor, tf.Tensor]:
    # A progressive file takes a pass over all pixels for each scan, of which a few bytes suffice.
    scans = tf.size(tf.strings.split([image_bytes], b"\xff\xda").values) - 1

    def load(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.image.extract_jpeg_shape(image_bytes, output_type=tf.int64)
        sane = (tf.reduce_prod(shape[:2]) <= max_pixels) & (scans <= MAX_SCANS)
        if not exact:
            return shape, _where(sane, lambda: _stock(image_bytes))
        return shape, _where(sane & (shape[2] < 4), lambda: _accurate_jpeg(image_bytes))

    shape, pixels = _attempt(load, image_bytes, (tf.zeros([3], tf.int64), BLANK))
    if exact:
        is_cmyk = (tf.reduce_prod(shape[:2]) <= max_pixels) & (scans <= MAX_SCANS) & (shape[2] == 4)
        pixels = tf.cond(is_cmyk, lambda: _decode_cmyk_jpeg(image_bytes), lambda: pixels)
    return pixels, shape[:2]


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
    return _where(sane, lambda: _cmyk_pixels(image_bytes, scan, frame, adobe))


def _cmyk_pixels(
    image_bytes: tf.Tensor, scan: tf.Tensor, frame: tf.Tensor, adobe: tf.Tensor
) -> tf.Tensor:
    is_ycck = (adobe > 0) & (_read(image_bytes, adobe + 15, 1)[0] != 0)

    # A marker that decoders pass over in place of Adobe's own.
    plain = tf.cond(
        adobe > 0,
        lambda: tf.strings.join(
            [_part(image_bytes, 0, adobe + 1), b"\xef", _part(image_bytes, adobe + 2, scan)]
        ),
        lambda: _part(image_bytes, 0, scan),
    )
    # Its first three components quantized by a table of zeros, one that the fourth has not.
    unused = (_read(image_bytes, frame + 21, 1)[0] + 1) % 4
    slot = tf.gather(tf.constant(BYTES), unused)
    cuts = [frame + 12, frame + 15, frame + 18]
    head = [_part(plain, 0, cuts[0])]
    for cut, end in zip(cuts, [*cuts[1:], scan], strict=True):
        head += [slot, _part(plain, cut + 1, end)]
    muted = tf.strings.join([*head, b"\xff\xdb\0\x43", slot, bytes(64)])
    rest = _part(image_bytes, scan, tf.strings.length(image_bytes))

    images = [
        _attempt(_accurate_jpeg, tf.strings.join([head, marker, rest]))
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
        return _where(tf.shape(pixels)[0] == height, lambda: pixels)

    shapes = tf.stack([tf.shape(image) for image in images])
    return _where(tf.reduce_all(shapes == shapes[0]) & (height > 0), join)


def _cmyk_segments(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finds the first scan of a JPEG, its frame header and Adobe's marker, 0 if there is none."""

    def step(at: tf.Tensor, frame: tf.Tensor, adobe: tf.Tensor) -> tuple[tf.Tensor, ...]:
        segment = _read(image_bytes, at, 16)
        marker = segment[1]
        other = tf.reduce_any(marker == [0xC4, 0xC8, 0xCC])
        frame = tf.where((marker >= 0xC0) & (marker <= 0xCF) & ~other, at, frame)
        adobe = tf.where((marker == 0xEE) & _starts(segment, 4, b"Adobe"), at, adobe)
        return at + 2 + tf.cast(_big(segment, 2, 2), tf.int32), frame, adobe

    def more(at: tf.Tensor, *_) -> tf.Tensor:
        marker = _read(image_bytes, at, 2)
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


# --- PNG -----------------------------------------------------------------------------------


def _decode_png(
    image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor, exact: bool
) -> tf.Tensor:
    """Decodes a file that is rewritten to hold only its header, palette and pixels.

    The rest has no part in the pixels, and libpng unpacks texts and profiles to megabytes each.
    """
    end = tf.strings.length(image_bytes)

    def kind_is(at: tf.Tensor, kind: bytes) -> tf.Tensor:
        return _starts(_read(image_bytes, at + 4, 4), 0, kind)

    def chunk(at: tf.Tensor) -> tf.Tensor:  # its length, all in all
        length = _big(_read(image_bytes, at, 4), 0, 4)
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
            _part(image_bytes, 0, 33),
            _part(image_bytes, palette, tf.where(palette > 0, palette + chunk(palette), 0)),
            _part(image_bytes, first, stop),
            b"\0\0\0\0IEND\xae\x42\x60\x82",
        ]
    )
    # What is left over would be unpacked too, a thousand bytes out of one.
    most = 8 * tf.reduce_prod(size) + SLACK
    sane = tf.cast(stop - first, tf.int64) <= most
    is_gray16 = (header[24] == 16) & (header[25] == 0)
    decode = functools.partial(_png_pixels, is_gray16=is_gray16) if exact else _stock
    return _where(sane, lambda: _attempt(decode, needed))


def _png_pixels(image_bytes: tf.Tensor, is_gray16: tf.Tensor) -> tf.Tensor:
    def gray16() -> tf.Tensor:
        # Pillow clips its 16-bit gray mode to 8 bits; all others lose their low byte.
        gray = tf.io.decode_png(image_bytes, channels=1, dtype=tf.uint16)
        gray = tf.cast(tf.minimum(gray, tf.constant(255, tf.uint16)), tf.uint8)
        return tf.repeat(gray, 3, axis=-1)

    return tf.cond(is_gray16, gray16, lambda: tf.io.decode_png(image_bytes, channels=3))


# --- GIF -----------------------------------------------------------------------------------


def _decode_gif(image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Decodes the first frame alone, from a file rewritten to hold nothing else."""
    size = tf.cast(size, tf.int32)  # of the canvas
    has_palette, palette_size = _gif_palette(header[10])
    first = 13 + palette_size
    start, transparent = _skip_extensions(image_bytes, first)
    descriptor = _read(image_bytes, start, 10)
    has_own, own_size = _gif_palette(descriptor[9])
    # top, left, height, width
    frame = tf.cast(_little(descriptor, [3, 1, 7, 5], 2), tf.int32)
    sane = (descriptor[0] == ord(",")) & (has_own | has_palette)
    sane &= tf.reduce_all(frame[:2] + frame[2:] <= size)

    # Around a frame smaller than the canvas, Pillow shows the transparent color, or the first.
    palette_at = tf.where(has_own, start + 10, 13) + 3 * tf.maximum(transparent, 0)
    color = tf.cast(_read(image_bytes, palette_at, 3), tf.uint8)
    return _where(
        sane,
        lambda: _on_canvas(
            _attempt(_stock, _frame_alone(image_bytes, first, start, own_size)), color, size, frame
        ),
    )


def _frame_alone(
    image_bytes: tf.Tensor, first: tf.Tensor, start: tf.Tensor, own_size: tf.Tensor
) -> tf.Tensor:
    """Makes a frame a GIF of its own: its size in the header, no offset, no extension."""
    stop = _after_blocks(image_bytes, start + 11 + own_size, 1 << 16)
    return tf.strings.join(
        [
            _part(image_bytes, 0, 6),
            _part(image_bytes, start + 5, start + 9),
            _part(image_bytes, 10, first),
            b",\0\0\0\0",
            _part(image_bytes, start + 5, stop),
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
        block = _read(image_bytes, at, 7)
        index = tf.where(block[3] % 2 == 1, block[6], -1)
        transparent = tf.where(_starts(block, 1, b"\xf9\4"), index, transparent)
        return _after_blocks(image_bytes, at + 2, 1 << 12), transparent

    return tf.while_loop(
        lambda at, _: _read(image_bytes, at, 1)[0] == ord("!"),
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
        length = _read(image_bytes, at, window)
        after = tf.where(length == 0, place, place + length + 1)

        def double(after: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            inside = tf.gather(after, tf.minimum(after, window - 1))
            further = tf.where(after < window, inside, after)
            return further, further[0] != after[0]

        after, _ = tf.while_loop(lambda _, moved: moved, double, (after, tf.constant(True)))
        return at + after[0], after[0] >= window

    at, _ = tf.while_loop(lambda _, more: more, step, (at, tf.constant(True)))
    return at + 1


def _on_canvas(pixels: tf.Tensor, color: tf.Tensor, size: tf.Tensor, frame: tf.Tensor) -> tf.Tensor:
    """Puts a frame, if there is one, on a canvas of a color; frame: top, left, height, width."""

    def paste() -> tf.Tensor:
        rest = size - frame[:2] - frame[2:]
        padding = tf.concat([tf.stack([frame[:2], rest], axis=1), [[0, 0]]], 0)
        covered = tf.pad(tf.ones_like(pixels, tf.bool), padding)
        return tf.where(covered, tf.pad(pixels, padding), color)

    partial = tf.reduce_any(frame[2:] != size) & (tf.size(pixels) > 0)
    return tf.cond(partial, paste, lambda: pixels)


# --- BMP -----------------------------------------------------------------------------------


def _decode_bmp(image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Decodes a BMP that is not run-length encoded, of 1, 4, 8, 16, 24 or 32 bits a pixel."""
    header_size, compression = _little(header, 14, 4), _little(header, 30, 4)
    core = header_size == 12  # the oldest kind, with short fields
    depth = tf.where(core, header[24], header[28])
    has_masks = ~core & (compression == 3)
    known = tf.reduce_any(header_size == [12, 40, 52, 56, 64, 108, 124])
    plain = core | (compression == 0) | (has_masks & (depth > 8))
    height, width = tf.unstack(size)
    stride = (width * tf.cast(depth, tf.int64) + 31) // 32 * 4
    entry = tf.where(core, 3, 4)  # blue, green, red and, in all but the oldest kind, a zero
    used = _clipped(_little(header, 46, 4))
    colors = tf.where(core | (used == 0), tf.bitwise.left_shift(1, tf.minimum(depth, 8)), used)
    colors = tf.minimum(colors, 1 << 16)
    palette_at = 14 + _clipped(header_size)
    start = _clipped(_little(header, 10, 4))
    # Some writers state where the palette begins instead.
    start += tf.where((start == palette_at) & (depth <= 8), entry * colors, 0)
    pixels = _part(image_bytes, start, _clipped(tf.cast(start, tf.int64) + stride * height))
    complete = tf.cast(tf.strings.length(pixels), tf.int64) == stride * height
    sane = known & plain & tf.reduce_all(size > 0) & complete

    def rows() -> tf.Tensor:
        return tf.reshape(tf.io.decode_raw(pixels, tf.uint8), [height, stride])

    def palette_colors(depth: int) -> tf.Tensor:
        palette = tf.reshape(_read(image_bytes, palette_at, entry * colors), [colors, entry])
        palette = tf.cast(palette[: 1 << depth, 2::-1], tf.uint8)
        palette = tf.pad(palette, [[0, (1 << depth) - tf.shape(palette)[0]], [0, 0]])
        return _bmp_palette_colors(rows(), depth, palette)

    masks = _little(header, [54, 58, 62], 4)  # red, green, blue
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


def _clipped(number: tf.Tensor) -> tf.Tensor:
    """Takes int64 to int32; what is too large for it is beyond any file's end."""
    return tf.cast(tf.minimum(number, tf.int32.max // 4), tf.int32)


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
    return _where(has_six_green | has_five, lambda: tf.gather(colors, tf.cast(pairs, tf.int32)))


def _bmp_true_colors(rows: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    usual = tf.constant([0xFF0000, 0xFF00, 0xFF], tf.int64)
    masks = tf.where(tf.reduce_all(masks == 0), usual, masks)
    found = masks[:, None] == tf.constant([0xFF << 8 * i for i in range(4)], tf.int64)
    sane = tf.reduce_all(tf.reduce_any(found, axis=1))
    order = tf.argmax(tf.cast(found, tf.int32), axis=1)
    pixels = tf.reshape(rows, [tf.shape(rows)[0], -1, 4])
    return _where(sane, lambda: tf.gather(pixels, order, axis=2))


# --- WebP ----------------------------------------------------------------------------------


def _decode_webp(image_bytes: tf.Tensor, header: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    animated = _starts(header, 12, b"VP8X") & (tf.bitwise.bitwise_and(header[20], 2) > 0)

    return tf.cond(
        animated,
        lambda: _decode_first_webp_frame(image_bytes, size),
        lambda: _attempt(_still_webp, image_bytes),
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
        return _starts(_read(image_bytes, at, 4), 0, b"ANMF")

    def size_of(at: tf.Tensor) -> tf.Tensor:
        return tf.minimum(_clipped(_little(_read(image_bytes, at + 4, 4), 0, 4)), end)

    [at] = tf.while_loop(
        lambda at: (at < end) & ~is_frame(at),
        lambda at: [at + 8 + size_of(at) + size_of(at) % 2],
        [tf.constant(12)],
        maximum_iterations=MAX_BLOCKS,
    )
    size = tf.cast(size, tf.int32)  # of the canvas
    fields = _read(image_bytes, at, 24)
    place = tf.cast(_little(fields, [11, 8, 17, 14], 3), tf.int32)
    frame = place * [2, 2, 1, 1] + [0, 0, 1, 1]  # top, left, height, width
    sane = is_frame(at) & (at + 24 < end) & tf.reduce_all(frame[:2] + frame[2:] <= size)
    length = tf.maximum(size_of(at) - 16, 0)
    alone = tf.strings.join(
        [
            b"RIFF",
            _encode_little(length + 22),
            b"WEBPVP8X\x0a\0\0\0\x10\0\0\0",  # 0x10: it may have alpha
            _part(image_bytes, at + 14, at + 20),  # width and height, less one
            _part(image_bytes, at + 24, at + 24 + length),
        ]
    )
    black = tf.zeros([3], tf.uint8)
    return _where(sane, lambda: _on_canvas(_attempt(_still_webp, alone), black, size, frame))


def _encode_little(number: tf.Tensor) -> tf.Tensor:
    """Encodes a number as four little-endian bytes."""
    digits = tf.bitwise.right_shift(number, tf.constant([0, 8, 16, 24])) % 256
    return tf.strings.reduce_join(tf.gather(tf.constant(BYTES), digits))


# --- orientation ---------------------------------------------------------------------------


def exif_orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads how a JPEG photograph is turned, from its EXIF tag 0x0112.

    Returns:
        int32 scalar, 1 (upright) to 8; 1 where there is no tag.
    """
    start = tf.strings.join([_part(image_bytes, 0, EXIF_BYTES), tf.constant(bytes(HEADER_BYTES))])
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
    is_jpeg = _starts(data, 0, JPEG_MAGIC)
    found = tf.cond(is_jpeg & (at < end), lambda: is_exif(at), lambda: tf.constant(False))
    return tf.cond(found, orientation, lambda: upright)


def turn_upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes an EXIF orientation, 1 to 8, of an image (h, w, 3)."""
    swapped = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    left_right = tf.reduce_any(orientation == [2, 3, 6, 7])
    up_down = tf.reduce_any(orientation == [3, 4, 7, 8])
    swapped = tf.cond(left_right, lambda: swapped[:, ::-1], lambda: swapped)
    return tf.cond(up_down, lambda: swapped[::-1], lambda: swapped)
