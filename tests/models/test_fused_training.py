"""Fused training: values, gradients and averages beside the plain layers' own."""

import functools

import keras
import numpy as np
import pytest

from align_tf.configuration.blocks import BlockSpec
from align_tf.models import fused_training
from align_tf.models.activation import get_activation
from align_tf.models.bert import EncoderLayer
from align_tf.models.efficientnet import MBConvBlock

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

BATCH = np.random.default_rng(1).normal(size=(4, 9, 7, 8))


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
    assert fused_training.can_fuse(block.activation, block.depthwise_bn, x) == (
        x.dtype != "float64"
    )
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


@pytest.fixture(scope="module")
def exactly(tiny_config):
    """What the plain layers compute of a block in float64, once for each shape."""
    return functools.cache(
        lambda shape, frozen: train(make_block(tiny_config, shape, "float64", frozen), BATCH)
    )


@pytest.mark.parametrize("shape", BLOCKS)
@pytest.mark.parametrize("frozen", [False, True])
# In bfloat16 the plain layers are up to 0.032 off themselves.
@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        ("float32", 1e-5),
        ("mixed_bfloat16", 5e-2),
        pytest.param("bfloat16", 5e-2, marks=pytest.mark.slow),
        pytest.param("float16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_a_block_trains_as_its_layers_do(policy, tolerance, frozen, shape, tiny_config, exactly):
    found = train(make_block(tiny_config, shape, policy, frozen), BATCH)
    exact = exactly(shape, frozen)
    assert found["y"].dtype == keras.DTypePolicy(policy).compute_dtype
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        error = np.abs(np.asarray(found[name], "float64") - np.asarray(value))
        assert error.max() <= tolerance * np.abs(value).max(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_gelu_and_its_gradient(dtype, tolerance):
    import tensorflow as tf

    def run(gelu, dtype):
        x = tf.constant(np.linspace(-6, 6, 97), dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = gelu(x)
        return y, tape.gradient(y, x, tf.cast(tf.range(97), dtype))

    for found, exact in zip(
        run(fused_training.gelu, dtype), run(get_activation("gelu"), "float64"), strict=True
    ):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, "float64") - np.asarray(exact))
        assert error.max() <= tolerance * np.abs(exact).max()


def test_where_a_gpu_or_tpu_computes_the_plain_layers_run(tiny_config, monkeypatch):
    import tensorflow as tf

    block, x = make_block(tiny_config, "plain", "float32", False), np.zeros(2, "float32")
    gelu = get_activation("gelu")
    for device in ("GPU", "TPU"):
        monkeypatch.setattr(
            tf.config, "list_logical_devices", lambda kind, d=device: [d] * (kind == d)
        )
        assert not fused_training.can_fuse(block.activation, block.depthwise_bn, x)
        assert fused_training.gelu_for(gelu, x) is gelu
    monkeypatch.undo()
    assert fused_training.can_fuse(block.activation, block.depthwise_bn, x)


def test_only_exact_gelu_has_another_function_to_train_with():
    x = np.zeros(2, "float32")
    assert fused_training.gelu_for(get_activation("gelu"), x) is fused_training.gelu
    assert fused_training.gelu_for(get_activation("gelu_new"), x) is get_activation("gelu_new")
    exact = np.zeros(2, "float64")
    assert fused_training.gelu_for(get_activation("gelu"), exact) is get_activation("gelu")


def test_an_encoder_layer_trains_as_in_float64(tiny_config):
    """The feed-forward layer's gelu is the one of its own gradient in float32."""

    def gradients(dtype):
        import tensorflow as tf

        keras.utils.set_random_seed(0)
        layer = EncoderLayer(tiny_config.text_config, 2, name="layer_0", dtype=dtype)
        layer.build()
        for weight in layer.weights:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))
        layer.dropout.rate = layer.attention.dropout.rate = 0.0
        x = tf.constant(np.random.default_rng(1).normal(size=(3, 5, 16)), dtype)
        with tf.GradientTape() as tape:
            y, _ = layer(x, np.ones((3, 1, 1, 5), bool), training=True)
            loss = tf.reduce_sum(y * tf.cast(tf.reshape(tf.range(240) % 7, y.shape), dtype))
        return tape.gradient(loss, [weight.value for weight in layer.trainable_variables])

    exact = gradients("float64")
    largest = max(np.abs(gradient).max() for gradient in exact)  # those of the keys' bias are zero
    for found, expected in zip(gradients("float32"), exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6 * largest)
