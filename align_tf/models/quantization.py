"""Keras's quantization in a model's configuration, by which a `.keras` file of it loads again."""

from typing import Any

import keras
from keras import layers

# The layers of the models that Keras quantizes.
QUANTIZABLE = (layers.Dense, layers.Embedding)


def quantizations(model: keras.Model) -> dict[str, dict[str, Any]]:
    """Collects how the layers of a model were quantized, by their paths."""
    return {
        layer.path: {
            "mode": layer.quantization_mode,
            "config": keras.saving.serialize_keras_object(
                getattr(layer, "quantization_config", None)  # newer than Keras 3.10
            ),
        }
        for layer in model._flatten_layers(include_self=False)
        if layer.quantization_mode and isinstance(layer, QUANTIZABLE)
    }


def quantize_again(model: keras.Model, quantized: dict[str, dict[str, Any]]) -> None:
    """Quantizes the layers of a new model as those of another were; their weights come later."""
    for layer in model._flatten_layers(include_self=False):
        if layer.path in quantized and not layer.quantization_mode:
            row = quantized[layer.path]
            config = keras.saving.deserialize_keras_object(row["config"])
            layer.quantize(row["mode"], **({} if config is None else {"config": config}))
