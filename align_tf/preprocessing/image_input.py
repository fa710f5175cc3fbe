"""Images as callers have them, PIL images, arrays, paths and bytes, to pixel_values."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow as tf

from align_tf.preprocessing.decoding import reading

WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits a channel


def _as_list(images: Any) -> list[Any]:
    if tf.is_tensor(images) and not hasattr(images, "numpy"):
        raise ValueError(
            "images: within a graph, such as a tf.data set's, there are no pictures to be seen; "
            "image_processor.decode_and_preprocess takes the bytes of one, pixel_values those of "
            "several, preprocess_pixels the uint8 pixels (height, width, 3) of one"
        )
    if tf.is_tensor(images) and images.dtype == tf.string:
        return np.reshape(images.numpy(), -1).tolist()
    if isinstance(images, list | tuple):
        return list(images)
    batch = getattr(images, "ndim", 0) == 4  # an array or a tensor
    return list(images) if batch else [images]


def pixel_values(processor: Any, images: Any) -> tf.Tensor:
    """Takes PIL images, arrays, paths and bytes to float32 (n, h, w, 3).

    Args:
        processor: an AlignImageProcessor.
        images: as it takes them.
    """
    images = _as_list(images)
    if not images:
        raise ValueError("images: expected one or more, found an empty list")
    rows: dict[int, tf.Tensor] = {}
    encoded: dict[int, tuple[str, bytes]] = {}  # name, bytes
    for i, image in enumerate(images):
        if isinstance(image, str | os.PathLike):
            encoded[i] = (str(image), _read(image))
        elif isinstance(image, bytes | bytearray):
            encoded[i] = (f"images[{i}]", bytes(image))
        elif hasattr(image, "read"):  # an open file, or BytesIO
            encoded[i] = (f"images[{i}]", image.read())
        else:
            array = _to_array(image, f"images[{i}]", processor.apply_exif_orientation)
            rows[i] = processor.preprocess_array(array)
    if encoded:
        names, contents = zip(*encoded.values(), strict=True)
        decoded = tf.unstack(_decode(processor, names, contents))
        rows.update(zip(encoded, decoded, strict=True))
    return tf.stack([rows[i] for i in range(len(images))])


def _read(path: str | os.PathLike) -> bytes:
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    return pathlib.Path(path).read_bytes()


def _decode(processor: Any, names: Sequence[str], contents: Sequence[bytes]) -> tf.Tensor:
    """Takes encoded images to float32 (n, h, w, 3); an error names the image."""
    if None in processor.output_shape:
        return tf.stack(
            [_decode_alone(processor, *pair) for pair in zip(names, contents, strict=True)]
        )
    pixels, problems, sizes = processor.try_pixel_values_of(contents)
    for name, problem, (height, width) in zip(names, problems.numpy(), sizes.numpy(), strict=True):
        if problem == reading.TOO_LARGE:
            raise ValueError(
                f"{name}: the image declares {width} x {height} pixels, "
                f"expected {processor.max_image_pixels} at most"
            )
        if problem:
            raise ValueError(_broken(name))
    return pixels


def _decode_alone(processor: Any, name: str, content: bytes) -> tf.Tensor:
    try:
        return processor.decode_and_preprocess(tf.constant(content))
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(_broken(name)) from error


def _broken(name: str) -> str:
    return f"{name}: not a decodable image ({reading.EXPECTED})"


def _to_array(image: Any, name: str, upright: bool) -> np.ndarray:
    """Takes a PIL image or an array to uint8 (h, w, 3)."""
    if isinstance(image, PIL.Image.Image):
        return _array_of_pil(image, name, upright)
    array = np.asarray(image)
    if array.dtype == object and not isinstance(image, np.ndarray):
        raise ValueError(
            f"{name}: a {type(image).__name__}: expected a PIL image, an array of uint8, a path or "
            "the bytes of a file, or a list of them"
        )
    if array.dtype != np.uint8:
        raise ValueError(
            f"{name}: an array of {array.dtype}: expected levels of 0 to 255 as uint8"
            + _conversion(array)
        )
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        first = ", channels first" if array.ndim == 3 and array.shape[0] in (1, 3) else ""
        raise ValueError(
            f"{name}: an array of shape {array.shape}{first}: expected (height, width, 3)"
        )
    return np.broadcast_to(array[..., :3], (*array.shape[:2], 3))  # without transparency


def _conversion(array: np.ndarray, image: str = "image") -> str:
    """Says what makes 8 bits of levels, where their range tells what they are."""
    if array.dtype.kind not in "biuf" or not array.size:
        return ""
    least, largest = float(np.min(array)), float(np.max(array))
    if array.dtype.kind in "bf" and least >= 0 and largest <= 1:
        way = f"({image} * 255)"
    elif least >= 0 and largest <= 255:
        way = image
    elif array.dtype.kind in "iu" and least >= 0 and largest < 2**16:
        way = f"({image} // 257)"
    else:
        return ""
    return f", such as {way}.astype('uint8')"


def _array_of_pil(image: PIL.Image.Image, name: str, upright: bool) -> np.ndarray:
    if image.mode in WIDE_MODES:  # Pillow would cut their levels off at 255
        raise ValueError(
            f"{name}: a PIL image of mode {image.mode}: expected levels of 0 to 255, in 8 bits"
            + _conversion(np.asarray(image), "np.asarray(image)")
        )
    if not all(image.size):
        raise ValueError(f"{name}: a PIL image of {image.width} x {image.height} pixels")
    image = PIL.ImageOps.exif_transpose(image) if upright else image
    try:
        return np.asarray(image.convert("RGB"))
    except OSError as error:  # it was opened lazily
        raise ValueError(_broken(getattr(image, "filename", "") or name)) from error
