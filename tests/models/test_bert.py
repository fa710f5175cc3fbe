"""The text tower, stage by stage: embeddings, attention, masks, relative positions."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignTextConfig, AlignTextModel
from align_tf.models.bert import look_up

IDS = np.array([[2, 11, 5, 38, 7, 3]], "int32")


@pytest.fixture
def model(tiny_config) -> AlignTextModel:
    keras.utils.set_random_seed(0)
    config = dataclasses.replace(tiny_config.text_config, initializer_range=0.5)
    return AlignTextModel(config)


def last_state(model: AlignTextModel, inputs) -> np.ndarray:
    return ops.convert_to_numpy(model(inputs).last_hidden_state)


def test_stages_equal_the_reference(golden):
    arrays, folder = golden("towers")
    model = AlignTextModel.from_pretrained(folder)
    inputs = {k.removeprefix("inputs/"): v for k, v in arrays.items() if k.startswith("inputs/")}
    inputs.pop("pixel_values")
    states = [arrays[f"expected/text_{i}"] for i in range(3)]
    attentions = [arrays[f"expected/attention_{i}"] for i in range(2)]

    x = model.embeddings(inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
    np.testing.assert_allclose(ops.convert_to_numpy(x), states[0], atol=1e-5)
    # Each layer alone, from the reference's own input.
    mask = inputs["attention_mask"].astype(bool)[:, None, None, :]
    for index, block in enumerate(model.blocks):
        x, probs = block(states[index], mask)
        np.testing.assert_allclose(ops.convert_to_numpy(x), states[index + 1], atol=1e-5)
        np.testing.assert_allclose(ops.convert_to_numpy(probs), attentions[index], atol=1e-5)

    output = model(inputs, output_hidden_states=True, output_attentions=True)
    actual = (*output.hidden_states, *output.attentions, output.pooler_output)
    expected = (*states, *attentions, arrays["expected/pooler_output"])
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(one), other, atol=1e-5)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_equal_the_reference(kind, golden):
    arrays, folder = golden("relative_positions")
    config = dataclasses.replace(
        AlignTextConfig.from_pretrained(folder), position_embedding_type=kind
    )
    config.save_pretrained(folder)
    model = AlignTextModel.from_pretrained(folder)
    inputs = {key: arrays[f"inputs/{key}"] for key in ("input_ids", "attention_mask")}
    output = model(inputs, output_attentions=True)
    for index, attention in enumerate(output.attentions):
        expected = arrays[f"{kind}/attention_{index}"]
        np.testing.assert_allclose(ops.convert_to_numpy(attention), expected, atol=1e-5)
    for key in ("last_hidden_state", "pooler_output"):
        expected = arrays[f"{kind}/{key}"]
        np.testing.assert_allclose(ops.convert_to_numpy(output[key]), expected, atol=1e-5)


def test_relative_kinds_differ(golden):
    arrays, _ = golden("relative_positions")
    kinds = ("relative_key", "relative_key_query")
    one, other = (arrays[f"{kind}/last_hidden_state"] for kind in kinds)
    assert np.abs(one - other).max() > 0.01


def test_absolute_positions_have_no_distance_embedding(model):
    assert not [weight.path for weight in model.weights if "distance" in weight.path]


def test_padding_changes_nothing(model):
    padded = np.concatenate([IDS, np.full((1, 3), 9, "int32")], axis=1)
    mask = np.array([[1] * 6 + [0] * 3], "int32")
    actual = last_state(model, {"input_ids": padded, "attention_mask": mask})[:, :6]
    np.testing.assert_allclose(actual, last_state(model, IDS), atol=1e-5)
    assert np.abs(last_state(model, padded)[:, :6] - actual).max() > 0.1


def test_masked_keys_get_no_attention_and_rows_sum_to_one(model):
    mask = np.array([[1, 1, 0, 1, 0, 0]], "int32")
    output = model({"input_ids": IDS, "attention_mask": mask}, output_attentions=True)
    for attention in map(ops.convert_to_numpy, output.attentions):
        assert attention.shape == (1, 4, 6, 6)
        assert not attention[..., mask[0] == 0].any()
        np.testing.assert_allclose(attention.sum(-1), 1.0, atol=1e-6)


def test_a_text_of_padding_alone_attends_evenly(model):
    mask = np.zeros((1, 6), "int32")
    output = model({"input_ids": IDS, "attention_mask": mask}, output_attentions=True)
    np.testing.assert_allclose(ops.convert_to_numpy(output.attentions[0]), 1 / 6, atol=1e-6)
    assert np.isfinite(ops.convert_to_numpy(output.last_hidden_state)).all()


def test_optional_inputs_have_the_reference_defaults(model):
    expected = last_state(model, IDS)
    ones, zeros = np.ones_like(IDS), np.zeros_like(IDS)
    spelled_out = {
        "input_ids": IDS,
        "attention_mask": ones,
        "token_type_ids": zeros,
        "position_ids": np.arange(6, dtype="int32")[None],
    }
    np.testing.assert_array_equal(last_state(model, spelled_out), expected)
    np.testing.assert_array_equal(
        last_state(model, {**spelled_out, "attention_mask": None, "token_type_ids": None}), expected
    )
    for key, other in (("token_type_ids", ones), ("position_ids", zeros)):
        assert np.abs(last_state(model, {**spelled_out, key: other}) - expected).max() > 0.1


def test_inputs_embeds_stand_in_for_ids(model):
    embeds = model.embeddings.word_embeddings(IDS)
    actual = last_state(model, {"inputs_embeds": embeds})
    np.testing.assert_array_equal(actual, last_state(model, IDS))


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": IDS}])
def test_missing_ids_are_told(model, inputs):
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds, not both and not n"):
        model(inputs)


def test_ids_and_embeds_together_are_told(model):
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds, not both"):
        model({"input_ids": IDS, "inputs_embeds": np.zeros((1, 6, 16), "float32")})


def test_a_text_that_is_too_long_is_told(model):
    with pytest.raises(ValueError, match="17 tokens: expected at most max_position_embeddings=16"):
        model(np.ones((1, 17), "int32"))


def test_the_pooler_is_a_tanh_of_the_first_token(model):
    output = model(IDS)
    first = ops.convert_to_numpy(output.last_hidden_state)[:, 0]
    kernel, bias = model.pooler.get_weights()
    expected = np.tanh(first @ kernel + bias)
    np.testing.assert_allclose(ops.convert_to_numpy(output.pooler_output), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_alone(name, tiny_config):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, name: 0.5}
    model = AlignTextModel(dataclasses.replace(tiny_config.text_config, **rates))
    states = [
        ops.convert_to_numpy(model(IDS, training=training).last_hidden_state)
        for training in (False, False, True, True)
    ]
    np.testing.assert_array_equal(states[0], states[1])
    assert np.abs(states[0] - states[2]).max() > 1e-4
    assert np.abs(states[2] - states[3]).max() > 1e-4


def test_a_callable_activation_is_used(tiny_config):
    config = dataclasses.replace(tiny_config.text_config, hidden_act=ops.zeros_like)
    block = AlignTextModel(config).blocks[0]
    block.intermediate.bias.assign(np.ones(20))
    block.output_dense.kernel.assign(np.ones((20, 16)))
    x = np.random.default_rng(0).normal(size=(1, 2, 16)).astype("float32")
    y, _ = block(x, np.ones((1, 1, 1, 2), "bool"))
    attended, _ = block.attention(x, np.ones((1, 1, 1, 2), "bool"))
    expected = block.output_norm(block.attention_norm(x + attended))  # nothing is fed forward
    np.testing.assert_allclose(ops.convert_to_numpy(y), ops.convert_to_numpy(expected), atol=1e-6)


def test_initializers(tiny_config):
    config = dataclasses.replace(
        tiny_config.text_config, initializer_range=0.5, hidden_size=64, num_hidden_layers=1
    )
    model = AlignTextModel(config)
    for path, weight in ((weight.path, ops.convert_to_numpy(weight)) for weight in model.weights):
        if path.endswith(("kernel", "embeddings")):
            assert np.std(weight) == pytest.approx(0.5, rel=0.15), path
        else:
            assert (weight == (1 if path.endswith("gamma") else 0)).all(), path


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_table_gives_the_same_rows_in_training(mode):
    table = keras.layers.Embedding(6, 4)
    table.build()
    table.quantize(mode)
    ids = np.array([[1, 5]])
    found = ops.convert_to_numpy(look_up(table, ids, training=True))
    np.testing.assert_array_equal(found, ops.convert_to_numpy(table(ids)))
