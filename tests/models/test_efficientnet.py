"""The image tower, stage by stage: table, padding, block, drop-connect, BatchNorm."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignConfig, AlignVisionConfig, AlignVisionModel
from align_tf.configuration.blocks import BlockSpec, block_table
from align_tf.configuration.vision import VISION_ACTIVATIONS
from align_tf.models.activation import get_activation
from align_tf.models.efficientnet import MBConvBlock


def test_block_table_of_a_tiny_tower(tiny_config):
    config = dataclasses.replace(tiny_config.vision_config, depthwise_padding=[1])
    # in, out, kernel, stride, expand, residual, drop rate, square padding
    assert block_table(config) == [
        BlockSpec(8, 8, 3, 1, 1, False, 0.0, False),
        BlockSpec(8, 8, 5, 2, 2, False, pytest.approx(0.2 / 3), True),
        BlockSpec(8, 8, 5, 1, 2, True, pytest.approx(0.4 / 3), False),
    ]


def test_block_table_of_b7():
    blocks = block_table(AlignConfig.from_preset("align-base").vision_config)
    assert len(blocks) == 55
    assert blocks[0] == BlockSpec(64, 32, 3, 1, 1, False, 0.0, False)
    assert blocks[4] == BlockSpec(32, 48, 3, 2, 6, False, pytest.approx(0.2 * 4 / 55), False)
    assert blocks[54] == BlockSpec(640, 640, 3, 1, 6, True, pytest.approx(0.2 * 54 / 55), False)
    assert [i for i, b in enumerate(blocks) if not b.residual] == [0, 4, 11, 18, 28, 38, 51]
    assert [i for i, b in enumerate(blocks) if b.stride == 2] == [4, 11, 18, 38]
    outputs = [b.out_channels for b in blocks if not b.residual]
    assert outputs == [32, 48, 80, 160, 224, 384, 640]


# size: height after the stem and after each stage of EfficientNet's strides
HEIGHTS = {
    32: [16, 16, 8, 4, 2, 2, 1, 1],
    33: [16, 16, 8, 4, 2, 2, 1, 1],
    35: [17, 17, 8, 4, 2, 2, 1, 1],
    289: [144, 144, 72, 36, 18, 18, 9, 9],
    345: [172, 172, 86, 43, 21, 21, 10, 10],
}


@pytest.mark.parametrize("size", HEIGHTS)
def test_padding_does_not_look_at_the_size(size):
    # "same" would give 145, 73, 37, 19 and 10 at 289 pixels.
    config = AlignVisionConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=32)
    model = AlignVisionModel(config)
    states = model(np.zeros((1, size, size, 3), "float32"), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == HEIGHTS[size]
    assert [state.shape[2] for state in states] == HEIGHTS[size]


def test_stem_pads_after_the_image(tiny_config):
    model = AlignVisionModel(tiny_config.vision_config)
    model.stem_conv.kernel.assign(np.ones((3, 3, 3, 8)))

    def stem(size: int) -> np.ndarray:
        ones = np.ones((1, size, size, 3), "float32")
        return ops.convert_to_numpy(model.stem_conv(model.stem_pad(ones)))[0, :, :, 0] / 3

    np.testing.assert_array_equal(stem(4), [[9, 6], [6, 4]])
    np.testing.assert_array_equal(stem(5), [[9, 9], [9, 9]])


@pytest.mark.parametrize(
    ("kernel_size", "square", "expected"),
    [
        (3, False, [[9, 6], [6, 4]]),
        (3, True, [[4, 6], [6, 9]]),
        (5, False, [[16, 12], [12, 9]]),
        (5, True, [[9, 12], [12, 16]]),
    ],
)
def test_a_stride_of_two_pads_as_the_reference(kernel_size, square, expected, tiny_config):
    spec = BlockSpec(8, 8, kernel_size, 2, 1, False, 0.0, square)
    block = MBConvBlock(tiny_config.vision_config, spec, name="block")
    block.build()
    block.depthwise_conv.kernel.assign(np.ones((kernel_size, kernel_size, 8, 1)))
    x = block.depthwise_conv(block.depthwise_pad(np.ones((1, 4, 4, 8), "float32")))
    np.testing.assert_array_equal(ops.convert_to_numpy(x)[0, :, :, 0], expected)


def test_stages_equal_the_reference(golden):
    arrays, folder = golden("towers")
    model = AlignVisionModel.from_pretrained(folder)
    pixels = arrays["inputs/pixel_values"]
    expected = [arrays[f"expected/vision_{i}"] for i in range(5)]

    stem = model.activation(model.stem_bn(model.stem_conv(model.stem_pad(pixels))))
    np.testing.assert_allclose(ops.convert_to_numpy(stem), expected[0], atol=1e-5)
    # Each block alone, from the reference's own input.
    for block, before, after in zip(model.blocks, expected[:-1], expected[1:], strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(block(before)), after, atol=1e-5)

    output = model(pixels, output_hidden_states=True)
    for state, value in zip(output.hidden_states, expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(state), value, atol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(output.pooler_output), arrays["expected/image_features"], atol=1e-5
    )


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooling(kind, tiny_config):
    config = dataclasses.replace(tiny_config.vision_config, pooling_type=kind)
    output = AlignVisionModel(config)(np.random.default_rng(0).random((2, 24, 16, 3), "float32"))
    last = ops.convert_to_numpy(output.last_hidden_state)
    assert last.shape == (2, 6, 4, 8)
    pooled = getattr(last.reshape(2, -1, 8), kind)(axis=1)
    np.testing.assert_allclose(ops.convert_to_numpy(output.pooler_output), pooled, atol=1e-6)


def test_drop_connect_drops_whole_samples(tiny_config):
    spec = BlockSpec(8, 8, 3, 1, 2, True, 0.5, False)
    block = MBConvBlock(tiny_config.vision_config, spec, name="block")
    block.build()
    keras.utils.set_random_seed(0)
    branch = np.random.default_rng(0).random((64, 5, 5, 8), "float32") + 1
    kept = ops.convert_to_numpy(block.drop_connect(branch, training=True)) / branch
    factors = kept[:, 0, 0, 0]
    np.testing.assert_allclose(kept, np.broadcast_to(factors[:, None, None, None], kept.shape))
    assert set(factors.round(5)) == {0.0, 2.0}

    # The same through the block: a dropped sample passes unchanged.
    outputs = ops.convert_to_numpy(block(branch, training=True))
    unchanged = (outputs == branch).all(axis=(1, 2, 3))
    assert 10 < unchanged.sum() < 54
    assert not (ops.convert_to_numpy(block(branch)) == branch).all(axis=(1, 2, 3)).any()


def test_drop_connect_grows_with_depth_and_skips_first_blocks(tiny_config):
    blocks = AlignVisionModel(tiny_config.vision_config).blocks
    assert [hasattr(block, "drop_connect") for block in blocks] == [False, False, True]
    assert blocks[2].drop_connect.rate == pytest.approx(0.2 * 2 / 3)


def test_batch_norm_constants(tiny_config):
    model = AlignVisionModel(tiny_config.vision_config)
    norms = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) == 9
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.99, 1e-3)}


def test_batch_norm_averages_move_by_keras_momentum(tiny_config):
    norm = AlignVisionModel(tiny_config.vision_config).stem_bn
    batch = np.full((2, 4, 4, 8), 3.0, "float32")
    batch[0] = 1.0  # mean 2, variance 1
    norm(batch, training=True)
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_mean), np.full(8, 0.02), rtol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_variance), np.ones(8), rtol=1e-5)


@pytest.mark.parametrize(("ratio", "squeezed"), [(0.25, 2), (0.5, 4), (0.01, 1)])
def test_squeeze_is_a_share_of_the_block_input(ratio, squeezed, tiny_config):
    config = dataclasses.replace(tiny_config.vision_config, squeeze_expansion_ratio=ratio)
    blocks = AlignVisionModel(config).blocks
    assert [block.se_reduce.filters for block in blocks] == [squeezed] * 3
    assert [block.se_expand.filters for block in blocks] == [8, 16, 16]


def test_initializers(tiny_config):
    config = dataclasses.replace(tiny_config.vision_config, initializer_range=0.5)
    model = AlignVisionModel(dataclasses.replace(config, width_coefficient=2.0))
    for kernel in (model.blocks[1].expand_conv.kernel, model.blocks[1].depthwise_conv.kernel):
        assert np.std(ops.convert_to_numpy(kernel)) == pytest.approx(0.5, rel=0.1)
    assert not ops.convert_to_numpy(model.blocks[0].se_reduce.bias).any()


# activation: its values at -2, -0.5, 0 and 1.5, computed by torch in float64
ACTIVATION_VALUES = {
    "swish": [-0.238406, -0.188770, 0.0, 1.226362],
    "silu": [-0.238406, -0.188770, 0.0, 1.226362],
    "gelu": [-0.045500, -0.154269, 0.0, 1.399789],
    "gelu_new": [-0.045402, -0.154286, 0.0, 1.399572],
    "relu": [0.0, 0.0, 0.0, 1.5],
    "selu": [-1.520166, -0.691758, 0.0, 1.576051],
    "mish": [-0.252501, -0.220744, 0.0, 1.403378],
}


@pytest.mark.parametrize("name", VISION_ACTIVATIONS)
def test_activations(name):
    x = np.array([-2.0, -0.5, 0.0, 1.5], "float32")
    actual = ops.convert_to_numpy(get_activation(name)(x))
    np.testing.assert_allclose(actual, ACTIVATION_VALUES[name], atol=2e-6)


def test_a_callable_activation_is_used(tiny_config):
    config = dataclasses.replace(tiny_config.vision_config, hidden_act=ops.zeros_like)
    output = AlignVisionModel(config)(np.ones((1, 16, 16, 3), "float32"), output_hidden_states=True)
    assert not ops.convert_to_numpy(output.hidden_states[0]).any()


def test_other_channel_counts(tiny_config):
    config = dataclasses.replace(tiny_config.vision_config, num_channels=1)
    output = AlignVisionModel(config)({"pixel_values": np.ones((2, 16, 16, 1), "float32")})
    assert tuple(output.pooler_output.shape) == (2, 8)
