"""A copy of a model for inference: BatchNorm folded, and what TensorFlow's CPU kernels fuse."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from align_tf.models.activation import get_activation
from align_tf.models.align import AlignModel
from align_tf.models.fused_training import area_mean
from align_tf.models.initialization import no_init_weights
from align_tf.models.surgery import open_for_change
from align_tf.models.vision import AlignVisionModel

# Convolutions that a BatchNorm follows: of the tower, and of a block as far as it has them.
CONVOLUTIONS = ("stem", "expand", "depthwise", "project")


def inference_copy(model: AlignModel, dtype: str) -> AlignModel:
    """Copies a model, with the scale and offset of each BatchNorm in its convolution.

    Args:
        model: the model; it stays as it is.
        dtype: of weights and activations. What is folded is computed in float64 and rounded once.

    Returns:
        A model without BatchNorm, that gives what `model` gives without `training`.
    """
    with no_init_weights():
        copy = AlignModel.from_config({**model.get_config(), "dtype": dtype})
    values = model._relative_weights()
    for path, weight in copy._relative_weights().items():
        if "_bn/" not in path:
            weight.assign(ops.cast(values[path].value, weight.dtype))
    _fold_batch_norms(model.vision_model, copy.vision_model)
    _use_fast_kernels(copy.vision_model)
    return copy


def _fold_batch_norms(source: AlignVisionModel, target: AlignVisionModel) -> None:
    owners = zip((source, *source.blocks), (target, *target.blocks), strict=True)
    for source_owner, target_owner in owners:
        for name in CONVOLUTIONS:
            if hasattr(source_owner, f"{name}_conv"):
                _fold(source_owner, target_owner, name)


def _use_fast_kernels(tower: AlignVisionModel) -> None:
    reduces = [block.se_reduce for block in tower.blocks]
    for owner in (tower, *tower.blocks, *reduces):
        if owner.activation is get_activation("swish"):
            owner.activation = swish_product
    for block in tower.blocks:
        _replace(block, "se_squeeze", area_mean)


def swish_product(x: tf.Tensor) -> tf.Tensor:
    """Without the gradient of its own that Keras's has: with it, the graph optimiser would not fuse
    the product with a convolution."""
    return x * tf.sigmoid(x)


def _fold(source: layers.Layer, target: layers.Layer, name: str) -> None:
    """Puts the convolution `name` and its BatchNorm of one owner into that of another."""
    kernel = _float64(getattr(source, f"{name}_conv").kernel)
    norm, convolution = getattr(source, f"{name}_bn"), getattr(target, f"{name}_conv")
    scale = _float64(norm.gamma) / np.sqrt(_float64(norm.moving_variance) + norm.epsilon)
    offset = _float64(norm.beta) - _float64(norm.moving_mean) * scale
    if isinstance(convolution, layers.DepthwiseConv2D):
        scale = scale[:, None]  # its kernel is (h, w, channels, 1)
    convolution.kernel.assign(kernel * scale)
    layer = Offset(len(offset), name=f"{name}_offset", dtype=target.dtype_policy)
    layer.bias.assign(offset)
    _replace(target, f"{name}_bn", layer)


def _replace(owner: layers.Layer, attribute: str, new: Callable) -> None:
    with open_for_change(owner):
        owner._tracker.untrack(getattr(owner, attribute))
        setattr(owner, attribute, new)


class Offset(layers.Layer):
    """What is left of a BatchNorm: an offset for each channel, by the operation that TensorFlow's
    graph optimiser fuses with the convolution before it and the swish after it."""

    def __init__(self, channels: int, *, name: str, dtype: Any):
        super().__init__(name=name, dtype=dtype)
        self.bias = self.add_weight(name="bias", shape=(channels,), initializer="zeros")
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.nn.bias_add(inputs, self.bias)


def _float64(weight: keras.Variable) -> np.ndarray:
    return ops.convert_to_numpy(weight).astype(np.float64)
