"""Small pictures of image files, to be shown."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

import PIL.Image
import PIL.ImageOps

JPEG_QUALITY = 85
BACKGROUND = "#ffffff"  # of what is transparent


def thumbnail(source: str | os.PathLike | bytes | None, side: int) -> PIL.Image.Image | None:
    """Reads a picture to fit a square.

    Args:
        source: an image file, or its bytes.
        side: of the square, in pixels; a smaller picture is enlarged.

    Returns:
        An RGB image; None where there is no picture, or none that Pillow reads.
    """
    if source is None:
        return None
    try:
        with _without_warnings(), _opened(source) as picture:
            picture.draft("RGB", (side, side))
            picture = _upright(picture).convert("RGBA")
    except Exception:  # the parsers of Pillow's formats raise kinds of their own
        return None
    ground = PIL.Image.new("RGBA", picture.size, BACKGROUND)
    picture = PIL.Image.alpha_composite(ground, picture).convert("RGB")
    scale = side / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Pillow mends, and of large pictures
        yield


def _opened(source: str | os.PathLike | bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Turns a picture as its EXIF says, where Pillow can read that."""
    picture.load()  # outside of the block: what is broken in it is not EXIF
    try:
        return PIL.ImageOps.exif_transpose(picture)
    except Exception:  # of a broken EXIF as many kinds as it has parts
        return picture


def to_jpeg(picture: PIL.Image.Image) -> bytes:
    """Encodes a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
