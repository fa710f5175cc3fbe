"""Small pictures of image files, to be shown."""

import io
import os

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
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            picture.draft("RGB", (side, side))
            picture = PIL.ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return None
    ground = PIL.Image.new("RGBA", picture.size, BACKGROUND)
    picture = PIL.Image.alpha_composite(ground, picture).convert("RGB")
    return PIL.ImageOps.contain(picture, (side, side), PIL.Image.Resampling.LANCZOS)


def to_jpeg(picture: PIL.Image.Image) -> bytes:
    """Encodes a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
