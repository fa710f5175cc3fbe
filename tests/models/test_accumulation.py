"""Accumulation by cached embeddings and rematerialisation: other memory, the same step."""

import keras
import numpy as np
import pytest
from keras import ops

import align_tf.models.contrastive
from align_tf import AlignModel
from align_tf.models.contrastive import similarities

pytestmark = pytest.mark.slow


class PartByPart(AlignModel):
    """The plain step on a forward pass that runs every second row, then the others."""

    def call(self, inputs, training=False, **options):
        parts = [{key: value[start::2] for key, value in inputs.items()} for start in (0, 1)]
        outputs = [super(PartByPart, self).call(part, training=training) for part in parts]
        return {
            key: ops.reshape(ops.stack([output[key] for output in outputs], axis=1), (-1, 8))
            for key in ("image_embeds", "text_embeds")
        }


def make_batch() -> dict[str, np.ndarray]:
    """Eight pairs, two of them of one picture, one of them absent; some texts are padded."""
    rng = np.random.default_rng(0)
    attention_mask = np.ones((8, 6), "int32")
    attention_mask[2:6, 4:] = 0
    return {
        "pixel_values": rng.random((8, 16, 16, 3), "float32"),
        "input_ids": rng.integers(1, 40, (8, 6), "int32") * attention_mask,
        "attention_mask": attention_mask,
        "image_ids": np.array([0, 1, 2, 3, 4, 5, 6, 0], "int32"),
        "sample_weight": np.array([1, 1, 2, 1, 0, 1, 1, 3], "float32"),
    }


def train(model, *, batch_size=8, sigmoid=False, **options):
    """Three epochs; returns the weights and the history."""
    if sigmoid:
        model.use_sigmoid_loss(8)
    model.text_projection.kernel.regularizer = keras.regularizers.L2(0.01)
    before = model.get_weights()
    model.compile(optimizer=keras.optimizers.SGD(0.3), **options)
    fitted = model.fit(make_batch(), batch_size=batch_size, epochs=3, shuffle=False, verbose=0)
    after = model.get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 1e-2
    return after, fitted.history


def make(kind, config, **options) -> AlignModel:
    keras.utils.set_random_seed(0)
    return kind(config, **options)


@pytest.fixture(scope="module")
def of_parts(short_config):
    """Trained part by part, by the plain step on the sigmoid loss."""
    return train(make(PartByPart, short_config), sigmoid=True)


@pytest.fixture(scope="module")
def accumulated(short_config):
    """Trained with accumulation; beside it, the shapes of logits that the loss was given."""
    made = set()

    def record(*arrays):
        logits = similarities(*arrays)
        made.add(tuple(logits.shape))
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_tf.models.contrastive, "similarities", record)
        return train(make(AlignModel, short_config), sigmoid=True, accumulation=2), made


@pytest.fixture(scope="module")
def of_five(steady_config):
    """Trained by the plain step on batches of 5 pairs, the last of 3."""
    return train(make(AlignModel, steady_config), batch_size=5)


def assert_equal(one, other, atol=1e-5):
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    assert set(one[1]) == set(other[1])
    for key, value in one[1].items():
        np.testing.assert_allclose(value, other[1][key], atol=max(atol, 2e-5), err_msg=key)


def test_accumulation_takes_the_step_of_the_whole_batch(accumulated, of_parts):
    """With the dropout, drop-connect and BatchNorm statistics of its parts."""
    assert_equal(accumulated[0], of_parts)


def test_no_part_compares_all_pairs(accumulated):
    """Of 8 pairs in two parts the loss makes (4, 8) logits, and never (8, 8)."""
    assert accumulated[1] == {(4, 8)}


def test_accumulation_of_a_batch_that_does_not_divide(steady_config, of_five):
    """Five pairs, then three, in four parts."""
    found = train(make(AlignModel, steady_config), batch_size=5, accumulation=4)
    assert_equal(found, of_five)


def test_accumulation_compiled_by_xla(steady_config, of_five):
    found = train(make(AlignModel, steady_config), batch_size=5, accumulation=4, jit_compile=True)
    assert_equal(found, of_five)


def test_accumulation_with_a_scaled_loss(steady_config):
    """Held to the plain step in float16, which leaves out the same steps."""
    options = {"dtype": "mixed_float16"}
    expected = train(make(AlignModel, steady_config, **options))
    model = make(AlignModel, steady_config, **options)
    found = train(model, accumulation=2)
    assert model.optimizer.initial_scale == 2**15
    assert_equal(found, expected, atol=0.01)


def test_rematerialised_blocks_take_the_same_step(short_config):
    expected = train(make(AlignModel, short_config))
    assert_equal(train(make(AlignModel, short_config), remat=True), expected)


def test_rematerialised_blocks_take_the_same_accumulated_step(short_config, accumulated):
    found = train(make(AlignModel, short_config), sigmoid=True, remat=True, accumulation=2)
    assert_equal(found, accumulated[0])


def test_a_short_part_moves_batch_norm_by_pictures_of_the_batch(short_config):
    """Three rows in four parts: pictures of zeros would have it learn of what is not there."""
    model = AlignModel(short_config)
    model.unfreeze_batch_norm()
    model.compile(optimizer=keras.optimizers.SGD(0.0), accumulation=4)
    batch = {key: value[:3] for key, value in make_batch().items()}
    tower = model.vision_model
    states = ops.convert_to_numpy(tower.stem_conv(tower.stem_pad(batch["pixel_values"])))
    average = np.zeros(states.shape[-1])
    for row in (0, 1, 2, 0):
        average = 0.99 * average + 0.01 * states[row].mean((0, 1))
    model.train_on_batch(batch)
    np.testing.assert_allclose(tower.stem_bn.moving_mean, average, rtol=1e-4, atol=1e-7)
