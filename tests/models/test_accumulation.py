"""Accumulation by cached embeddings and rematerialisation: other memory, the same step."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

import align_tf.models.contrastive
from align_tf import AlignModel
from align_tf.models.loss import contrastive_rows


class PartByPart(AlignModel):
    """The plain step on a forward pass that runs every second row, then the others."""

    def call(self, inputs, training=False, **options):
        parts = [{key: value[start::2] for key, value in inputs.items()} for start in (0, 1)]
        outputs = [super(PartByPart, self).call(part, training=training) for part in parts]
        return {
            key: ops.reshape(ops.stack([output[key] for output in outputs], axis=1), (-1, 8))
            for key in ("image_embeds", "text_embeds")
        }


@pytest.fixture
def batch(pairs) -> dict[str, np.ndarray]:
    """Eight pairs, two of them of one picture, one of them absent."""
    batch = {key: np.concatenate([value, value[::-1]]) for key, value in pairs.items()}
    batch["pixel_values"] = np.random.default_rng(1).random((8, 16, 16, 3), "float32")
    batch["image_ids"] = np.array([0, 1, 2, 3, 4, 5, 6, 0], "int32")
    batch["sample_weight"] = np.array([1, 1, 2, 1, 0, 1, 1, 3], "float32")
    return batch


def steady(config, **vision):
    """The configuration without dropout, and BatchNorm frozen."""
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = {"drop_connect_rate": 0.0, "freeze_batch_norm": True, **vision}
    return dataclasses.replace(
        config,
        text_config=dataclasses.replace(config.text_config, **text),
        vision_config=dataclasses.replace(config.vision_config, **vision),
    )


def train(make, batch, *, batch_size=8, epochs=3, sigmoid=False, **options):
    keras.utils.set_random_seed(0)
    model = make()
    if sigmoid:
        model.use_sigmoid_loss(8)
    model.text_projection.kernel.regularizer = keras.regularizers.L2(0.01)
    before = model.get_weights()
    model.compile(optimizer=keras.optimizers.SGD(0.3), **options)
    fitted = model.fit(batch, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    after = model.get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 1e-2
    return after, fitted.history


def assert_equal(one, other, atol=1e-5):
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    assert set(one[1]) == set(other[1])
    for key, value in one[1].items():
        np.testing.assert_allclose(value, other[1][key], atol=max(atol, 2e-5), err_msg=key)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_accumulation_takes_the_step_of_the_whole_batch(sigmoid, tiny_config, batch):
    """With the dropout, drop-connect and BatchNorm statistics of its parts."""
    expected = train(lambda: PartByPart(tiny_config), batch, sigmoid=sigmoid)
    found = train(lambda: AlignModel(tiny_config), batch, sigmoid=sigmoid, accumulation=2)
    assert_equal(found, expected)


def test_accumulation_of_a_batch_that_does_not_divide(tiny_config, batch):
    """Eight pairs in batches of 5, the last of 3, in four parts."""

    def make():
        return AlignModel(steady(tiny_config))

    expected = train(make, batch, batch_size=5)
    found = train(make, batch, batch_size=5, accumulation=4, steps_per_execution=2)
    assert_equal(found, expected)
    assert_equal(train(make, batch, batch_size=5, accumulation=4, jit_compile=True), expected)


def test_accumulation_with_a_scaled_loss(tiny_config, batch):
    def make():
        return AlignModel(steady(tiny_config), dtype="mixed_float16")

    assert_equal(train(make, batch, accumulation=2), train(make, batch), atol=0.01)


def test_no_part_compares_all_pairs(tiny_config, batch, monkeypatch):
    """Of 8 pairs in four parts the loss makes (2, 8) logits, and never (8, 8)."""
    made = set()

    def record(logits, *options):
        made.add(tuple(logits.shape))
        return contrastive_rows(logits, *options)

    monkeypatch.setattr(align_tf.models.contrastive, "contrastive_rows", record)
    train(lambda: AlignModel(steady(tiny_config)), batch, accumulation=4)
    assert made == {(2, 8)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rematerialised_blocks_take_the_same_step(accumulation, tiny_config, batch):
    options = {"accumulation": accumulation}
    expected = train(lambda: AlignModel(tiny_config), batch, **options)
    found = train(lambda: AlignModel(tiny_config), batch, remat=True, **options)
    assert_equal(found, expected)
