"""The towers for inference: BatchNorm folded into the convolutions, weights fixed in the graph."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from align_tf.embedding import TEXT_INPUTS
from align_tf.initialization import no_init_weights
from align_tf.model import AlignModel, AlignTextModel, AlignVisionModel, open_for_change

# Convolutions that a BatchNorm follows: of the tower, and of a block as far as it has them.
CONVOLUTIONS = ("stem", "expand", "depthwise", "project")


def fixed_image_tower(model: AlignModel, dtype: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns `model.get_image_features` as a graph of constants.

    Args:
        model: the model; what it learns later has no part in the graph.
        dtype: of weights and activations, `float32` or `bfloat16`.

    Returns:
        Takes `pixel_values` float32 (n, h, w, 3) to float32 (n, projection_dim).
    """
    tower = fold_batch_norm(model.vision_model, dtype)
    pixel_values = tf.TensorSpec([None, None, None, 3], tf.float32)
    return _fixed(lambda pixels: model._project_image(tower(pixels)), pixel_values)


def fixed_text_tower(model: AlignModel, dtype: str) -> Callable[..., tf.Tensor]:
    """Returns `model.get_text_features` as a graph of constants.

    Args:
        model, dtype: as in `fixed_image_tower`.

    Returns:
        Takes `embedding.TEXT_INPUTS`, int32 (n, t) each, in their order to float32
        (n, projection_dim).
    """
    tower = model.text_model
    if tower.dtype_policy.name != dtype:
        with no_init_weights():
            tower = AlignTextModel(tower.config, dtype=dtype)
        for target, source in zip(tower.weights, model.text_model.weights, strict=True):
            target.assign(keras.ops.cast(source.value, dtype))

    def embed(*tokens: tf.Tensor) -> tf.Tensor:
        inputs = dict(zip(TEXT_INPUTS, tokens, strict=True))
        return model._project_text(tower(inputs, first_token_only=True))

    return _fixed(embed, *[tf.TensorSpec([None, None], tf.int32)] * len(TEXT_INPUTS))


def fold_batch_norm(tower: AlignVisionModel, dtype: str) -> AlignVisionModel:
    """Copies an image tower, with the scale and offset of each BatchNorm in its convolution.

    Args:
        tower: the tower; it stays as it is.
        dtype: of the copy. What is folded is computed in float64 and rounded once.

    Returns:
        A tower without BatchNorm, for inference.
    """
    with no_init_weights():
        folded = AlignVisionModel(tower.config, dtype=dtype)
    for source, target in zip((tower, *tower.blocks), (folded, *folded.blocks), strict=True):
        for name in CONVOLUTIONS:
            if hasattr(source, f"{name}_conv"):
                _fold(source, target, name)
    for source, target in zip(tower.blocks, folded.blocks, strict=True):
        for name in ("se_reduce", "se_expand"):
            getattr(target, name).set_weights(getattr(source, name).get_weights())
    return folded


def _fold(source: layers.Layer, target: layers.Layer, name: str) -> None:
    """Puts the convolution `name` and its BatchNorm of one owner into that of another."""
    kernel = _float64(getattr(source, f"{name}_conv").kernel)
    norm, convolution = getattr(source, f"{name}_bn"), getattr(target, f"{name}_conv")
    scale = _float64(norm.gamma) / np.sqrt(_float64(norm.moving_variance) + norm.epsilon)
    offset = _float64(norm.beta) - _float64(norm.moving_mean) * scale
    if isinstance(convolution, layers.DepthwiseConv2D):
        scale = scale[:, None]  # its kernel is (h, w, channels, 1)
    with open_for_change(convolution):
        convolution.use_bias = True
        convolution.bias = convolution.add_weight(
            name="bias", shape=offset.shape, initializer="zeros"
        )
    convolution.kernel.assign(kernel * scale)
    convolution.bias.assign(offset)
    replaced = getattr(target, f"{name}_bn")
    with open_for_change(target):
        target._tracker.untrack(replaced)
        setattr(
            target, f"{name}_bn", layers.Identity(name=replaced.name, dtype=target.dtype_policy)
        )


def _float64(weight: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(weight), np.float64)


def _fixed(function: Callable[..., Any], *inputs: tf.TensorSpec) -> Callable:
    """Compiles a function with its variables as constants.

    One function stands in every graph that calls it, so that its constants are there once: not
    inlined, or each graph would have its own.
    """
    concrete = tf.function(function, input_signature=inputs).get_concrete_function()
    fixed = convert_variables_to_constants_v2(concrete)

    @tf.function(input_signature=inputs, experimental_attributes={"_noinline": True})
    def call(*arguments: tf.Tensor) -> tf.Tensor:
        return fixed(*arguments)[0]

    return call
