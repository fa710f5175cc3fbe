"""Ghost BatchNorm: the arithmetic of tf.keras 2, in a layer, a tower, a recipe."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignVisionConfig, AlignVisionModel
from align_tf.models.ghost_batch_norm import GhostBatchNormalization
from align_tf.training import Recipe, run

ROWS, SIZE = 12, 4


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    return (rng.normal(3, 2, (ROWS, 5, 3, 2)) * np.arange(1, ROWS + 1)[:, None, None, None]).astype(
        "float32"
    )


@pytest.fixture
def layer():
    layer = GhostBatchNormalization(SIZE, momentum=0.9, epsilon=1e-3)
    layer.build((None, 5, 3, 2))
    layer.gamma.assign([1.5, 0.5])
    layer.beta.assign([0.1, -0.2])
    return layer


def test_parts_are_normalised_as_tf_keras_2_did_it(layer, inputs):
    # Its reshape to (virtual_batch_size, -1, ...) has the parts in the second dimension.
    parts = inputs.astype("float64").reshape(SIZE, ROWS // SIZE, 5, 3, 2)
    mean, variance = (f(parts, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    expected = (parts - mean) / np.sqrt(variance + 1e-3) * [1.5, 0.5] + [0.1, -0.2]
    found = ops.convert_to_numpy(layer(inputs, training=True))
    np.testing.assert_allclose(found, expected.reshape(inputs.shape), rtol=1e-4, atol=1e-5)
    for moving, start, value in (
        (layer.moving_mean, 0, mean),
        (layer.moving_variance, 1, variance),
    ):
        moved = 0.9 * start + 0.1 * value.mean((0, 1, 2, 3))
        np.testing.assert_allclose(ops.convert_to_numpy(moving), moved, rtol=1e-5)
    # One part's rows are three apart, not side by side.
    other = inputs.copy()
    other[[0, 3, 6, 9]] = 7
    changed = ops.convert_to_numpy(layer(other, training=True)) != found
    assert sorted(set(np.nonzero(changed)[0] % 3)) == [0]


def test_where_it_does_not_train_it_is_batch_norm(layer, inputs):
    plain = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3)
    plain.build((None, 5, 3, 2))
    plain.set_weights(layer.get_weights())
    expected = ops.convert_to_numpy(plain(inputs))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(inputs)), expected)
    layer.trainable = False
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(inputs, training=True)), expected)
    copy = GhostBatchNormalization.from_config(layer.get_config())
    assert (copy.virtual_batch_size, copy.momentum) == (SIZE, 0.9)


def test_a_batch_that_is_no_multiple_is_refused(layer, inputs):
    with pytest.raises(ValueError, match=r"virtual_batch_size=4: expected a divisor of .*, 10"):
        layer(inputs[:10], training=True)


def test_half_precision_is_summed_in_single(inputs):
    layer = GhostBatchNormalization(SIZE, dtype="mixed_bfloat16")
    layer.build(inputs.shape)
    found = layer(ops.cast(1000 + inputs, "bfloat16"), training=True)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert np.isfinite(ops.convert_to_numpy(ops.cast(found, "float32"))).all()


def test_a_tower_of_one_part_is_that_of_batch_norm(tiny_config):
    """So is what a part of the fused path computes, which a ghost does not take."""
    config = dataclasses.replace(tiny_config.vision_config, drop_connect_rate=0.0)
    pixels = np.random.default_rng(0).random((4, 16, 16, 3), "float32")
    found, plain = {}, AlignVisionModel(config)
    for size in (None, 4, 2):
        model = AlignVisionModel(dataclasses.replace(config, virtual_batch_size=size))
        model.set_weights(plain.get_weights())
        outputs = model(pixels, training=True)
        found[size] = [ops.convert_to_numpy(outputs[1]), *model.get_weights()]
    for ours, theirs in zip(found[4], found[None], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert np.abs(found[2][0] - found[None][0]).max() > 1e-2


def test_the_configuration_keeps_it():
    config = AlignVisionConfig(virtual_batch_size=16)
    assert AlignVisionConfig.from_dict(config.to_dict()) == config
    assert "virtual_batch_size" not in AlignVisionConfig().to_dict()
    with pytest.raises(ValueError, match="virtual_batch_size"):
        AlignVisionConfig(virtual_batch_size=0)


def test_a_recipe_has_it(checkpoint, processor, tmp_path):
    places = {"model": str(checkpoint), "data": str(tmp_path), "output": str(tmp_path)}
    recipe = Recipe(**places, steps=2, batch_size=4, virtual_batch_size=2, batch_norm="trained")
    model = run.make_model(recipe.counted(2), processor, 1)
    norms = [norm for _, norm in model.vision_model._batch_norms()]
    assert {(type(n).__name__, n.virtual_batch_size) for n in norms} == {
        ("GhostBatchNormalization", 2)
    }
    assert model.config.vision_config.to_dict()["virtual_batch_size"] == 2
