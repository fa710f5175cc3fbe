"""Copies for inference: folded BatchNorm, dtypes, the first token alone, texts without padding."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from align_tf import AlignModel, AlignTextModel
from align_tf.models import packing
from align_tf.models.inference_copy import inference_copy


@pytest.fixture(scope="module")
def model(tiny_config):
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    rng = np.random.default_rng(0)
    for _, norm in model.vision_model._batch_norms():
        size = norm.gamma.shape[0]
        norm.set_weights(
            [rng.normal(1.0, 0.3, size) for _ in range(3)] + [rng.uniform(0.3, 3, size)]
        )
    return model


@pytest.fixture
def pixels():
    return np.random.default_rng(1).normal(size=(3, 19, 24, 3)).astype("float32")


def test_folding_leaves_the_states_and_the_model_as_they_are(model, pixels):
    before = model.get_weights()
    copy = inference_copy(model, "float32")
    assert not any("_bn" in weight.path for weight in copy.weights)
    states = [
        each.vision_model(pixels, output_hidden_states=True).hidden_states for each in (copy, model)
    ]
    for ours, reference in zip(*states, strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(ours, reference, rtol=0, atol=2e-6 * scale)
    copy.set_weights([np.zeros(weight.shape) for weight in copy.weights])
    for array, weight in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(array, weight)


def test_a_copy_gives_the_logits_of_the_model(model, pairs):
    copy = inference_copy(model, "float32")
    ours, reference = copy(pairs).logits_per_image, model(pairs).logits_per_image
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_copy_has_the_bias_of_the_sigmoid_loss(tiny_config, pairs):
    model = AlignModel(tiny_config)
    model.use_sigmoid_loss(16)
    copy = inference_copy(model, "float32")
    assert float(copy.logit_bias) == float(model.logit_bias) != 0.0


def test_bfloat16_copies_compute_in_bfloat16(model, pairs):
    exact, rounded = (inference_copy(model, dtype)(pairs) for dtype in ("float32", "bfloat16"))
    for name in ("image_embeds", "text_embeds"):
        cosines = ops.convert_to_numpy(ops.sum(exact[name] * rounded[name], axis=-1))
        assert 0.999 < cosines.min() < 1.0 - 1e-7


@pytest.mark.parametrize("kind", ["absolute", "relative_key", "relative_key_query"])
def test_the_first_token_alone_has_the_state_it_has_among_the_others(kind, tiny_config, pairs):
    keras.utils.set_random_seed(1)
    config = dataclasses.replace(tiny_config.text_config, position_embedding_type=kind)
    tower = AlignTextModel(config)
    tokens = {name: pairs[name] for name in ("input_ids", "attention_mask")}
    whole = tower(tokens).last_hidden_state
    first = tower(tokens, first_token_only=True).last_hidden_state
    assert first.shape == (4, 1, 16)
    np.testing.assert_allclose(first[:, 0], whole[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["absolute", "relative_key", "relative_key_query"])
def test_texts_without_their_padding_have_the_embeddings_they_have_with_it(kind, tiny_config):
    keras.utils.set_random_seed(1)
    text = dataclasses.replace(tiny_config.text_config, position_embedding_type=kind)
    model = AlignModel(dataclasses.replace(tiny_config, text_config=text))
    model.text_model.prune_heads({1: [2]})
    rng = np.random.default_rng(0)
    shape = 6, 11
    tokens = {
        "input_ids": rng.integers(0, text.vocab_size, shape).astype("int32"),
        "token_type_ids": rng.integers(0, text.type_vocab_size, shape).astype("int32"),
        # padding at the end, none, in between, before the first token, and nothing else
        "attention_mask": np.array(
            [
                [1] * 3 + [0] * 8,
                [1] * 11,
                [1, 1, 0] * 3 + [0, 1],
                [0] + [1] * 10,
                [0] * 11,
                [1] * 11,
            ],
            "int32",
        ),
    }
    packed = tf.function(functools.partial(packing.text_features, model))
    for names in (tokens, ("input_ids", "attention_mask"), ("input_ids",)):
        inputs = {name: tokens[name] for name in names}
        expected = ops.convert_to_numpy(model.get_text_features(inputs))
        actual = packed({name: tf.constant(values) for name, values in inputs.items()})
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_states_are_computed_for_tokens_alone(tiny_config, monkeypatch):
    model, rows = AlignModel(tiny_config), []
    embeddings = model.text_model.embeddings.call
    monkeypatch.setattr(
        model.text_model.embeddings,
        "call",
        lambda input_ids, **options: (
            rows.append(input_ids.shape) or embeddings(input_ids, **options)
        ),
    )
    mask = np.arange(16) < np.array([[3], [16], [2], [1]])  # 22 tokens of 64
    inputs = {"input_ids": tf.ones((4, 16), tf.int32), "attention_mask": tf.constant(mask)}
    packing.text_features(model, inputs)
    assert rows == [(1, 32)]


def test_a_text_without_padding_is_no_longer_than_the_model_allows(tiny_config):
    length = tiny_config.text_config.max_position_embeddings + 1
    with pytest.raises(ValueError, match=f"a text of {length} tokens: expected at most"):
        packing.text_features(
            AlignModel(tiny_config), {"input_ids": tf.ones((1, length), tf.int32)}
        )
