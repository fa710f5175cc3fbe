"""A copy of a model for inference: BatchNorm folded into the convolutions, all in one dtype."""

import keras
import numpy as np
from keras import layers, ops

from align_tf.initialization import no_init_weights
from align_tf.model import AlignModel, AlignVisionModel, open_for_change

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
    return copy


def _fold_batch_norms(source: AlignVisionModel, target: AlignVisionModel) -> None:
    owners = zip((source, *source.blocks), (target, *target.blocks), strict=True)
    for source_owner, target_owner in owners:
        for name in CONVOLUTIONS:
            if hasattr(source_owner, f"{name}_conv"):
                _fold(source_owner, target_owner, name)


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
    identity = layers.Identity(name=f"{name}_bn", dtype=target.dtype_policy)
    with open_for_change(target):
        target._tracker.untrack(getattr(target, f"{name}_bn"))
        setattr(target, f"{name}_bn", identity)


def _float64(weight: keras.Variable) -> np.ndarray:
    return ops.convert_to_numpy(weight).astype(np.float64)
