"""Images to pixel_values, inside the TensorFlow graph."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf import addresses, files, hub
from align_tf.graph_errors import plain_errors
from align_tf.preprocessing import apart, image_input
from align_tf.preprocessing.batch_feature import BatchFeature, as_tensors
from align_tf.preprocessing.decoding import reading
from align_tf.preprocessing.decoding.orientation import exif_orientation, turn_upright
from align_tf.preprocessing.decoding.reading import BROKEN, FINE, TOO_LARGE
from align_tf.preprocessing.levels import levels
from align_tf.preprocessing.resampling import BICUBIC, BILINEAR, NEAREST, resize

PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"

# What a preprocessor_config.json that leaves a key out means: the defaults of Hugging Face's
# EfficientNetImageProcessor. The class's own are align-base's.
FILE_DEFAULTS = {
    "do_resize": True,
    "size": {"height": 346, "width": 346},
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": 289, "width": 289},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "include_top": True,
}
MAX_IMAGE_PIXELS = 178_956_970  # what Pillow reads, with a warning above half as many
# Settings that the reference does not have, written where they differ from these.
OWN_DEFAULTS = {
    "mode": "hf",
    "apply_exif_orientation": False,
    "max_image_pixels": MAX_IMAGE_PIXELS,
}
MODES = ("hf", "original")
IMAGES_WITHOUT_GRAPH = 8
IMAGES_IN_FLIGHT = 8  # of a batch, decoded at a time

# All of it is TensorFlow operations, so that AutoGraph has nothing to convert.
_graph = tf.autograph.experimental.do_not_convert


class AlignImageProcessor:
    """Decodes, resizes, crops and scales images as Hugging Face's EfficientNetImageProcessor does.

    Args:
        do_resize: resizes to `size`, whatever the aspect ratio.
        size: height and width in pixels, or one number for both.
        resample: 0 (nearest), 2 (bilinear) or 3 (bicubic).
        do_center_crop: crops `crop_size` out of the middle; what is smaller is padded with zeros.
        crop_size: height and width in pixels, or one number for both.
        do_rescale: multiplies by `rescale_factor`.
        rescale_factor: of the levels 0..255.
        rescale_offset: subtracts 1 after rescaling.
        do_normalize: subtracts `image_mean` and divides by `image_std`.
        image_mean: one number for each channel.
        image_std: one number for each channel.
        include_top: divides by `image_std` once more, as EfficientNet's classifier wants it.
        mode: "hf" gives the pixels of Hugging Face's processor over Pillow 13, bit for bit;
            "original" those of the original training pipeline, which resized by
            `tf.image.resize` (bilinear, not antialiased).
        apply_exif_orientation: turns a JPEG photograph upright; the reference does not.
        max_image_pixels: an image whose header declares more is refused before it is decoded.

    Raises:
        ValueError: a setting is not one of those named.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        *,
        do_resize: bool = True,
        size: Mapping[str, int] | int = 346,
        resample: int = BILINEAR,
        do_center_crop: bool = True,
        crop_size: Mapping[str, int] | int = 289,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 127.5,
        rescale_offset: bool = True,
        do_normalize: bool = False,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        include_top: bool = False,
        mode: str = "hf",
        apply_exif_orientation: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected {' or '.join(map(repr, MODES))}")
        if resample not in (NEAREST, BILINEAR, BICUBIC):
            raise ValueError(
                f"resample={resample!r}: expected 0 (nearest), 2 (bilinear) or 3 (bicubic)"
            )
        for name, value in (("image_mean", image_mean), ("image_std", image_std)):
            if np.shape(value) != (3,):
                raise ValueError(f"{name}={value!r}: expected 3 numbers")
        if max_image_pixels < 1:
            raise ValueError(f"max_image_pixels={max_image_pixels!r}: expected 1 or more")
        self.do_resize = do_resize
        self.size = _height_width("size", size)
        self.resample = int(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = _height_width("crop_size", crop_size)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.rescale_offset = rescale_offset
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.include_top = include_top
        self.mode = mode
        self.apply_exif_orientation = apply_exif_orientation
        self.max_image_pixels = int(max_image_pixels)
        self._extra: dict[str, Any] = {}  # keys of the file that have no use here
        self._make_graphs()

    def _make_graphs(self) -> None:
        """Prepares the calls from Python, traced once each."""
        self.preprocess_array = tf.function(
            self.preprocess_pixels, input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)]
        )
        self._try_pixel_values = tf.function(
            self.try_pixel_values, input_signature=[tf.TensorSpec([None], tf.string)]
        )
        self._images_seen = 0

    def __getstate__(self) -> dict[str, Any]:
        # For copies and other processes: graphs can be neither copied nor pickled.
        graphs = ("preprocess_array", "_try_pixel_values")
        return {name: value for name, value in vars(self).items() if name not in graphs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_graphs()

    def __call__(
        self, images: Any, return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """Prepares images.

        Args:
            images: a PIL image of 8 bits a channel, an array of uint8, (h, w), (h, w, 1),
                (h, w, 3) or with transparency, which is left out, (h, w, 4); a path, the bytes of
                a file; or n of them: a list, a tuple, or an array (n, h, w, 3).
            return_tensors: as AlignProcessor takes it.
            **settings: of this class, for this call.

        Returns:
            `pixel_values`, float32 (n, h, w, 3).

        Raises:
            ValueError: an image cannot be read; the message names it. Or a setting is not one of
                this class, or has no such value.
            FileNotFoundError: a path is no file.
        """
        processor = self.with_settings(settings)
        pixel_values = image_input.pixel_values(processor, images)
        return as_tensors({"pixel_values": pixel_values}, return_tensors)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """Does what a call does, under Hugging Face's other name for it.

        Args:
            images, return_tensors, **settings: as a call takes them.
        """
        return self(images, return_tensors, **settings)

    def with_settings(self, settings: Mapping[str, Any]) -> "AlignImageProcessor":
        """Returns a processor that differs in some settings, or this one where there are none.

        Raises:
            ValueError: a setting is not one of this class, or has no such value.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        known = (*FILE_DEFAULTS, *OWN_DEFAULTS)
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(
                f"unknown settings of images: {', '.join(unknown)}; expected {', '.join(known)}"
            )
        return self.from_dict({**self.to_dict(), **settings}) if settings else self

    def __repr__(self) -> str:
        names = (*FILE_DEFAULTS, *OWN_DEFAULTS)
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({settings})"

    # --- files -----------------------------------------------------------------------------

    @classmethod
    @hub.names_options
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "AlignImageProcessor":
        """Reads preprocessor_config.json, or in its absence processor_config.json.

        Args:
            name_or_path: a checkpoint folder, or what `hub.resolve_folder` takes besides.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.

        Raises:
            FileNotFoundError: the folder has neither file.
            ValueError: the file cannot be read, or a setting is not supported.
        """
        folder = hub.resolve_settings(
            name_or_path,
            (PREPROCESSOR_NAME, PROCESSOR_NAME),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        nested = folder / PROCESSOR_NAME
        if (folder / PREPROCESSOR_NAME).is_file() or not nested.is_file():
            return cls.from_dict(files.read_json(folder / PREPROCESSOR_NAME))
        values = files.read_json(nested).get("image_processor")
        if not isinstance(values, dict):
            raise ValueError(f"{nested}: expected the key 'image_processor'")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AlignImageProcessor":
        """Builds the processor from the keys of a preprocessor_config.json."""
        defaults = {**FILE_DEFAULTS, **OWN_DEFAULTS}
        given = {k: v for k, v in values.items() if k in defaults and v is not None}
        with files.values_of(PREPROCESSOR_NAME):
            processor = cls(**{**defaults, **given})
        processor._extra = {k: v for k, v in values.items() if k not in defaults}
        return processor

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys of preprocessor_config.json, unknown ones it was read with included."""
        own = {name: getattr(self, name) for name in OWN_DEFAULTS}
        return {
            **self._extra,
            "image_processor_type": "EfficientNetImageProcessor",
            **{name: getattr(self, name) for name in FILE_DEFAULTS},
            **{name: value for name, value in own.items() if value != OWN_DEFAULTS[name]},
        }

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes preprocessor_config.json."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        files.write_text(addresses.place(folder) / PREPROCESSOR_NAME, text)

    # --- the graph -------------------------------------------------------------------------

    @property
    def output_shape(self) -> list[int | None]:
        """Height, width and channels of an image's pixel_values; None where it is its own."""
        size = {"height": None, "width": None}
        if self.do_center_crop:
            size = self.crop_size
        elif self.do_resize:
            size = self.size
        return [size["height"], size["width"], 3]

    @property
    def largest_value(self) -> float:
        """The largest number, without its sign, that pixel_values of an image may hold."""
        return float(np.abs(self._levels()).max())

    @_graph
    def decode(self, image_bytes: tf.Tensor) -> tf.Tensor:
        """Decodes one image.

        Args:
            image_bytes: JPEG, PNG, GIF (its first frame), BMP or WebP, scalar string.

        Returns:
            uint8 (h, w, 3).

        Raises:
            tf.errors.InvalidArgumentError: it is none of these, broken, or declares more than
                max_image_pixels.
        """
        pixels, problem, size = self._read(image_bytes)
        with plain_errors():  # of a call without a graph
            fine = tf.debugging.Assert(problem == FINE, [self._reason(problem, size)])
        with tf.control_dependencies([fine]):
            return tf.identity(pixels)

    @_graph
    def preprocess_pixels(self, image: tf.Tensor, crop_at: tf.Tensor | None = None) -> tf.Tensor:
        """Resizes, crops and scales uint8 (h, w, 3) to float32 (crop_h, crop_w, 3).

        Args:
            image: uint8 (h, w, 3).
            crop_at: where the crop lies among the places it can take, from top to bottom and
                from left to right, float32 (2,) in 0..1 (1 excluded); None is the middle.
        """
        if self.mode == "original" and self.do_resize:
            return self._preprocess_original(image, crop_at)
        shape = tf.shape(image)[:2]
        if self.do_resize:
            shape = tf.constant([self.size["height"], self.size["width"]])
        window = [0, 0, shape[0], shape[1]]
        crop = [shape[0], shape[1]]
        if self.do_center_crop:
            crop = [self.crop_size["height"], self.crop_size["width"]]
            window = crop_window(shape, crop, crop_at)
        if self.do_resize:
            image = resize(image, shape, window, self.resample)
        else:
            top, left, height, width = window
            image = image[top : top + height, left : left + width]
        # Zeros around an image smaller than the crop, as many above as below or one more.
        missing = [(crop[axis] - window[2 + axis]) for axis in (0, 1)]
        before = [(pad + 1) // 2 for pad in missing]
        padding = [[before[axis], missing[axis] - before[axis]] for axis in (0, 1)]
        image = tf.ensure_shape(tf.pad(image, [*padding, [0, 0]]), self.output_shape)
        return self._scale(image)

    @_graph
    def decode_and_preprocess(self, image_bytes: tf.Tensor) -> tf.Tensor:
        """Takes one encoded image, scalar string, to float32 (crop_h, crop_w, 3)."""
        return self.preprocess_pixels(self.decode(image_bytes))

    @_graph
    def pixel_values(self, image_bytes: tf.Tensor, first_row: int | tf.Tensor = 0) -> tf.Tensor:
        """Takes encoded images (n,) to float32 (n, crop_h, crop_w, 3).

        Args:
            image_bytes: string (n,).
            first_row: the number by which an error names the first of them.

        Raises:
            tf.errors.InvalidArgumentError: a row is no image, broken, or declares more pixels
                than max_image_pixels; the message names it, as in `image_bytes[3]: ...`.
        """
        pixels, problem, size = self.try_pixel_values(image_bytes)
        fine = tf.reduce_all(problem == FINE)
        # One more row, so that a batch of none has a first one too.
        problem, size = tf.pad(problem, [[0, 1]]), tf.pad(size, [[0, 1], [0, 0]])
        row = tf.argmax(tf.cast(problem != FINE, tf.int32), output_type=tf.int32)
        reason = self._reason(problem[row], size[row])
        message = tf.strings.join(
            ["image_bytes[", tf.strings.as_string(row + first_row), "]: ", reason]
        )
        with plain_errors():
            fine = tf.debugging.Assert(fine, [message])
        with tf.control_dependencies([fine]):
            return tf.identity(pixels)

    @_graph
    def try_pixel_values(
        self, image_bytes: tf.Tensor, crop_at: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Takes encoded images (n,) to pixel_values and says which of them are none.

        Args:
            image_bytes: string (n,).
            crop_at: as `preprocess_pixels` takes it, float32 (n, 2).

        Returns:
            pixel_values float32 (n, crop_h, crop_w, 3), zeros where there is a problem; the
            problem int32 (n,), one of FINE, BROKEN and TOO_LARGE; the declared height and width
            int64 (n, 2).

        Raises:
            ValueError: images of a batch keep their sizes (do_resize and do_center_crop are off).
        """
        shape = self.output_shape
        if None in shape:
            raise ValueError("a batch of images needs do_resize or do_center_crop")

        elements = (image_bytes,) if crop_at is None else (image_bytes, crop_at)

        def preprocess(
            is_fine: tf.Tensor, image: tf.Tensor, place: tf.Tensor | None = None
        ) -> tf.Tensor:
            return tf.cond(
                is_fine, lambda: self.preprocess_pixels(image, place), lambda: tf.zeros(shape)
            )

        def load(element: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            image, problem, size = self._read(element[0])
            pixels = apart.call(preprocess, problem == FINE, image, *element[1:])
            return pixels, problem, size

        return tf.map_fn(
            load,
            elements,
            fn_output_signature=(
                tf.TensorSpec(shape, tf.float32),
                tf.TensorSpec([], tf.int32),
                tf.TensorSpec([2], tf.int64),
            ),
            parallel_iterations=1 if tf.executing_eagerly() else IMAGES_IN_FLIGHT,
        )

    def try_pixel_values_of(
        self, image_bytes: Sequence[bytes]
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Does what `try_pixel_values` does, for calls from Python: the first images without a
        graph, since tracing one takes seconds."""
        self._images_seen += len(image_bytes)
        if self._images_seen <= IMAGES_WITHOUT_GRAPH:
            return self.try_pixel_values(tf.constant(image_bytes))
        return self._try_pixel_values(image_bytes)

    def _read(self, image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Decodes one image; returns its pixels, its problem and its declared size."""
        image, size = reading.read(image_bytes, self.max_image_pixels, exact=self.mode == "hf")
        is_large = tf.reduce_prod(size) > self.max_image_pixels
        problem = tf.where(is_large, TOO_LARGE, tf.where(tf.size(image) > 0, FINE, BROKEN))
        if self.apply_exif_orientation:
            orientation = exif_orientation(image_bytes)
            image = turn_upright(image, orientation)
        return image, problem, size

    def _reason(self, problem: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
        height, width = tf.unstack(tf.strings.as_string(size))
        declared = tf.strings.join(["the image declares ", width, " x ", height, " pixels, "])
        return tf.where(
            problem == TOO_LARGE,
            declared + f"expected {self.max_image_pixels} at most",
            f"not a decodable image ({reading.EXPECTED})",
        )

    def _scale(self, image: tf.Tensor) -> tf.Tensor:
        """Makes of uint8 levels what the reference does, in its order and precision."""
        if self.do_rescale and not self.do_normalize and not self.include_top:
            # A third of the time that the table takes.
            scaled = tf.cast(tf.cast(image, tf.float64) * self.rescale_factor, tf.float32)
            return scaled - float(self.rescale_offset)
        table = self._levels()
        index = tf.cast(image, tf.int32)
        if len(table) == 3 * 256:  # a table for each channel
            index += [0, 256, 512]
        return tf.gather(tf.constant(table), index)

    def _levels(self) -> np.ndarray:
        return levels(
            self.rescale_factor if self.do_rescale else None,
            self.rescale_offset,
            tuple(self.image_mean) if self.do_normalize else None,
            tuple(self.image_std),
            self.include_top,
        )

    def _preprocess_original(self, image: tf.Tensor, crop_at: tf.Tensor | None) -> tf.Tensor:
        """Resizes in float, without antialiasing, and scales what comes out of it."""
        image = tf.image.resize(image, [self.size["height"], self.size["width"]])
        if self.do_center_crop:
            crop = self.crop_size["height"], self.crop_size["width"]
            if crop_at is not None:
                top, left, height, width = crop_window(tf.shape(image)[:2], crop, crop_at)
                image = image[top : top + height, left : left + width]
            image = tf.image.resize_with_crop_or_pad(image, *crop)
        if self.do_rescale:
            image = image * self.rescale_factor - float(self.rescale_offset)
        if self.do_normalize:
            image = (image - self.image_mean) / self.image_std
        if self.include_top:
            image = image / self.image_std
        return tf.ensure_shape(image, self.output_shape)


def crop_window(
    shape: tf.Tensor, crop: Sequence[int], crop_at: tf.Tensor | None
) -> list[tf.Tensor]:
    """Returns top, left, height and width of what a crop takes out of an image."""
    spare = [tf.maximum(shape[axis] - crop[axis], 0) for axis in (0, 1)]
    if crop_at is None:
        offset = [places // 2 for places in spare]
    else:
        places = tf.cast(tf.stack(spare) + 1, tf.float32)
        offset = tf.unstack(tf.cast(crop_at * places, tf.int32))
    return [*offset, *(tf.minimum(shape[axis], crop[axis]) for axis in (0, 1))]


def _height_width(name: str, size: Mapping[str, int] | int) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    named = isinstance(size, Mapping) and set(size) == {"height", "width"}
    if not named or min(size.values()) < 1:
        raise ValueError(f"{name}={size!r}: expected a positive height and width")
    return {"height": int(size["height"]), "width": int(size["width"])}
