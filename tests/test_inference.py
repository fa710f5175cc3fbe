"""The towers for inference: folded BatchNorm, constants, dtypes, the first token alone."""

import dataclasses

import keras
import numpy as np
import pytest

from align_tf import AlignModel, AlignTextModel

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from align_tf.inference import fixed_image_tower, fixed_text_tower, fold_batch_norm


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


@pytest.fixture
def tokens(pairs):
    return tuple(
        tf.constant(values)
        for values in (pairs["input_ids"], pairs["attention_mask"], pairs["input_ids"] % 2)
    )


def test_folding_leaves_the_states_and_the_model_as_they_are(model, pixels):
    before = model.vision_model.get_weights()
    folded = fold_batch_norm(model.vision_model, "float32")
    assert not any("_bn" in weight.path for weight in folded.weights)
    states = [
        tower(pixels, output_hidden_states=True).hidden_states
        for tower in (folded, model.vision_model)
    ]
    for ours, reference in zip(*states, strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(ours, reference, rtol=0, atol=2e-6 * scale)
    for array, weight in zip(before, model.vision_model.get_weights(), strict=True):
        np.testing.assert_array_equal(array, weight)


def test_fixed_towers_give_the_features_of_the_model(model, pixels, tokens):
    ids, mask, types = tokens
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    for ours, reference in (
        (fixed_image_tower(model, "float32")(pixels), model.get_image_features(pixels)),
        (fixed_text_tower(model, "float32")(*tokens), model.get_text_features(inputs)),
    ):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_the_graph_of_a_tower_holds_its_weights(model, pixels):
    tower = fixed_image_tower(model, "float32")
    before = tower(pixels).numpy()
    assert not tower.get_concrete_function().captured_inputs
    weights = model.get_weights()
    model.set_weights([np.zeros_like(weight) for weight in weights])
    after = tower(pixels).numpy()
    model.set_weights(weights)
    np.testing.assert_array_equal(before, after)
    assert before.any()


def test_bfloat16_towers_compute_in_bfloat16(model, pixels, tokens):
    for build, inputs in ((fixed_image_tower, (pixels,)), (fixed_text_tower, tokens)):
        exact, rounded = (build(model, dtype)(*inputs).numpy() for dtype in ("float32", "bfloat16"))
        assert rounded.dtype == np.float32
        cosines = np.sum(exact * rounded, axis=-1) / (
            np.linalg.norm(exact, axis=-1) * np.linalg.norm(rounded, axis=-1)
        )
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
