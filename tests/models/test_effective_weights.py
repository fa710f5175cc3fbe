"""Checkpoints of models with LoRA and quantization: what they compute is what is read again."""

import copy
import json

import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from align_tf import AlignModel, AlignTextModel
from align_tf.models.effective_weights import effective_weights
from align_tf.models.surgery import open_for_change


def adapt(layer, seed=0):
    layer.enable_lora(2, lora_alpha=3)
    (b,) = [
        weight for weight in layer.weights if weight.name in ("lora_kernel_b", "lora_embeddings_b")
    ]
    b.assign(np.random.default_rng(seed).normal(0, 0.2, b.shape))


def adapt_all(model):
    attention = model.text_model.blocks[0].attention
    convolution = model.vision_model.blocks[0].project_conv
    words = model.text_model.embeddings.word_embeddings
    for layer in (attention.query, attention.value, convolution, words, model.text_projection):
        adapt(layer)


def logits(model, pairs):
    return ops.convert_to_numpy(model(pairs).logits_per_image)


def test_a_checkpoint_holds_what_lora_makes_of_the_weights(changeable, pairs, tmp_path):
    plain = logits(changeable, pairs)
    changeable.save_pretrained(tmp_path / "plain")
    adapt_all(changeable)
    expected = logits(changeable, pairs)
    assert np.abs(expected - plain).max() > 0.1
    changeable.save_pretrained(tmp_path / "lora")
    again = AlignModel.from_pretrained(tmp_path / "lora")
    np.testing.assert_allclose(logits(again, pairs), expected, rtol=1e-4, atol=1e-4)
    before, after = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in ("plain", "lora")
    )
    assert {n: (a.shape, a.dtype) for n, a in before.items()} == {
        n: (a.shape, a.dtype) for n, a in after.items()
    }


def test_the_sum_is_of_the_precision_of_the_weights(tiny_config):
    model = AlignTextModel(tiny_config.text_config, dtype="mixed_bfloat16")
    model.pooler.kernel.assign(np.zeros((16, 16)))
    model.pooler.enable_lora(1, lora_alpha=2)
    model.pooler.lora_kernel_a.assign(np.ones((16, 1)))
    model.pooler.lora_kernel_b.assign(np.full((1, 16), 0.1))
    merged = effective_weights(model)["pooler/kernel"]
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, np.full((16, 16), 0.2), rtol=1e-6)  # bfloat16: 0.19922


@pytest.mark.slow  # as below
def test_a_checkpoint_holds_what_int8_stands_for(changeable, pairs, tmp_path):
    projection = changeable.text_projection
    projection.kernel.assign(np.tile([[0.127], [-0.0642]], (8, 8)))  # 127 and -64 thousandths
    changeable.quantize("int8")
    changeable.save_pretrained(tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    expected = np.tile([0.127, -0.064], (8, 8))
    np.testing.assert_allclose(stored["text_projection.weight"], expected, rtol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    again, live = AlignModel.from_pretrained(tmp_path)(pairs), changeable(pairs)
    for name in ("image_embeds", "text_embeds"):
        assert float(ops.min(ops.sum(again[name] * live[name], axis=-1))) > 0.999


# Keras takes half a minute to quantize.
QUANTIZED = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("int8", "int4")]


@pytest.mark.parametrize("mode", [None, "float8", *QUANTIZED])
def test_a_keras_file_computes_what_the_model_does(changeable, pairs, mode, tmp_path):
    if mode == "int4" and not hasattr(keras.quantizers, "pack_int4"):
        pytest.skip("this Keras has no int4")
    if mode:
        changeable.quantize(mode)
    if mode != "float8":  # Keras adapts no such layer
        adapt(changeable.text_model.blocks[0].attention.query)
    expected = changeable(pairs)
    changeable.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.text_model.pooler.quantization_mode == mode
    for name in (
        "image_embeds",
        "text_embeds",
    ):  # of a quantized kernel and LoRA, Keras rounds the sum
        least = 0.99 if mode == "int4" else 0.999
        assert float(ops.min(ops.sum(again(pairs)[name] * expected[name], axis=-1))) > least


def test_float8_is_told_before_anything_is_written(changeable, tmp_path):
    changeable.quantize("float8")
    with pytest.raises(ValueError, match=r"query: quantized to float8, .* expected int8 or int4"):
        changeable.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_no_weights_are_told(changeable, tmp_path):
    with open_for_change(changeable.text_model):
        changeable.text_model.add_weight(name="steps", shape=(), dtype="int32")
    with pytest.raises(ValueError, match="steps: of int32, expected floating-point numbers"):
        changeable.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_float16_cannot_hold_is_named(changeable, tmp_path):
    norm = changeable.vision_model.stem_bn
    norm.moving_variance.assign(np.full(norm.gamma.shape, 70000.0))
    message = r"embeddings.batchnorm.running_var reaches 70000, float16 only 65504: choose another"
    with pytest.raises(ValueError, match=message):
        changeable.save_pretrained(tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    changeable.save_pretrained(tmp_path / "out", dtype="bfloat16")


def test_a_training_that_went_wrong_is_saved_as_it_is(changeable, tmp_path):
    changeable.text_projection.bias.assign(np.full(8, np.nan))
    changeable.save_pretrained(tmp_path, dtype="float16")
    again = AlignModel.from_pretrained(tmp_path)
    assert np.isnan(ops.convert_to_numpy(again.text_projection.bias)).all()


def test_what_no_configuration_says_is_not_saved(tiny_config, tmp_path):
    """What is loaded would compute another thing."""
    model = AlignModel(tiny_config)
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.stem_conv.activation = keras.activations.relu
    model.text_model.embeddings.layer_norm.epsilon = 0.1
    for part, name in ((model.vision_model, "activation"), (model.text_model, "epsilon")):
        for saved in (model, part):
            message = (
                r"its (activation|epsilon) is no longer" if saved is model else f"its {name} is"
            )
            with pytest.raises(ValueError, match=message):
                saved.save_pretrained(tmp_path / "changed")
    for write in (
        lambda: model.save(tmp_path / "changed.keras"),
        lambda: copy.deepcopy(model),
        lambda: keras.models.clone_model(model),
    ):
        with pytest.raises(ValueError, match="is no longer what the configuration says"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
