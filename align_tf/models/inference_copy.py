"""A copy of a model for inference: BatchNorm folded, and what TensorFlow's CPU kernels fuse."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras import layers

from align_tf.models.activation import get_activation
from align_tf.models.align import AlignModel
from align_tf.models.bert import SelfAttention
from align_tf.models.folding import fold
from align_tf.models.fused_training import area_mean
from align_tf.models.plain_copy import assign, unfilled_copy
from align_tf.models.surgery import open_for_change
from align_tf.models.text import HEADED
from align_tf.models.vision import AlignVisionModel

# Convolutions that a BatchNorm follows: of the tower, and of a block as far as it has them.
CONVOLUTIONS = ("stem", "expand", "depthwise", "project")


def inference_copy(model: AlignModel, dtype: str) -> AlignModel:
    """Copies a model, with the scale and offset of each BatchNorm in its convolution.

    LoRA is merged into the weights. Of what Keras quantized to int8 or int4 the copy has the
    weights in floating point; it does not round the inputs of a layer, as Keras does in int8. On
    align-tiny that leaves a cosine of 0.9999 between the embeddings of a text.

    Args:
        model: the model; it stays as it is.
        dtype: of weights and activations. What is folded is computed in float64 and rounded once.

    Returns:
        A model without BatchNorm, that gives what `model` gives without `training`.

    Raises:
        ValueError: the model computes what its configuration does not say, a weight holds NaN or
            infinity or more than the dtype can hold, or is quantized to another thing.
    """
    copy, values = unfilled_copy(model, dtype)
    for owner in (copy.vision_model, *copy.vision_model.blocks):
        for name in CONVOLUTIONS:
            if hasattr(owner, f"{name}_conv"):
                _fold(owner, name, values)
    weights = copy._relative_weights()
    for path, value in values.items():
        assign(weights[path], value, path)
    _use_fast_kernels(copy.vision_model)
    for block in copy.text_model.blocks[:-1]:  # in the last one the first token alone asks
        _join_projections(block.attention)
    return copy


def _use_fast_kernels(tower: AlignVisionModel) -> None:
    reduces = [block.se_reduce for block in tower.blocks]
    for owner in (tower, *tower.blocks, *reduces):
        if owner.activation is get_activation("swish"):
            owner.activation = swish_product
    for block in tower.blocks:
        _replace(block, "se_squeeze", squeeze)


def swish_product(x: tf.Tensor) -> tf.Tensor:
    """Without the gradient of its own that Keras's has: with it, the graph optimiser would not fuse
    the product with a convolution."""
    return x * tf.sigmoid(x)


def squeeze(x: tf.Tensor) -> tf.Tensor:
    """`area_mean` to the bit, by a third of its operations where the images' size is known."""
    _, h, w, c = x.shape
    if h is None or w is None:
        return area_mean(x)
    weights = tf.fill((1, 1, h * w), tf.constant(2**-10, x.dtype))
    sums = tf.reshape(tf.matmul(weights, tf.reshape(x, (-1, h * w, c))), (-1, 1, 1, c))
    return tf.cast(tf.cast(sums, tf.float32) / (h * w * 2**-10), x.dtype)


def _fold(owner: layers.Layer, name: str, values: dict[str, Any]) -> None:
    """Puts the convolution `name` and its BatchNorm into the convolution, out of `values`."""
    convolution, norm = getattr(owner, f"{name}_conv"), getattr(owner, f"{name}_bn")
    path = f"{convolution.path}/kernel"
    statistics = [
        values.pop(f"{norm.path}/{part}")
        for part in ("gamma", "beta", "moving_mean", "moving_variance")
    ]
    kernel, offset = fold(convolution, values.pop(path), norm, statistics)
    layer = Offset(len(offset), name=f"{name}_offset", dtype=owner.dtype_policy)
    assign(convolution.kernel, kernel, path)
    assign(layer.bias, offset, norm.path)
    _replace(owner, f"{name}_bn", layer)


def _join_projections(attention: SelfAttention) -> None:
    apart = [getattr(attention, name) for name in HEADED]
    joined = JoinedProjections([layer.kernel.shape for layer in apart], dtype=apart[0].dtype_policy)
    joined.kernel.assign(tf.concat([layer.kernel for layer in apart], axis=1))
    joined.bias.assign(tf.concat([layer.bias for layer in apart], axis=0))
    with open_for_change(attention):
        for name, layer in zip(HEADED, apart, strict=True):
            attention._tracker.untrack(layer)
            setattr(attention, name, None)
        attention.project = joined


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


class JoinedProjections(layers.Layer):
    """Query, key and value as one product, where all tokens ask: three of that width are hardly
    shared by two cores where tokens are few, one is."""

    def __init__(self, shapes: list[tuple[int, int]], *, dtype: Any):
        super().__init__(name="project", dtype=dtype)
        self.widths = [width for _, width in shapes]
        shape = (shapes[0][0], sum(self.widths))
        self.kernel = self.add_weight(name="kernel", shape=shape, initializer="zeros")
        self.bias = self.add_weight(name="bias", shape=shape[1:], initializer="zeros")
        self.built = True

    def call(self, asking: tf.Tensor, inputs: tf.Tensor) -> list[tf.Tensor]:
        return tf.split(self.joined(inputs), self.widths, axis=1)

    def joined(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns query, key and value side by side, in each of which the heads are."""
        return tf.nn.bias_add(tf.matmul(inputs, self.kernel), self.bias)
