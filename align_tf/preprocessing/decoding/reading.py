"""Encoded images to uint8 RGB, inside the TensorFlow graph, with the pixels that Pillow gives."""

import functools
from collections.abc import Callable

import tensorflow as tf

from align_tf.preprocessing import apart
from align_tf.preprocessing.decoding.bmp import bmp_size, decode_bmp
from align_tf.preprocessing.decoding.file_bytes import read_header, starts_with
from align_tf.preprocessing.decoding.gif import decode_gif, gif_size
from align_tf.preprocessing.decoding.jpeg import JPEG_MAGIC, read_jpeg
from align_tf.preprocessing.decoding.pixels import BLANK, attempt, decode_stock, decode_where
from align_tf.preprocessing.decoding.png import decode_png, png_size
from align_tf.preprocessing.decoding.webp import decode_webp, webp_size

EXPECTED = "JPEG, PNG, GIF, WebP, or BMP without run-length encoding"
FINE, BROKEN, TOO_LARGE = range(3)  # what became of an image of a batch


def _format(header: tf.Tensor) -> tf.Tensor:
    """Returns what the first bytes say: 0 to 4 for JPEG, PNG, GIF, BMP, WebP, 5 for all else."""
    matches = tf.stack(
        [
            starts_with(header, 0, JPEG_MAGIC),
            starts_with(header, 0, b"\x89PNG\r\n\x1a\n"),
            starts_with(header, 0, b"GIF87a") | starts_with(header, 0, b"GIF89a"),
            starts_with(header, 0, b"BM"),
            starts_with(header, 0, b"RIFF")
            & starts_with(header, 8, b"WEBPVP8")
            & tf.reduce_any(header[15] == list(b" LX")),
            tf.constant(True),
        ]
    )
    return tf.argmax(tf.cast(matches, tf.int32), output_type=tf.int32)


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
    return apart.call(_reader(max_pixels, exact), image_bytes)


@functools.cache
def _reader(max_pixels: int, exact: bool) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Traces `_read_any` once, which takes two seconds; each graph that reads images calls it."""
    return tf.function(
        lambda image_bytes: _read_any(image_bytes, max_pixels, exact),
        autograph=False,
        input_signature=[tf.TensorSpec([], tf.string)],
    )


def _read_any(image_bytes: tf.Tensor, max_pixels: int, exact: bool) -> tuple[tf.Tensor, tf.Tensor]:
    header = read_header(image_bytes)

    def sized(size_of: Callable, decode: Callable) -> tuple[tf.Tensor, tf.Tensor]:
        size = size_of(header)
        small = tf.reduce_prod(size) <= max_pixels
        return decode_where(small, lambda: decode(image_bytes, header, size)), size

    def stock(image_bytes: tf.Tensor, *_) -> tf.Tensor:
        return attempt(decode_stock, image_bytes)

    pixels, size = tf.switch_case(
        _format(header),
        [
            lambda: read_jpeg(image_bytes, max_pixels, exact),
            lambda: sized(png_size, functools.partial(decode_png, exact=exact)),
            lambda: sized(gif_size, decode_gif),
            lambda: sized(bmp_size, decode_bmp if exact else stock),
            lambda: sized(webp_size, decode_webp),
            lambda: (BLANK, tf.zeros([2], tf.int64)),
        ],
    )
    return tf.ensure_shape(pixels, [None, None, 3]), size
