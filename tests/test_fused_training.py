"""The fused training of a block: values, gradients and averages beside the plain layers' own."""

import keras
import numpy as np
import pytest

from align_tf import fused_training
from align_tf.efficientnet import BlockSpec, MBConvBlock

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="elsewhere the layers are Keras's own"
)

# what of a block differs: kernel_size, stride, expand_ratio, square_padding
BLOCKS = {
    "plain": (3, 1, 2, False),
    "does not expand": (3, 1, 1, False),
    "wide filter": (5, 1, 2, False),
    "wide filter, strides": (5, 2, 2, True),
    "filter of seven": (7, 1, 2, False),
}


def make_block(config, shape, policy, frozen):
    kernel_size, stride, expand_ratio, square_padding = BLOCKS[shape]
    spec = BlockSpec(8, 8, kernel_size, stride, expand_ratio, stride == 1, 0.0, square_padding)
    block = MBConvBlock(config.vision_config, spec, name="block", dtype=policy)
    block.build()
    rng = np.random.default_rng(0)
    for weight in block.weights:
        positive = weight.name in ("gamma", "moving_variance")
        weight.assign(rng.uniform(0.5, 1.5, weight.shape) - (0 if positive else 1))
    for layer in block._flatten_layers():
        if frozen and isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    return block


def train(block, batch):
    """What a step computes: the output, the gradients, and what the averages become."""
    import tensorflow as tf

    x = tf.Variable(tf.cast(batch, block.compute_dtype))
    assert fused_training.fits(block.activation, block.depthwise_bn, x) == (x.dtype != "float64")
    averages = {weight.path: weight for weight in block.weights if "moving" in weight.name}
    weights = {w.path: w.value for w in block.weights if w.path not in averages}

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch(list(weights.values()))
            y = block(x, training=True)
            towards = tf.reshape(tf.range(tf.size(y)) % 7 - 2, y.shape)
            loss = tf.reduce_sum(y * tf.cast(towards, y.dtype))
        return y, tape.gradient(loss, {"x": x, **weights})

    y, gradients = step()
    return {"y": y, **gradients, **averages}


@pytest.mark.parametrize("shape", BLOCKS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 1e-5), ("mixed_bfloat16", 3e-2)])
def test_a_block_trains_as_its_layers_do(policy, tolerance, frozen, shape, tiny_config):
    batch = np.random.default_rng(1).normal(size=(4, 9, 7, 8))
    found = train(make_block(tiny_config, shape, policy, frozen), batch)
    exact = train(make_block(tiny_config, shape, "float64", frozen), batch)
    assert found["y"].dtype == keras.DTypePolicy(policy).compute_dtype
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        error = np.abs(np.asarray(found[name], "float64") - np.asarray(value))
        assert error.max() <= tolerance * np.abs(value).max(), name
