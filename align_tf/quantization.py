"""Weights as int8, with a scale for each output channel."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

LEVELS = 127  # on each side of zero
# A smaller weight, or a vector, stays as it is: it would save nothing.
LEAST_SIZE = 1024


def quantize_weights(array: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Rounds weights to int8, evenly spaced around zero.

    Args:
        array: float weights.
        axis: of the output channels.

    Returns:
        int8 of the array's shape, and float32 scales, of its rank and of length 1 on all axes but
        `axis`: their product differs from the weights by half a scale at most.
    """
    array = np.asarray(array, "float32")
    others = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    largest = np.abs(array).max(axis=others, keepdims=True)
    scales = np.where(largest > 0, largest / LEVELS, 1).astype("float32")
    return np.rint(array / scales).astype("int8"), scales


def output_axis(path: str) -> int:
    """Returns the axis of a Keras weight's output channels, by the last part of its path."""
    if "depthwise" in path:
        return -2  # (h, w, channels, 1)
    return 0 if path.endswith("embeddings") else -1  # a row of a table is looked up alone


def quantize_variables(weights: Iterable) -> list[tuple[tf.Variable, ...]]:
    """Stores Keras variables as int8 and scales, small ones and vectors as they are.

    Args:
        weights: Keras variables, built and filled.

    Returns:
        For each of them the variables to save: (int8, scales), or (the weight,).
    """
    return [_store(weight) for weight in weights]


def dequantize_variables(weights: Iterable, stored: Iterable) -> list[tuple]:
    """Returns each Keras variable with the float tensor that its stored form stands for.

    `with keras.StatelessScope(dequantize_variables(weights, stored)):` has the layers compute with
    them; as what is stored are variables, the graph's optimiser does not fold it back into floats.
    """
    return [
        (weight, tf.cast(parts[0], tf.float32) * parts[1] if len(parts) == 2 else parts[0])
        for weight, parts in zip(weights, stored, strict=True)
    ]


def _store(weight: Any) -> tuple[tf.Variable, ...]:
    array = weight.numpy()
    if array.ndim < 2 or array.size < LEAST_SIZE:
        return (tf.Variable(array, trainable=False),)
    return tuple(
        tf.Variable(part, trainable=False)
        for part in quantize_weights(array, output_axis(weight.path))
    )
