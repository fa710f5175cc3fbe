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
from align_tf.models.plain_copy import plain_copy
from align_tf.models.surgery import open_for_change


def layers_of(model, kinds):
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


@pytest.fixture(scope="module")
def model(tiny_config):
    keras.utils.set_random_seed(0)
    model = AlignModel(tiny_config)
    rng = np.random.default_rng(0)
    for norm in layers_of(model, keras.layers.BatchNormalization):
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


# --- what Keras may have made of the layers ------------------------------------------------


def add_lora(model):
    """Adapts every layer that can be, by as much as the weights themselves."""
    rng = np.random.default_rng(0)
    adapted = layers_of(model, (keras.layers.Dense, keras.layers.Embedding, keras.layers.Conv2D))
    for layer in adapted:
        if not isinstance(layer, keras.layers.DepthwiseConv2D):
            layer.enable_lora(2, lora_alpha=3)
            last = [weight for weight in layer.weights if weight.name.startswith("lora_")][-1]
            last.assign(rng.normal(0, 0.2, last.shape))


def cosines(model, copy, pairs):
    outputs = model(pairs), copy(pairs)
    return [
        float(ops.min(ops.sum(outputs[0][name] * outputs[1][name], axis=-1)))
        for name in ("image_embeds", "text_embeds")
    ]


def test_lora_is_merged_into_a_copy(changeable, pairs):
    before = changeable(pairs).logits_per_image
    add_lora(changeable)
    expected = changeable(pairs).logits_per_image
    assert np.abs(expected - before).max() > 0.1
    copy = inference_copy(changeable, "float32")
    np.testing.assert_allclose(copy(pairs).logits_per_image, expected, rtol=1e-5, atol=1e-5)
    assert not [weight.path for weight in copy.weights if "lora" in weight.path]


def test_of_what_is_quantized_a_copy_has_the_weights_in_floating_point(changeable):
    query = changeable.text_model.blocks[0].attention.query
    words = changeable.text_model.embeddings.word_embeddings
    query.kernel.assign(np.tile([[0.127], [-0.064]], (8, 16)))  # 127 and -64 thousandths
    words.embeddings.assign(np.tile([[0.254, -0.04]], (40, 8)))  # 127 and -20 of 0.002
    changeable.quantize("int8")
    query.enable_lora(1, lora_alpha=5)
    query.lora_kernel_a.assign(np.ones((16, 1)))
    query.lora_kernel_b.assign(np.full((1, 16), 0.1))
    copy = inference_copy(changeable, "float32").text_model
    expected = np.tile([[0.627], [0.436]], (8, 16))  # and 5 times 0.1
    joined = copy.blocks[0].attention.project.kernel
    np.testing.assert_allclose(joined[:, :16], expected, rtol=1e-5)
    expected = np.tile([[0.254, -0.04]], (40, 8))
    np.testing.assert_allclose(copy.embeddings.word_embeddings.embeddings, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "lora", "least"),
    [
        ("int8", False, 0.999),
        pytest.param("int8", True, 0.999, marks=pytest.mark.slow),
        pytest.param("int4", True, 0.99, marks=pytest.mark.slow),
    ],
)
def test_a_copy_of_a_quantized_model_is_close_to_it(changeable, pairs, mode, lora, least):
    try:
        changeable.quantize(mode)
    except ValueError:
        pytest.skip(f"this Keras has no {mode}")
    if lora:
        add_lora(changeable)
    for copy in (inference_copy(changeable, "float32"), plain_copy(changeable, "bfloat16")):
        image, text = cosines(changeable, copy, pairs)
        assert (image > least, text > least) == (True, True), (image, text)
    policies = {layer.dtype_policy.name for layer in copy._flatten_layers()}
    assert policies == {"bfloat16", "float32"}  # the projections are float32 whatever it is


def test_a_part_of_another_dtype_policy_is_copied_like_the_rest(changeable, pairs):
    for block in changeable.text_model.blocks:
        block.intermediate.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    copy = inference_copy(changeable, "float32")
    assert {layer.dtype_policy.name for layer in copy._flatten_layers()} == {"float32"}
    assert min(cosines(changeable, copy, pairs)) > 0.999


def test_activations_and_epsilons_that_were_changed_are_copied(changeable, pairs):
    before = changeable(pairs)
    changeable.text_model.blocks[0].activation = keras.activations.relu
    changeable.text_model.blocks[1].output_norm.epsilon = 0.5
    changeable.vision_model.blocks[1].activation = keras.activations.tanh
    changeable.vision_model.stem_bn.epsilon = 0.5
    expected = changeable(pairs)
    copy = inference_copy(changeable, "float32")(pairs)
    for name in ("image_embeds", "text_embeds"):
        assert np.abs(before[name] - expected[name]).max() > 1e-3
        np.testing.assert_allclose(copy[name], expected[name], rtol=1e-5, atol=1e-5)


class Scaled(AlignModel):
    def get_text_features(self, inputs, training=False):
        return super().get_text_features(inputs, training) + 1.0


class Measured(AlignModel):
    """Trains in a way of its own, and embeds as the others do."""

    def __init__(self, config, margin=0.5, **options):
        super().__init__(config, **options)
        self.margin = margin

    def get_config(self):
        return {**super().get_config(), "margin": self.margin}


def test_a_subclass_is_copied_unless_it_embeds_in_its_own_way(tiny_config, pairs):
    model = Measured(tiny_config)
    assert min(cosines(model, inference_copy(model, "float32"), pairs)) > 0.999
    with pytest.raises(ValueError, match=r"Scaled.get_text_features is its own: only AlignModel's"):
        inference_copy(Scaled(tiny_config), "float32")


def own_layer(model):
    block = model.text_model.blocks[1]
    with open_for_change(block):
        block.output_norm = keras.layers.UnitNormalization()


def own_weights(model):
    with open_for_change(model.text_model):
        model.text_model.pooler = keras.layers.Dense(9, name="pooler")
        model.text_model.pooler.build((None, 16))


def own_length(model):
    model.text_model.blocks = model.text_model.blocks[:1]


def own_call(model):
    model.vision_model.stem_pad.call = lambda inputs: inputs


def float8(model):
    model.quantize("float8")


def diverged(model):
    model.temperature.assign(np.nan)


# change: how it is told
UNLIKE = {
    own_layer: r"text_model.blocks\[1\].output_norm: UnitNormalization in the model, LayerNorm",
    own_weights: r"text_model/pooler/kernel: \(16, 9\) in the model, \(16, 16\) by its",
    own_call: r"vision_model.stem_pad: ZeroPadding2D with its own call in the model",
    own_length: r"text_model.blocks\[1\]: no layer in the model",
    float8: r"query: quantized to float8, of which there are no weights",
    diverged: r"temperature holds NaN or infinity",
}


@pytest.mark.parametrize("change", UNLIKE)
def test_what_no_copy_computes_is_told(changeable, change):
    change(changeable)
    with pytest.raises(ValueError, match=UNLIKE[change]):
        inference_copy(changeable, "float32")


def test_what_float16_cannot_hold_is_told(changeable):
    norm = changeable.vision_model.stem_bn
    norm.gamma.assign(np.full(norm.gamma.shape, 60000.0))
    norm.moving_variance.assign(np.zeros(norm.gamma.shape))
    message = r"vision_model/stem_conv/kernel reaches .*, float16 only 65504: choose another dtype"
    with pytest.raises(ValueError, match=message):
        inference_copy(changeable, "float16")
    inference_copy(changeable, "bfloat16")
    # What is folded away may be more than that.
    norm.moving_variance.assign(np.full(norm.gamma.shape, 1e6))
    inference_copy(changeable, "float16")


# --- texts ---------------------------------------------------------------------------------


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
@pytest.mark.slow
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
