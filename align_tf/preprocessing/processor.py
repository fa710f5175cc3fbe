"""AlignProcessor: images and texts to the model's inputs, behind one call."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow as tf

from align_tf.preprocessing import image_processing
from align_tf.preprocessing.decoding import reading
from align_tf.preprocessing.image_processing import AlignImageProcessor
from align_tf.preprocessing.tokenization import AlignTokenizer

RETURN_TENSORS = ("tf", "np")


class AlignProcessor:
    """Prepares images and texts for AlignModel.

    Args:
        image_processor: the image half.
        tokenizer: the text half.
    """

    def __init__(self, image_processor: AlignImageProcessor, tokenizer: AlignTokenizer):
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "AlignProcessor":
        """Reads both halves of a checkpoint folder, a hub id or `align-tiny`.

        Args:
            name_or_path: as `hub.resolve_folder` takes it.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.
        """
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        return cls(
            AlignImageProcessor.from_pretrained(name_or_path, **options),
            AlignTokenizer.from_pretrained(name_or_path, **options),
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes both halves to a checkpoint folder."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: str | bool = "max_length",
        max_length: int | None = 64,
        truncation: bool = True,
        images_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Prepares images, texts or both.

        Args:
            images: a PIL image, an array (h, w), (h, w, 1) or (h, w, 3) of uint8, a path, the
                bytes of a file, or n of them: a list, or an array (n, h, w, 3).
            text: a string or a list of m.
            padding: as AlignTokenizer takes it.
            max_length: as AlignTokenizer takes it.
            truncation: as AlignTokenizer takes it.
            images_kwargs: settings of the image processor, for this call.
            text_kwargs: padding, max_length and truncation, for this call.
            common_kwargs: {"return_tensors": "tf"} or "np". Without it, what Keras's backend
                takes: TensorFlow tensors on TensorFlow, NumPy arrays elsewhere.

        Returns:
            input_ids, token_type_ids and attention_mask int32 (m, t), pixel_values float32
            (n, h, w, 3): what there is a text or an image for.

        Raises:
            ValueError: there is neither image nor text, an image cannot be decoded, or a setting
                is unknown.
            FileNotFoundError: a path is no file.
        """
        if images is None and text is None:
            raise ValueError("expected images, text or both, found neither")
        text_settings = {
            "padding": padding,
            "max_length": max_length,
            "truncation": truncation,
            **(text_kwargs or {}),
        }
        common = {"return_tensors": _native_tensors(), **(common_kwargs or {})}
        _check_names("text_kwargs", text_settings, ("padding", "max_length", "truncation"))
        _check_names("common_kwargs", common, ("return_tensors",))
        kind = common["return_tensors"]
        if kind not in RETURN_TENSORS:
            raise ValueError(
                f"return_tensors={kind!r}: expected one of {', '.join(RETURN_TENSORS)}"
            )
        output = {}
        if text is not None:
            output.update(self.tokenizer(text, **text_settings))
        if images is not None:
            processor = self._image_processor(images_kwargs)
            output["pixel_values"] = _pixel_values(processor, _as_list(images))
        if kind == "np":
            return {name: value.numpy() for name, value in output.items()}
        return output

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Joins the tokens of one sequence of ids into text."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Joins the tokens of each sequence of ids into text."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)

    def _image_processor(self, images_kwargs: Mapping[str, Any] | None) -> AlignImageProcessor:
        if not images_kwargs:
            return self.image_processor
        known = (*image_processing.FILE_DEFAULTS, *image_processing.OWN_DEFAULTS)
        _check_names("images_kwargs", images_kwargs, known)
        return AlignImageProcessor.from_dict({**self.image_processor.to_dict(), **images_kwargs})


def _native_tensors() -> str:
    return "tf" if keras.backend.backend() == "tensorflow" else "np"


def _check_names(where: str, settings: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(known)}")


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return list(images)
    batch = getattr(images, "ndim", 0) == 4  # an array or a tensor
    return list(images) if batch else [images]


def _pixel_values(processor: AlignImageProcessor, images: Sequence[Any]) -> tf.Tensor:
    """Takes PIL images, arrays, paths and bytes to float32 (n, h, w, 3)."""
    if not images:
        raise ValueError("images: expected one or more, found an empty list")
    rows: dict[int, tf.Tensor] = {}
    encoded: dict[int, tuple[str, bytes]] = {}  # name, bytes
    for i, image in enumerate(images):
        if isinstance(image, str | os.PathLike):
            path = pathlib.Path(image)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such image file")
            encoded[i] = (str(path), path.read_bytes())
        elif isinstance(image, bytes):
            encoded[i] = (f"images[{i}]", image)
        else:
            array = _to_array(image, f"images[{i}]", processor.apply_exif_orientation)
            rows[i] = processor.preprocess_array(array)
    if encoded:
        names, contents = zip(*encoded.values(), strict=True)
        decoded = tf.unstack(_decode(processor, names, contents))
        rows.update(zip(encoded, decoded, strict=True))
    return tf.stack([rows[i] for i in range(len(images))])


def _decode(
    processor: AlignImageProcessor, names: Sequence[str], contents: Sequence[bytes]
) -> tf.Tensor:
    """Takes encoded images to float32 (n, h, w, 3); an error names the image."""
    if None in processor.output_shape:
        return tf.stack(
            [_decode_alone(processor, *pair) for pair in zip(names, contents, strict=True)]
        )
    pixels, problems, sizes = processor.try_pixel_values_of(contents)
    for name, problem, (height, width) in zip(names, problems.numpy(), sizes.numpy(), strict=True):
        if problem == image_processing.TOO_LARGE:
            raise ValueError(
                f"{name}: the image declares {width} x {height} pixels, "
                f"expected {processor.max_image_pixels} at most"
            )
        if problem:
            raise ValueError(_broken(name))
    return pixels


def _decode_alone(processor: AlignImageProcessor, name: str, content: bytes) -> tf.Tensor:
    try:
        return processor.decode_and_preprocess(tf.constant(content))
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(_broken(name)) from error


def _broken(name: str) -> str:
    return f"{name}: not a decodable image ({reading.EXPECTED})"


def _to_array(image: Any, name: str, upright: bool) -> np.ndarray:
    """Takes a PIL image or an array to uint8 (h, w, 3)."""
    if isinstance(image, PIL.Image.Image):
        image = PIL.ImageOps.exif_transpose(image) if upright else image
        try:
            return np.asarray(image.convert("RGB"))
        except OSError as error:  # it was opened lazily
            raise ValueError(_broken(getattr(image, "filename", "") or name)) from error
    array = np.asarray(image)
    gray = array[..., None] if array.ndim == 2 else array
    if gray.ndim != 3 or gray.shape[-1] not in (1, 3) or not gray.size or gray.dtype != np.uint8:
        raise ValueError(
            f"{name}: expected uint8 of shape (h, w, 3), found {array.dtype} {array.shape}"
        )
    return np.broadcast_to(gray, (*gray.shape[:2], 3))
