"""What exports of towers as files share: settings beside them, examples to compare by."""

from typing import Any

import keras
import numpy as np

import align_tf
from align_tf.hub import BUNDLED
from align_tf.models.align import AlignModel
from align_tf.preprocessing.processor import AlignProcessor

QUANTIZATIONS = (None, "int8")


def check_quantize(quantize: str | None) -> None:
    """Checks what weights are to be stored as.

    Raises:
        ValueError: it is neither of QUANTIZATIONS.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize={quantize!r}: expected None or 'int8'")


def tower_settings(
    model: AlignModel, processor: AlignProcessor, quantize: str | None
) -> dict[str, Any]:
    """Returns what an app feeds the towers by, and compares their embeddings by."""
    images, tokenizer = processor.image_processor, processor.tokenizer
    height, width, channels = images.output_shape
    # Levels become pixel_values by a straight line, whatever the settings that draw it.
    shape = (height or 8, width or 8, channels)
    black, white = (
        images.preprocess_array(np.full(shape, level, "uint8")).numpy()[0, 0] for level in (0, 255)
    )
    max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    settings = {
        "align_tf_version": align_tf.__version__,
        "quantize": quantize,
        "temperature": float(model.temperature.value),
        "height": height,
        "width": width,
        "scale": ((white - black) / 255).tolist(),
        "offset": black.tolist(),
        "max_length": max_length,
    }
    if model.has_logit_bias:
        settings["logit_bias"] = float(model.logit_bias.value)
    return settings


def examples(
    model: AlignModel, processor: AlignProcessor
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Embeds align-tiny's example pictures and their names.

    Returns:
        The inputs and the embeddings by name.
    """
    pictures = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    names = [picture.stem.replace("_", " ") for picture in pictures]
    inputs = processor(pictures, names, padding="longest", return_tensors="np")
    outputs = model(inputs)
    embeds = {
        name: keras.ops.convert_to_numpy(outputs[name]) for name in ("image_embeds", "text_embeds")
    }
    return dict(inputs), embeds


def least_cosine(embeds: np.ndarray, expected: np.ndarray) -> float:
    """Returns the least cosine of an embedding of unit length to the one that is expected."""
    return float(np.sum(embeds * expected, axis=-1).min())
