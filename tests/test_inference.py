"""Copies for inference: folded BatchNorm, dtypes, the first token alone."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignModel, AlignTextModel
from align_tf.inference import inference_copy


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
