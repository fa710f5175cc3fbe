"""Keras's own calls on the models and their layers: export, shapes, copies, larger models."""

import copy
import io
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from keras.src import testing

from align_tf import AlignModel
from align_tf.configuration.blocks import block_table
from align_tf.models.bert import EncoderLayer, SelfAttention, TextEmbeddings
from align_tf.models.efficientnet import MBConvBlock
from align_tf.models.exports import INPUTS

TENSORFLOW = keras.backend.backend() == "tensorflow"


@pytest.fixture(scope="module")
def unchanged(tiny_config) -> AlignModel:
    """Not to be changed."""
    keras.utils.set_random_seed(0)
    return AlignModel(tiny_config)


def part_of(model: AlignModel, name: str, pairs: dict) -> tuple[keras.Model, dict]:
    """Returns the joint model or a tower, and its inputs."""
    texts = {key: pairs[key] for key in ("input_ids", "attention_mask")}
    return {
        "align": (model, pairs),
        "text_model": (model.text_model, texts),
        "vision_model": (model.vision_model, {"pixel_values": pairs["pixel_values"]}),
    }[name]


def assert_equal(found: dict, expected: dict, names: set[str]) -> None:
    assert set(found) == names
    for name in names:
        expected_array = ops.convert_to_numpy(expected[name])
        np.testing.assert_allclose(np.asarray(found[name]), expected_array, atol=1e-5)


PARTS = ("align", "text_model", "vision_model")
TOWER_OUTPUTS = {"last_hidden_state", "pooler_output"}
OUTPUTS = {
    "align": {"logits_per_image", "logits_per_text", "image_embeds", "text_embeds"},
    "text_model": TOWER_OUTPUTS,
    "vision_model": TOWER_OUTPUTS,
}


@pytest.mark.skipif(not TENSORFLOW, reason="of TensorFlow")
@pytest.mark.parametrize(
    ("name", "sized"), [("align", False), ("text_model", True), ("vision_model", False)]
)
@pytest.mark.slow
def test_export_of_a_model_never_called(name, sized, unchanged, pairs, tmp_path):
    import tensorflow as tf

    part, inputs = part_of(unchanged, name, pairs)
    if name == "align":
        inputs = {**inputs, "token_type_ids": np.zeros((4, 6), "int32")}
    specs = {
        key: keras.InputSpec(value.dtype, (None, *value.shape[1:])) for key, value in inputs.items()
    }
    part.export(tmp_path, verbose=False, input_signature=[specs] if sized else None)
    loaded = tf.saved_model.load(tmp_path)
    assert_equal(loaded.serve(inputs), part(inputs), OUTPUTS[name])


def test_an_export_on_jax_needs_sizes(unchanged, monkeypatch, tmp_path):
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    open_ = [{"pixel_values": keras.InputSpec("float32", (None, None, None, 3))}]
    for signature in (None, open_):
        with pytest.raises(ValueError) as error:
            unchanged.vision_model.export(tmp_path / "none", input_signature=signature)
        assert str(error.value) == (
            "on the JAX backend an export has fixed sizes: expected input_signature=["
            "{'pixel_values': keras.InputSpec('float32', (None, height, width, 3))}], with the "
            "sizes that the processor gives"
        )


@pytest.mark.parametrize("signature", [[(4, 16, 16, 3)], [], [{"pixel_values": "float32"}]])
def test_a_signature_that_is_none(signature, unchanged, tmp_path):
    with pytest.raises(ValueError, match=r": expected \[\{name: keras.InputSpec\(dtype, shape\)\}"):
        unchanged.vision_model.export(tmp_path / "none", input_signature=signature)


def test_an_h5_file_that_nothing_could_read_is_not_written(unchanged, tmp_path):
    with pytest.raises(ValueError, match=r"a\.h5: expected a name that ends in \.keras"):
        unchanged.save(tmp_path / "a.h5")
    assert not any(tmp_path.iterdir())


def test_lists_of_numbers_are_inputs(unchanged, pairs):
    lists = {name: pairs[name].tolist() for name in ("pixel_values", "input_ids")}
    found = unchanged(lists).logits_per_image
    arrays = {name: pairs[name] for name in lists}
    np.testing.assert_array_equal(found, unchanged(arrays).logits_per_image)
    for given, kind in (([[1, 2], [3]], "list: expected rows alike"), (["a"], "str_: expected nu")):
        with pytest.raises(ValueError, match=f"^input_ids: a list of {kind}"):
            unchanged.get_text_features(given)
    with pytest.raises(ValueError, match="inputs of list: expected a dict of pixel_values"):
        unchanged([pairs["pixel_values"], pairs["input_ids"]])


def test_a_model_is_made_of_its_configuration(unchanged):
    assert type(unchanged).from_config(unchanged.config).config == unchanged.config
    for given, kind in (("align-tiny", "str"), (unchanged.config.to_dict(), "dict")):
        with pytest.raises(TypeError, match=f"^AlignModel of {kind}: expected an AlignConfig; "):
            AlignModel(given)


def test_output_shapes(unchanged):
    texts = {"last_hidden_state": (None, None, 16), "pooler_output": (None, 16)}
    images = {"last_hidden_state": (None, None, None, 8), "pooler_output": (None, 8)}
    assert unchanged.text_model.output_shape == texts
    assert unchanged.vision_model.output_shape == images
    assert unchanged.output_shape == {
        "logits_per_image": (None, None),
        "logits_per_text": (None, None),
        "text_embeds": (None, 8),
        "image_embeds": (None, 8),
        "text_model_output": texts,
        "vision_model_output": images,
    }
    for part in (unchanged, unchanged.text_model, unchanged.vision_model):
        inputs = {
            name: keras.Input(batch_shape=shape, dtype=dtype)
            for name, (shape, dtype) in INPUTS.items()
            if name in part.input_names
        }
        found = keras.tree.map_structure(lambda output: output.shape, dict(part(inputs)))
        assert found == part.output_shape


def test_a_file_is_written_and_read_without_a_call(unchanged, monkeypatch, tmp_path):
    """Keras asks a model for all its attributes: of one that calls it, each file takes twice."""
    calls = []
    for kind in (AlignModel, type(unchanged.text_model), type(unchanged.vision_model)):
        monkeypatch.setattr(kind, "call", lambda self, *_, **__: calls.append(self))
    unchanged.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")
    assert calls == []


def test_summary_count_and_layers(unchanged):
    printed = io.StringIO()
    unchanged.summary(expand_nested=True, print_fn=lambda line, **_: printed.write(line))
    for name in ("layer_1 (EncoderLayer)", "block_2 (MBConvBlock)", "7,311"):
        assert name in printed.getvalue()
    assert unchanged.count_params() == 7311
    assert unchanged.get_layer("text_model") is unchanged.text_model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_weights_and_is_not_compiled(way, name, unchanged, pairs):
    part, _ = part_of(unchanged, name, pairs)
    again = COPIES[way](part)
    assert type(again) is type(part)
    assert again is not part
    assert not again.compiled
    for one, other in zip(part.weights, again.weights, strict=True):
        assert one.path == other.path
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))


def test_a_clone_is_a_new_model_of_the_same_configuration(unchanged):
    again = keras.models.clone_model(unchanged)
    assert again.config == unchanged.config
    again.set_weights(unchanged.get_weights())
    for one, other in zip(unchanged.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tower_in_a_larger_model(unchanged, pairs, tmp_path):
    images = pairs["pixel_values"]
    take = keras.layers.Lambda(lambda output: output.pooler_output)
    head = keras.layers.Dense(3)
    found = keras.Sequential([unchanged.vision_model, take, head])(images)
    inputs = keras.Input((16, 16, 3))
    functional = keras.Model(inputs, head(unchanged.get_image_features(inputs)))
    assert functional.output_shape == (None, 3)
    np.testing.assert_allclose(functional(images), found, atol=1e-6)
    functional.save(tmp_path / "head.keras")
    again = keras.saving.load_model(tmp_path / "head.keras")
    np.testing.assert_allclose(again(images), found, atol=1e-6)


# --- layers --------------------------------------------------------------------------------


def layer_cases(config) -> dict:
    """A layer's class, its arguments and its inputs."""
    text, vision = config.text_config, config.vision_config
    states = {"inputs": np.ones((2, 5, 16), "float32"), "attention_mask": np.ones((2, 1, 1, 5))}
    first, second, _ = block_table(vision)
    images = np.ones((2, 8, 8, 8), "float32")
    return {
        "embeddings": (TextEmbeddings, {"config": text}, np.ones((2, 5), "int32")),
        "attention": (SelfAttention, {"config": text, "num_heads": 3}, states),
        "layer": (EncoderLayer, {"config": text, "num_heads": 3, "name": "layer_0"}, states),
        "first block": (MBConvBlock, {"config": vision, "spec": first, "name": "b"}, images),
        "second block": (MBConvBlock, {"config": vision, "spec": second, "name": "b"}, images),
    }


@pytest.mark.parametrize(
    "name", ["embeddings", "attention", "layer", "first block", "second block"]
)
def test_layers_pass_keras_own_tests(name, tiny_config):
    layer_class, arguments, inputs = layer_cases(tiny_config)[name]
    case = testing.TestCase()
    case.run_class_serialization_test(layer_class(**arguments))
    made = layer_class(**arguments)
    made(**inputs) if isinstance(inputs, dict) else made(inputs)
    made.trainable = False
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))
    assert type(again) is layer_class
    assert not again.trainable
    shapes = [weight.shape for weight in made.weights]
    assert [weight.shape for weight in again.weights] == shapes
    if not isinstance(inputs, dict):
        case.run_layer_test(layer_class, arguments, input_data=inputs, run_training_check=False)


@pytest.mark.parametrize("name", PARTS)
def test_models_pass_keras_own_test_of_serialization(name, tiny_config, pairs):
    part, _ = part_of(AlignModel(tiny_config), name, pairs)
    testing.TestCase().run_class_serialization_test(part)


# --- surgery over LoRA and quantization ----------------------------------------------------


@pytest.mark.parametrize("mode", ["int8", "int4", "lora"])
def test_surgery_on_what_lora_or_quantization_holds_is_refused(mode, tiny_config, pairs):
    model = AlignModel(tiny_config)
    layers = (model.text_model.embeddings.word_embeddings, model.text_model.blocks[1].attention.key)
    for layer in layers:
        layer.enable_lora(2) if mode == "lora" else layer.quantize(mode)
    before = ops.convert_to_numpy(model.get_text_features(pairs["input_ids"]))
    found = "has LoRA" if mode == "lora" else f"is quantized to {mode}"
    line = f"{found}: resize and prune before it, or in what from_pretrained loads"
    with pytest.raises(ValueError, match=f"^text_model/embeddings/word_embeddings {line}"):
        model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=f"^text_model/layer_1/attention/key {line}"):
        model.prune_heads({0: [0], 1: [0]})
    after = ops.convert_to_numpy(model.get_text_features(pairs["input_ids"]))
    np.testing.assert_array_equal(before, after)  # layer 0 is whole
    assert model.config.text_config.pruned_heads == {}
    model.prune_heads({0: [0]})  # which is plain
    assert model.text_model.blocks[0].num_heads == 3


@pytest.mark.slow
def test_quantize_of_a_tower_never_called(tiny_config, pairs):
    tower = AlignModel(tiny_config).text_model
    tower.quantize("int8")
    assert tower.blocks[0].attention.query.quantization_mode == "int8"
    assert np.isfinite(ops.convert_to_numpy(tower(pairs["input_ids"]).pooler_output)).all()
