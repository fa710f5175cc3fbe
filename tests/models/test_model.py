"""The models as a user meets them: call, fit, freeze, resize, prune, save, policies."""

import collections
import dataclasses
import io
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignConfig, AlignModel, AlignTextModel, AlignVisionModel


@pytest.fixture
def model(tiny_config) -> AlignModel:
    keras.utils.set_random_seed(0)
    return AlignModel(tiny_config)


@pytest.fixture(scope="module")
def unchanged(tiny_config) -> AlignModel:
    """The same, made once: not to be changed."""
    keras.utils.set_random_seed(0)
    return AlignModel(tiny_config)


def logits(model: AlignModel, pairs) -> np.ndarray:
    return ops.convert_to_numpy(model(pairs).logits_per_image)


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}


def changed(before: dict, after: dict) -> set[str]:
    return {path for path, value in before.items() if not np.array_equal(value, after[path])}


# --- outputs -------------------------------------------------------------------------------


def test_outputs_equal_the_reference(golden):
    arrays, folder = golden("towers")
    model = AlignModel.from_pretrained(folder)
    inputs = {k.removeprefix("inputs/"): v for k, v in arrays.items() if k.startswith("inputs/")}
    output = model(inputs, return_loss=True)
    for key in ("image_embeds", "text_embeds"):
        expected = arrays[f"expected/{key}"]
        np.testing.assert_allclose(ops.convert_to_numpy(output[key]), expected, atol=1e-5)
    expected = arrays["expected/logits_per_text"]  # at temperature 0.07
    np.testing.assert_allclose(ops.convert_to_numpy(output.logits_per_text), expected, atol=1e-3)
    np.testing.assert_allclose(ops.convert_to_numpy(output.logits_per_image), expected.T, atol=1e-3)
    assert float(output.loss) == pytest.approx(float(arrays["expected/loss"]), abs=1e-4)


def test_output_reads_as_attribute_and_as_key(unchanged, pairs):
    output = unchanged(pairs)
    assert list(output) == [
        "logits_per_image",
        "logits_per_text",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
    ]
    assert output.image_embeds is output["image_embeds"]
    assert output.text_model_output.pooler_output.shape == (4, 16)
    with pytest.raises(
        AttributeError, match="this output has no 'loss'; it has logits_per_image, "
    ):
        output.loss  # noqa: B018


def test_what_is_asked_for_is_returned(unchanged, pairs):
    output = unchanged(pairs, return_loss=True, output_hidden_states=True, output_attentions=True)
    assert output.loss.shape == ()
    assert [len(output.text_model_output[key]) for key in ("hidden_states", "attentions")] == [3, 2]
    assert len(output.vision_model_output.hidden_states) == 4
    assert "attentions" not in output.vision_model_output


def test_shapes_and_unit_length_of_more_texts_than_images(unchanged, pairs):
    output = unchanged({**pairs, "pixel_values": pairs["pixel_values"][:3]})
    assert output.logits_per_image.shape == (3, 4)
    assert output.logits_per_text.shape == (4, 3)
    for key, count in (("image_embeds", 3), ("text_embeds", 4)):
        embeds = ops.convert_to_numpy(output[key])
        assert embeds.shape == (count, 8)
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=-1), 1.0, atol=1e-6)
    cosines = ops.matmul(output.image_embeds, ops.transpose(output.text_embeds))
    np.testing.assert_allclose(
        ops.convert_to_numpy(output.logits_per_image), ops.convert_to_numpy(cosines), atol=1e-6
    )


def test_temperature_divides_the_logits(model, pairs):
    before = logits(model, pairs)
    model.temperature.assign(0.25)
    np.testing.assert_allclose(logits(model, pairs), 4 * before, rtol=1e-6)


def test_features_are_the_embeddings_before_normalisation(unchanged, pairs):
    output = unchanged(pairs)
    texts = {key: value for key, value in pairs.items() if key != "pixel_values"}
    features = {
        "text_embeds": unchanged.get_text_features(texts),
        "image_embeds": unchanged.get_image_features(pairs["pixel_values"]),
    }
    for key, array in features.items():
        array = ops.convert_to_numpy(array)
        unit = array / np.linalg.norm(array, axis=-1, keepdims=True)
        np.testing.assert_allclose(ops.convert_to_numpy(output[key]), unit, atol=1e-6)
    first = ops.convert_to_numpy(output.text_model_output.last_hidden_state)[:, 0]
    kernel, bias = unchanged.text_projection.get_weights()
    np.testing.assert_allclose(
        ops.convert_to_numpy(features["text_embeds"]), first @ kernel + bias, atol=1e-6
    )


def test_a_zero_embedding_stays_finite(model, pairs):
    model.text_projection.set_weights([np.zeros((16, 8)), np.zeros(8)])
    assert not logits(model, pairs).any()


def test_image_projection(tiny_config, pairs):
    config = dataclasses.replace(tiny_config, projection_dim=12, image_projection=True)
    model = AlignModel(config)
    assert model(pairs).image_embeds.shape == (4, 12)
    assert model.image_projection.kernel.shape == (8, 12)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pixel_values", "expected pixel_values; for texts alone call get_text_features"),
        ("input_ids", "expected input_ids; for images alone call get_image_features"),
    ],
)
def test_missing_inputs_are_told(missing, message, unchanged, pairs):
    with pytest.raises(ValueError, match=message):
        unchanged({key: value for key, value in pairs.items() if key != missing})
    with pytest.raises(ValueError, match=message):
        unchanged({**pairs, missing: None})


@pytest.mark.parametrize("size", [(16, 16), (33, 33), (17, 40), (4, 4)])
def test_any_image_size_without_rebuilding(size, unchanged, pairs):
    weights = [id(weight) for weight in unchanged.weights]
    images = np.random.default_rng(0).random((4, *size, 3), "float32")
    assert unchanged({**pairs, "pixel_values": images}).logits_per_image.shape == (4, 4)
    assert [id(weight) for weight in unchanged.weights] == weights


@pytest.mark.parametrize("size", [(3, 16), (16, 3), (1, 1), (0, 16)])
def test_images_of_which_no_pixel_would_be_left_are_refused(size, unchanged, pairs):
    images = np.zeros((4, *size, 3), "float32")
    message = rf"pixel_values of shape \(4, {size[0]}, {size[1]}, 3\): expected images of 4 x 4"
    with pytest.raises(ValueError, match=message):
        unchanged({**pairs, "pixel_values": images})
    if keras.backend.backend() == "tensorflow":  # the sizes are seen when the graph runs
        import tensorflow as tf

        spec = tf.TensorSpec([None, None, None, 3])
        embed = tf.function(unchanged.get_image_features, input_signature=[spec], autograph=False)
        assert embed(pairs["pixel_values"]).shape == (4, 8)
        with pytest.raises(tf.errors.InvalidArgumentError, match="images of 4 x 4 pixels or more"):
            embed(images)


def test_inside_a_functional_model(unchanged, pairs):
    inputs = {
        "pixel_values": keras.Input((None, None, 3), name="pixel_values"),
        "input_ids": keras.Input((None,), dtype="int32", name="input_ids"),
        "attention_mask": keras.Input((None,), dtype="int32", name="attention_mask"),
    }
    functional = keras.Model(inputs, unchanged(inputs).image_embeds)
    expected = ops.convert_to_numpy(unchanged(pairs).image_embeds)
    np.testing.assert_allclose(ops.convert_to_numpy(functional(pairs)), expected, atol=1e-6)


# --- names ---------------------------------------------------------------------------------


def test_names_of_layers_and_weights_are_stable(unchanged):
    printed = io.StringIO()
    for part in (unchanged, unchanged.text_model, unchanged.vision_model):
        part.summary(print_fn=lambda line, **_: printed.write(line))
    for name in ("text_model (AlignTextModel)", "vision_model (AlignVisionModel)", "text_project"):
        assert name in printed.getvalue()
    assert "unbuilt" not in printed.getvalue()
    assert [layer.name for layer in unchanged.text_model.layers] == [
        "embeddings",
        "layer_0",
        "layer_1",
        "pooler",
    ]
    assert [layer.name for layer in unchanged.vision_model.layers] == [
        "stem_pad",
        "stem_conv",
        "stem_bn",
        "block_0",
        "block_1",
        "block_2",
    ]
    paths = [weight.path for weight in unchanged.weights]
    assert len(paths) == len(set(paths)) == 99
    for path in (
        "align/temperature",
        "align/text_projection/kernel",
        "text_model/layer_1/attention/query/kernel",
        "text_model/layer_0/output/bias",
        "vision_model/block_2/depthwise_bn/moving_variance",
        "vision_model/stem_conv/kernel",
    ):
        assert path in paths


def test_a_second_model_has_the_names_of_the_first(unchanged, tiny_config):
    again = [weight.path for weight in AlignModel(tiny_config).weights]
    assert again == [weight.path for weight in unchanged.weights]


# --- training ------------------------------------------------------------------------------


def test_fit_minimises_the_contrastive_loss(model, pairs):
    expected = float(model(pairs, return_loss=True).loss)
    model.compile(optimizer="sgd")
    found = model.evaluate(pairs, batch_size=4, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    before = values(model)
    history = model.fit(pairs, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    still = set(before) - changed(before, values(model))
    # The pooler is no part of the embedding; every other weight took a step. A key's bias
    # shifts all scores of a row alike, so its gradient is nothing but rounding.
    assert {path for path in still if "key/bias" not in path} == {
        "text_model/pooler/kernel",
        "text_model/pooler/bias",
    }


def test_label_smoothing_reaches_the_loss_of_fit(tiny_config, pairs):
    losses = []
    for smoothing in (0.0, 0.5):
        keras.utils.set_random_seed(0)
        model = AlignModel(tiny_config, label_smoothing=smoothing)
        losses.append(float(model.compute_loss(pairs, y_pred=model(pairs))))
        assert losses[-1] == pytest.approx(float(model(pairs, return_loss=True).loss), abs=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_losses_of_layers_are_added(model, pairs):
    plain = float(model.compute_loss(pairs, y_pred=model(pairs)))
    model.text_projection.kernel.regularizer = keras.regularizers.L2(1.0)
    extra = float((ops.convert_to_numpy(model.text_projection.kernel) ** 2).sum())
    total = float(model.compute_loss(pairs, y_pred=model(pairs)))
    assert total == pytest.approx(plain + extra, rel=1e-5)


def test_calls_of_keras_and_of_hugging_face_are_the_same(unchanged, pairs):
    given = {**pairs, "sample_weight": np.array([1, 1, 1, 0], "float32")}
    calls = [
        unchanged(given, return_loss=True),
        unchanged(**given, return_loss=True),
        unchanged(collections.UserDict(given), return_loss=True),
    ]
    for output in calls:
        assert list(output) == [
            *("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
            *("text_model_output", "vision_model_output"),
        ]
        for key in list(output)[:5]:
            np.testing.assert_array_equal(output[key], calls[0][key])
        assert output[0] is output.loss
        assert output[1:3] == (output.logits_per_image, output.logits_per_text)
        assert output.to_tuple()[-1] == (output[-1][0], output[-1][1])
        assert output[-1][1] is output.vision_model_output.pooler_output
    texts = {key: pairs[key] for key in ("input_ids", "attention_mask")}
    images = pairs["pixel_values"]
    text_features, image_features = unchanged.get_text_features, unchanged.get_image_features
    for calls in (
        [text_features(texts), text_features(**texts)],
        [image_features(images), image_features(pixel_values=images)],
        [unchanged.text_model(**texts)[1], unchanged.text_model(texts).pooler_output],
        [unchanged.vision_model(images)[1], unchanged.vision_model(pixel_values=images)[1]],
    ):
        np.testing.assert_array_equal(*calls)
    several = unchanged.text_model(pairs["input_ids"], attention_mask=pairs["attention_mask"])
    np.testing.assert_array_equal(several[1], unchanged.text_model(texts)[1])
    inputs = {
        key: keras.Input(value.shape[1:], dtype=value.dtype, name=key)
        for key, value in {**texts, "pixel_values": images}.items()
    }
    for logits in (unchanged(inputs).logits_per_image, unchanged(**inputs).logits_per_image):
        found = keras.Model(inputs, logits)({**texts, "pixel_values": images})
        np.testing.assert_allclose(found, unchanged(pairs).logits_per_image, atol=1e-5)


def test_a_misspelled_input_is_not_left_out(unchanged, pairs):
    ids, mask = pairs["input_ids"], pairs["attention_mask"]
    expected = unchanged.get_text_features(ids, attention_mask=mask)
    np.testing.assert_array_equal(unchanged.get_text_features(pairs), expected)  # a whole batch
    message = "unknown inputs atention_mask: expected input_ids, attention_mask, token_type_ids"
    for call in (
        lambda: unchanged.get_text_features(input_ids=ids, atention_mask=mask),
        lambda: unchanged.get_text_features({"input_ids": ids, "atention_mask": mask}),
        lambda: unchanged.text_model({"input_ids": ids, "atention_mask": mask}),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_a_data_set_of_any_mapping(model, pairs):
    model.compile(optimizer="sgd", run_eagerly=True)
    given = collections.UserDict(pairs)
    model.fit(given, batch_size=4, verbose=0)
    assert model.predict(given, verbose=0)["image_embeds"].shape == (4, 8)
    assert model.evaluate(given, verbose=0)[0] > 0


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            np.zeros((2, 3, 16, 16), "float32"),
            r"of shape \(2, 3, 16, 16\), channels first: expected",
        ),
        (np.zeros((16, 16, 3), "float32"), r"of shape \(16, 16, 3\): expected float \(n, height"),
        (np.zeros((2, 16, 16, 4), "float32"), r"of shape \(2, 16, 16, 4\): expected float"),
        (np.zeros((2, 16, 16, 3), "uint8"), "of uint8: expected float"),
        (np.full((2, 16, 16, 3), 255, "float32"), "that reach 255: expected float"),
    ],
)
def test_pixels_that_no_processor_gives_are_refused_in_one_line(pixels, message, unchanged, pairs):
    calls = (
        unchanged.get_image_features,
        unchanged.vision_model,
        lambda pixels: unchanged({**pairs, "pixel_values": pixels}),
    )
    for call in calls:
        for given in (pixels, ops.convert_to_tensor(pixels)):
            with pytest.raises(ValueError, match=f"^pixel_values {message}") as error:
                call(given)
            assert "\n" not in str(error.value)


def test_pixels_that_a_traced_function_holds_are_checked_too(unchanged, pairs):
    """They have values there, and operations on them have none."""
    images = pairs["pixel_values"]
    if keras.backend.backend() == "jax":
        from jax import jit as traced
    else:
        from tensorflow import function as traced
    for held in (images, ops.convert_to_tensor(images)):
        found = traced(lambda held=held: unchanged.get_image_features(held))()
        np.testing.assert_allclose(found, unchanged.get_image_features(images), atol=1e-5)


def test_a_batch_of_none(unchanged):
    """With oneDNN, a convolution fails on it."""
    images, texts = np.zeros((0, 16, 16, 3), "float32"), np.zeros((0, 4), "int32")
    output = unchanged({"pixel_values": images, "input_ids": texts}, output_hidden_states=True)
    assert output.logits_per_image.shape == (0, 0)
    states = output.vision_model_output.hidden_states
    assert [state.shape[0] for state in states] == [0] * 4
    assert unchanged.get_image_features(images).shape == (0, 8)
    assert unchanged.get_text_features(texts).shape == (0, 8)


# --- freezing ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_frozen_tower_stays_and_the_other_trains_after_surgery(model, pairs):
    model.freeze("vision")
    assert not model.vision_model.trainable_weights
    assert model.text_model.trainable_weights
    model.resize_token_embeddings(55)
    model.prune_heads({0: [1]})
    pairs["input_ids"][0, 1] = 54
    before = values(model)
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    model.fit(pairs, batch_size=4, verbose=0)
    after = values(model)
    moved = changed(before, after)
    assert not [path for path in moved if path.startswith("vision_model/")]  # nor its statistics
    assert {"align/text_projection/kernel", "text_model/layer_0/attention/value/kernel"} <= moved
    path = "text_model/embeddings/word_embeddings/embeddings"
    assert not np.array_equal(after[path][54], before[path][54])

    model.unfreeze("vision")
    assert len(model.vision_model.trainable_weights) == 39


def test_freeze_blocks(model):
    model.freeze("vision", [0, -1])
    frozen = [not block.trainable_weights for block in model.vision_model.blocks]
    assert frozen == [True, False, True]
    model.freeze("text")
    model.unfreeze("text", [1])
    trainable = {weight.path.split("/")[1] for weight in model.text_model.trainable_weights}
    assert trainable == {"layer_1"}


def test_freeze_both_towers_leaves_projection_and_temperature(model):
    model.freeze()
    names = [weight.path for weight in model.trainable_weights]
    assert names == [
        "align/temperature",
        "align/text_projection/kernel",
        "align/text_projection/bias",
    ]
    model.unfreeze()
    assert not model.text_model.pooler.trainable_weights
    assert len(model.trainable_weights) == 79


def test_freeze_of_what_is_not_there(unchanged):
    with pytest.raises(ValueError, match="tower='audio': expected one of text, vision, or None"):
        unchanged.freeze("audio")
    with pytest.raises(ValueError, match="block 3: vision_model has blocks 0 to 2"):
        unchanged.freeze("vision", [3])


def batch_norms(model: keras.Model) -> list[bool]:
    """Whether each BatchNorm trains, in the order of the tower."""
    return [
        layer.trainable
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def test_batch_norm_trains_in_a_new_model_and_not_in_a_loaded_one(model, pairs, tmp_path):
    assert batch_norms(model) == [True] * 9
    model.save_pretrained(tmp_path)
    again = AlignModel.from_pretrained(tmp_path)
    assert (
        batch_norms(again) == batch_norms(AlignVisionModel.from_pretrained(tmp_path)) == [False] * 9
    )
    again.compile(optimizer=keras.optimizers.SGD(1.0))
    again.compile(optimizer=keras.optimizers.SGD(1.0))
    before = values(again)
    again.fit(pairs, batch_size=4, verbose=0)
    moved = changed(before, values(again))
    assert "vision_model/block_0/project_conv/kernel" in moved
    assert not [path for path in moved if "_bn/" in path]


def test_unfreezing_blocks_leaves_batch_norm_frozen(model):
    model.freeze_batch_norm()
    model.freeze("vision")
    model.unfreeze("vision", [1])
    assert batch_norms(model) == [False] * 9
    assert len(model.vision_model.trainable_weights) == 7  # 3 convolutions, 2 of them with bias
    model.unfreeze_batch_norm()  # of what trains
    assert batch_norms(model) == [False] * 3 + [True] * 3 + [False] * 3
    model.unfreeze("vision")
    assert batch_norms(model) == [True] * 9
    model.freeze("vision", [1])
    assert batch_norms(model) == [True] * 3 + [False] * 3 + [True] * 3


def trainable(model: keras.Model) -> set[str]:
    return {weight.path for weight in model.trainable_weights}


def test_keras_own_switch_thaws_what_trained_before(model):
    model.freeze_batch_norm()
    before = trainable(model)
    assert len(before) == 61
    parts = (
        *(model, model.vision_model, model.text_model, model.vision_model.blocks[1]),
        keras.Sequential([keras.Input((16, 16, 3)), model.vision_model]),
    )
    for part in parts:
        part.trainable = False
        assert not part.trainable_weights
        part.trainable = True
        assert trainable(model) == before
    assert trainable(AlignModel.from_config(model.get_config())) == before
    model.unfreeze_batch_norm()
    assert batch_norms(model) == [True] * 9
    model.trainable = False
    model.trainable = True
    assert batch_norms(model) == [True] * 9


def test_unfreeze_undoes_keras_own_switch(model):
    model.freeze_batch_norm()
    before = trainable(model)
    towers = {"text": model.text_model, "vision": model.vision_model}
    for name, tower in towers.items():
        tower.trainable = False
        model.unfreeze(name)
        assert tower.trainable_weights
        assert trainable(model) == before
    model.trainable = False
    model.unfreeze("vision", [1])  # the blocks 0 and 2, the stem and the text tower stay
    expected = {path for path in before if "/block_1/" in path or path.startswith("align/")}
    assert trainable(model) == expected
    assert trainable(model.vision_model) == {path for path in expected if "/block_1/" in path}
    assert trainable(AlignModel.from_config(model.get_config())) == expected
    model.trainable = False
    model.unfreeze()
    assert trainable(model) == before


@pytest.mark.parametrize("frozen", [True, False])
def test_a_choice_about_batch_norm_survives(frozen, model, tmp_path):
    if frozen:
        model.freeze_batch_norm()
    else:
        model.unfreeze_batch_norm()
    model.compile(optimizer="sgd")
    model.save_pretrained(tmp_path)
    model.save(tmp_path / "model.keras")
    for again in (
        AlignModel.from_pretrained(tmp_path),
        AlignVisionModel.from_pretrained(tmp_path),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert batch_norms(again) == [not frozen] * 9
        again.freeze(**({"tower": "vision"} if isinstance(again, AlignModel) else {}))
        again.unfreeze(**({"tower": "vision"} if isinstance(again, AlignModel) else {}))
        assert batch_norms(again) == [not frozen] * 9


def test_keras_file_keeps_what_a_loaded_model_started_with(model, tmp_path):
    model.save_pretrained(tmp_path)
    AlignModel.from_pretrained(tmp_path).save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.unfreeze("vision")
    assert batch_norms(again) == [False] * 9


# --- surgery -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [30, 40, 55])
def test_resize_token_embeddings(size, model, pairs, tmp_path):
    pairs = {**pairs, "input_ids": pairs["input_ids"] % 30}
    before, old = logits(model, pairs), values(model)
    path = "text_model/embeddings/word_embeddings/embeddings"
    model.resize_token_embeddings(size)
    after = values(model)
    assert set(after) == set(old)
    assert after[path].shape == (size, 16)
    kept = min(size, 40)
    np.testing.assert_array_equal(after[path][:kept], old[path][:kept])
    if size > 40:
        assert 0.2 < after[path][40:].std() < 0.4  # initializer_range is 0.3
    np.testing.assert_allclose(logits(model, pairs), before, atol=1e-6)
    assert model.config.text_config.vocab_size == size

    model.save_pretrained(tmp_path)
    again = AlignModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(again, pairs), before, atol=1e-6)
    assert again.config.text_config.vocab_size == size
    again.resize_token_embeddings(size + 20)  # new rows are drawn in a loaded model too
    assert 0.2 < values(again)[path][size:].std() < 0.4


def test_resize_to_nothing_is_refused(unchanged):
    with pytest.raises(ValueError, match="vocab_size=0: expected a positive integer"):
        unchanged.resize_token_embeddings(0)
    assert unchanged.config.text_config.vocab_size == 40


def test_surgery_on_one_model_leaves_its_config_and_its_twin_alone(tiny_config):
    one, other = AlignModel(tiny_config), AlignModel(tiny_config)
    one.resize_token_embeddings(55)
    one.prune_heads({0: [0]})
    assert one.config.text_config is one.text_model.config
    assert one.config.text_config.vocab_size == 55
    for config in (tiny_config, other.config):
        assert config.text_config.vocab_size == 40
        assert config.text_config.pruned_heads == {}


def test_prune_heads_equals_the_reference(golden, tmp_path):
    arrays, folder = golden("pruned_heads")
    model = AlignTextModel.from_pretrained(folder)
    ids, expected = arrays["input_ids"], arrays["expected"]

    def check(model: AlignTextModel, step: int) -> None:
        states = ops.convert_to_numpy(model(ids).last_hidden_state)
        np.testing.assert_allclose(states, expected[step], atol=1e-5)

    check(model, 0)
    for step, heads in enumerate(json.loads(arrays["steps"].item()), start=1):
        model.prune_heads({int(layer): pruned for layer, pruned in heads.items()})
        check(model, step)
    assert model.config.pruned_heads == {0: [1, 3], 1: [0, 2]}
    assert model.blocks[0].attention.query.kernel.shape == (16, 8)
    assert model.blocks[0].attention.output_dense.kernel.shape == (8, 16)

    model.save_pretrained(tmp_path / "pruned")
    check(AlignTextModel.from_pretrained(tmp_path / "pruned"), 2)
    model.save(tmp_path / "pruned.keras")
    check(keras.saving.load_model(tmp_path / "pruned.keras"), 2)


@pytest.mark.parametrize("heads", [{2: [0]}, {0: [4]}, {0: [0, 1, 2, 3]}])
def test_heads_that_cannot_be_pruned(heads, unchanged):
    with pytest.raises(ValueError, match=r"pruned_heads\[[02]\]=.*: expected a layer below 2 and"):
        unchanged.prune_heads(heads)
    assert unchanged.config.text_config.pruned_heads == {}
    assert unchanged.text_model.blocks[0].attention.query.kernel.shape == (16, 16)


# --- Keras' own files ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["joint", "text", "vision"])
def test_keras_file(name, unchanged, pairs, tmp_path):
    part = unchanged if name == "joint" else getattr(unchanged, f"{name}_model")
    part.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is type(part)
    assert again.config == part.config
    assert not changed(values(part), values(again))


@pytest.mark.slow
def test_keras_file_keeps_what_was_set(tiny_config, pairs, tmp_path):
    model = AlignModel(
        tiny_config,
        label_smoothing=0.3,
        loss_reduction="sum",
        temperature_bounds=(0.02, 0.5),
        name="mine",
        dtype="mixed_bfloat16",
    )
    model.freeze("vision")
    model.unfreeze("vision", [-1])
    model.freeze("text", [0])
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(optimizer=optimizer, accumulation=2, remat=True, steps_per_execution=2)
    model.fit(pairs, batch_size=4, verbose=0)
    assert all(np.isfinite(value).all() for value in values(model).values())
    assert any(ops.convert_to_numpy(variable).any() for variable in model.optimizer.variables[2:])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert (again.name, again.label_smoothing, again.loss_reduction) == ("mine", 0.3, "sum")
    assert again.temperature_bounds == (0.02, 0.5)
    assert (again.accumulation, again.steps_per_execution) == (2, 2)
    assert again.text_model.remat is again.vision_model.remat is True
    assert again.dtype_policy.name == again.vision_model.dtype_policy.name == "mixed_bfloat16"
    names = [weight.path for weight in model.trainable_weights]
    assert [weight.path for weight in again.trainable_weights] == names
    for one, other in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))


@pytest.mark.slow
def test_keras_file_in_a_fresh_process(model, pairs, tmp_path):
    """The one import that the documentation asks for is enough."""
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "pairs.npz", **pairs)
    code = (
        "import sys; from align_tf import AlignModel; import keras, numpy as np;"
        "folder = sys.argv[1]; model = keras.saving.load_model(folder + '/model.keras');"
        "output = model(dict(np.load(folder + '/pairs.npz')));"
        "logits = keras.ops.convert_to_numpy(output.logits_per_image);"
        "np.save(folder + '/logits.npy', logits)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits(model, pairs), atol=1e-6)


def test_weights_file(unchanged, tiny_config, pairs, tmp_path):
    unchanged.save_weights(tmp_path / "model.weights.h5")
    keras.utils.set_random_seed(1)
    again = AlignModel(tiny_config)
    assert changed(values(unchanged), values(again))
    again.load_weights(tmp_path / "model.weights.h5")
    assert not changed(values(unchanged), values(again))


def test_get_config_is_json_and_builds_the_model_again(model):
    model.freeze("text", [1])
    config = json.loads(json.dumps(model.get_config()))
    again = AlignModel.from_config(config)
    assert again.config == model.config
    names = [weight.path for weight in model.trainable_weights]
    assert [weight.path for weight in again.trainable_weights] == names
    assert config == json.loads(json.dumps(model.get_config()))  # from_config took nothing out


# --- policies ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, unchanged, tiny_config, pairs):
    mixed = AlignModel(tiny_config, dtype=policy)
    mixed.set_weights(unchanged.get_weights())
    half = policy.removeprefix("mixed_")
    output, expected = mixed(pairs, return_loss=True), unchanged(pairs, return_loss=True)
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    assert (
        keras.backend.standardize_dtype(output.vision_model_output.last_hidden_state.dtype) == half
    )
    assert keras.backend.standardize_dtype(output.text_model_output.last_hidden_state.dtype) == half
    for key in ("image_embeds", "text_embeds", "logits_per_image", "loss"):
        assert keras.backend.standardize_dtype(output[key].dtype) == "float32", key
        np.testing.assert_allclose(
            ops.convert_to_numpy(output[key]), ops.convert_to_numpy(expected[key]), atol=0.05
        )
    features = mixed.get_image_features(pairs["pixel_values"])
    assert keras.backend.standardize_dtype(features.dtype) == "float32"


def test_the_global_policy_is_taken(tiny_config):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = AlignModel(AlignConfig.from_dict(tiny_config.to_dict()))
    finally:
        keras.config.set_dtype_policy(before)
    assert model.text_model.blocks[0].attention.query.compute_dtype == "bfloat16"
    assert model.text_projection.compute_dtype == "float32"


def test_towers_stand_alone(tiny_config, pairs):
    text = AlignTextModel(tiny_config.text_config, name="texts")
    assert text(pairs["input_ids"]).last_hidden_state.shape == (4, 6, 16)
    assert text.pooler.trainable_weights
    vision = AlignVisionModel(tiny_config.vision_config)
    vision.freeze([0])
    assert not vision.blocks[0].trainable_weights
    vision.unfreeze()
    assert vision.blocks[0].trainable_weights
