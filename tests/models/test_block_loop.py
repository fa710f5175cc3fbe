"""The loop over alike blocks on JAX: the numbers of the blocks called one by one."""

import dataclasses
import types

import keras
import numpy as np
import pytest
from keras import ops

from align_tf.configuration.blocks import block_table
from align_tf.configuration.text import AlignTextConfig
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.models import block_loop
from align_tf.models.bert import EncoderLayer
from align_tf.models.efficientnet import MBConvBlock

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="the loop is JAX's")

VISION = AlignVisionConfig(width_coefficient=0.25, depth_coefficient=1.0, drop_connect_rate=0.5)
TEXT = AlignTextConfig(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
)

PRODUCT = {"dimension_numbers": (((2,), (0,)), ((), ()))}
WHOLE, EACH = {"feature_group_count": 1}, {"feature_group_count": 288}


def image_blocks():
    """A block, and two that are alike but for the chance of their branch."""
    keras.utils.set_random_seed(0)
    spec = next(spec for spec in block_table(VISION) if spec.residual)
    specs = [
        dataclasses.replace(spec, drop_rate=0.5, kernel_size=5),
        dataclasses.replace(spec, drop_rate=0.25),
        dataclasses.replace(spec, drop_rate=0.5),
    ]
    blocks = [MBConvBlock(VISION, spec, name=f"block_{i}") for i, spec in enumerate(specs)]
    for block in blocks:
        block.build()
    return blocks, spec.in_channels


def text_blocks():
    keras.utils.set_random_seed(0)
    blocks = [EncoderLayer(TEXT, 2, name=f"layer_{i}") for i in range(3)]
    for block in blocks:
        block.build()
    return blocks


def one_by_one(blocks, x, *constants, keep_inputs_alone=False):
    for block in blocks:
        x = block(x, *constants, training=True)
        x = x[0] if isinstance(x, tuple) else x
    return x


def step_of(run, blocks, x, *constants):
    """The outputs, the gradients of their squares, and what the blocks' variables become."""
    import jax

    variables = [variable for block in blocks for variable in block.variables]
    trained = [variable.trainable for variable in variables]

    def loss(weights):
        scope = keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True)))
        with scope:
            outputs = run(blocks, x, *constants)
        after = [scope.get_current_value(v) for v in variables]
        return ops.sum(outputs**2), (outputs, after)

    weights = [variable.value for variable in variables]
    gradients, (outputs, after) = jax.jit(jax.grad(loss, has_aux=True, allow_int=True))(weights)
    return outputs, [g for g, keep in zip(gradients, trained, strict=True) if keep], after


@pytest.mark.parametrize("keep_inputs_alone", [False, True])
def test_image_blocks_take_the_step_of_blocks_one_by_one(keep_inputs_alone):
    blocks, channels = image_blocks()
    assert [len(run) for run in block_loop._runs(blocks)] == [1, 2]
    x = np.random.default_rng(0).normal(size=(6, 8, 8, channels)).astype("float32")

    def looped(*arguments):
        return block_loop.run_blocks(*arguments, keep_inputs_alone=keep_inputs_alone)

    apart, together = (step_of(run, blocks, x) for run in (one_by_one, looped))
    for expected, found in zip(apart, together, strict=True):
        for one, other in zip(
            *(value if isinstance(value, list) else [value] for value in (expected, found)),
            strict=True,
        ):
            scale = max(float(np.abs(one).max()), 1.0)
            np.testing.assert_allclose(np.asarray(other), np.asarray(one), atol=2e-5 * scale)
    # Branches are dropped, each by its own seed, and the averages of each block move.
    assert not np.allclose(np.asarray(together[0]), np.asarray(one_by_one_inference(blocks, x)))


def one_by_one_inference(blocks, x):
    for block in blocks:
        x = block(x, training=False)
    return x


def test_text_layers_take_the_step_of_layers_one_by_one():
    blocks = text_blocks()
    assert [len(run) for run in block_loop._runs(blocks)] == [3]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 16)).astype("float32")
    mask = np.arange(5)[None, None, None] < np.array([5, 3, 1, 4])[:, None, None, None]
    apart, together = (step_of(run, blocks, x, mask) for run in (one_by_one, block_loop.run_blocks))
    np.testing.assert_allclose(np.asarray(together[0]), np.asarray(apart[0]), atol=1e-5)
    for one, other in zip(apart[1] + apart[2], together[1] + together[2], strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "trainable", False),
        lambda block: setattr(block.dropout, "rate", 0.0),
        lambda block: block.intermediate.enable_lora(2),
        lambda block: setattr(block.output_norm, "epsilon", 1e-3),
        lambda block: setattr(block, "activation", ops.relu),
    ],
    ids=["frozen", "without dropout", "LoRA", "epsilon", "activation"],
)
def test_a_layer_that_computes_otherwise_has_a_loop_of_its_own(change):
    blocks = text_blocks()
    change(blocks[1])
    assert [len(run) for run in block_loop._runs(blocks)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "shapes", "options", "kept"),
    [
        ("conv_general_dilated", ((2, 73, 73, 48), (1, 1, 48, 288)), WHOLE, False),
        ("conv_general_dilated", ((2, 10, 10, 640), (1, 1, 640, 3840)), WHOLE, True),
        ("conv_general_dilated", ((2, 73, 73, 288), (3, 3, 1, 288)), EACH, False),
        ("conv_general_dilated", ((2, 73, 73, 288), (5, 5, 1, 288)), EACH, True),
        ("dot_general", ((2, 64, 768), (768, 3072)), PRODUCT, True),
        ("dot_general", ((2, 64, 64), (64, 64)), PRODUCT, False),
        ("reduce_sum", ((2, 73, 73, 288),), {}, True),
        ("mul", ((2, 73, 73, 288), (288,)), {}, False),
    ],
)
def test_what_is_dear_is_kept(name, shapes, options, kept):
    arrays = [np.empty(shape, np.uint8) for shape in shapes]
    assert block_loop.worth_keeping(types.SimpleNamespace(name=name), *arrays, **options) is kept
