"""Weights as int8: the rounding, the axis of the scales, and a model that computes with them."""

import keras
import numpy as np
import pytest

from align_tf import AlignModel

if keras.backend.backend() != "tensorflow":
    pytest.skip("the graph is TensorFlow's", allow_module_level=True)

from align_tf.quantization import (
    dequantize_variables,
    output_axis,
    quantize_variables,
    quantize_weights,
)


def test_each_output_channel_has_its_own_scale():
    values, scales = quantize_weights([[1.0, -254.0, 0.0], [0.5, 120.0, 0.0]])
    assert values.dtype == np.int8 and scales.dtype == np.float32
    assert values.tolist() == [[127, -127, 0], [64, 60, 0]]
    np.testing.assert_allclose(scales, [[1 / 127, 2, 1]])


@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_the_error_is_half_a_scale_at_most(axis):
    weights = np.random.default_rng(0).normal(size=(3, 3, 8, 4)).astype("float32")
    values, scales = quantize_weights(weights, axis)
    assert scales.size == weights.shape[axis]
    assert (np.abs(values * scales - weights) <= scales * 0.5001).all()
    assert (np.abs(values).max() == 127).all()


def test_the_output_channels_of_each_kind_of_weight():
    assert output_axis("align/vision_model/block_1/depthwise_conv/kernel") == -2
    assert output_axis("align/vision_model/block_1/expand_conv/kernel") == -1
    assert output_axis("align/text_model/embeddings/word_embeddings/embeddings") == 0


def test_a_model_computes_with_the_int8_weights():
    model = AlignModel.from_pretrained("align-tiny")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 96, 96, 3)).astype("float32")
    expected = model.get_image_features(pixels).numpy()
    weights = model.vision_model.weights
    stored = quantize_variables(weights)
    with keras.StatelessScope(dequantize_variables(weights, stored)):
        features = model.get_image_features(pixels).numpy()
    norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosines = (features * expected).sum(-1) / norms
    assert (cosines > 0.999).all() and (features != expected).any()
    size = sum(np.prod(part.shape) * part.dtype.size for parts in stored for part in parts)
    assert size < 0.3 * sum(4 * np.prod(weight.shape) for weight in weights)
